"""The life of a machine as two Python libraries see it: grpcio, and connectrpc in each of its
protocols. Arguments: the server's URL, the folder of definitions, a machine's description in JSON.
"""

import json
import sys
import tempfile
import threading

import grpc
from grpc_tools import protoc

url, proto, good = sys.argv[1:4]
folder = tempfile.mkdtemp()
status = protoc.main(
    ["protoc", f"-I{proto}", f"--python_out={folder}", f"--grpc_python_out={folder}",
     "vmprovisioner/v1/vm.proto", "lodge/v1/watch.proto"]
)
assert status == 0
sys.path.insert(0, folder)

from connectrpc.client import ConnectClientSync
from connectrpc.compat import google_protobuf_binary_codec, google_protobuf_json_codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.protocol import ProtocolType
from google.protobuf import json_format
from pyqwest import HTTPVersion, SyncClient, SyncHTTPTransport
from lodge.v1 import watch_pb2, watch_pb2_grpc
from vmprovisioner.v1 import vm_pb2, vm_pb2_grpc

described = json.loads(good)
for disk in described["storage"]:
    # A spelling of the JSON page, not of the definition.
    disk["read_only"] = disk.pop("readonly", False)
config = json_format.ParseDict(described, vm_pb2.VmConfig())


def life(call, refused):
    """A machine from its creation to its end; `refused` names the code of a call that fails."""
    made = call("CreateVm", vm_pb2.CreateVmRequest(config=config))
    vm_id = made.vm_id
    assert made.state == vm_pb2.VM_STATE_CREATED, made
    assert refused("BootVm", vm_pb2.BootVmRequest(vm_id="nope")) == "not_found"
    assert refused("PauseVm", vm_pb2.PauseVmRequest(vm_id=vm_id)) == "failed_precondition"
    assert refused("CreateVm", vm_pb2.CreateVmRequest()) == "invalid_argument"
    assert call("BootVm", vm_pb2.BootVmRequest(vm_id=vm_id)).state == vm_pb2.VM_STATE_RUNNING
    assert call("PauseVm", vm_pb2.PauseVmRequest(vm_id=vm_id)).state == vm_pb2.VM_STATE_PAUSED
    info = call("GetVmInfo", vm_pb2.GetVmInfoRequest(vm_id=vm_id))
    assert info.state == vm_pb2.VM_STATE_PAUSED
    assert info.config.memory.size_bytes == config.memory.size_bytes
    assert info.metrics.memory_usage_bytes > 0
    listed = call("ListVms", vm_pb2.ListVmsRequest(state_filter=[vm_pb2.VM_STATE_PAUSED]))
    assert [vm.vm_id for vm in listed.vms] == [vm_id], listed
    assert call("ResumeVm", vm_pb2.ResumeVmRequest(vm_id=vm_id)).success
    down = call("ShutdownVm", vm_pb2.ShutdownVmRequest(vm_id=vm_id, force=True))
    assert down.state == vm_pb2.VM_STATE_SHUTDOWN
    assert call("DeleteVm", vm_pb2.DeleteVmRequest(vm_id=vm_id)).success


channel = grpc.insecure_channel(url.removeprefix("http://"))
stub = vm_pb2_grpc.VmServiceStub(channel)


def grpc_call(name, request):
    return getattr(stub, name)(request, timeout=120)


def grpc_refused(name, request):
    try:
        grpc_call(name, request)
    except grpc.RpcError as error:
        return error.code().name.lower()
    return "ok"


events = []
watch = watch_pb2_grpc.VmWatchServiceStub(channel)
stream = watch.WatchVms(watch_pb2.WatchVmsRequest(), timeout=120)


def listen():
    for change in stream:
        events.append(change.event)
        if change.event == "removed":
            return


listener = threading.Thread(target=listen)
listener.start()
life(grpc_call, grpc_refused)
listener.join(60)
for event in ["created", "running", "paused", "removed"]:
    assert event in events, events
print("grpcio: fine")

for protocol in (ProtocolType.CONNECT, ProtocolType.GRPC, ProtocolType.GRPC_WEB):
    for codec in (google_protobuf_binary_codec(), google_protobuf_json_codec()):
        # gRPC is HTTP/2, which a plain URL does not say.
        version = HTTPVersion.HTTP2 if protocol == ProtocolType.GRPC else HTTPVersion.HTTP1
        http = SyncClient(SyncHTTPTransport(http_version=version))
        with ConnectClientSync(url, codec=codec, protocol=protocol, http_client=http) as client:

            def connect_call(name, request):
                method = MethodInfo(
                    name=name,
                    service_name="metal.vmprovisioner.v1.VmService",
                    input=type(request),
                    output=getattr(vm_pb2, name + "Response"),
                    idempotency_level=IdempotencyLevel.UNKNOWN,
                    stream_type=StreamType.UNARY,
                )
                return client.execute_unary(request=request, method=method)

            def connect_refused(name, request):
                try:
                    connect_call(name, request)
                except ConnectError as error:
                    return error.code.value
                return "ok"

            life(connect_call, connect_refused)
            made = connect_call("CreateVm", vm_pb2.CreateVmRequest(config=config, vm_id="w"))
            method = MethodInfo(
                name="WatchVms",
                service_name="lodge.v1.VmWatchService",
                input=watch_pb2.WatchVmsRequest,
                output=watch_pb2.WatchVmsResponse,
                idempotency_level=IdempotencyLevel.UNKNOWN,
                stream_type=StreamType.SERVER_STREAM,
            )
            request = watch_pb2.WatchVmsRequest(vm_id="w")
            changes = client.execute_server_stream(request=request, method=method)
            assert next(changes).event == "present"
            connect_call("DeleteVm", vm_pb2.DeleteVmRequest(vm_id="w"))
            assert any(change.event == "removed" for change in changes)
        print(f"connectrpc {protocol} {codec.name()}: fine")

print("ALL FINE")
