// The life of a machine as the Connect library for Node sees it, over each of its transports.
// Arguments: the server's URL and a machine's description in JSON.
import assert from "node:assert/strict";
import { fromJson } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import {
  createConnectTransport,
  createGrpcTransport,
  createGrpcWebTransport,
} from "@connectrpc/connect-node";
import { VmConfigSchema, VmService, VmState } from "./gen/vmprovisioner/v1/vm_pb.js";
import { VmWatchService } from "./gen/lodge/v1/watch_pb.js";

const [baseUrl, good] = process.argv.slice(2);
const described = JSON.parse(good);
for (const disk of described.storage) {
  // A spelling of the JSON page, not of the definition.
  disk.read_only = disk.readonly ?? false;
  delete disk.readonly;
}
const config = fromJson(VmConfigSchema, described);

const refused = async (call) => {
  try {
    await call;
  } catch (error) {
    return ConnectError.from(error).code;
  }
  return undefined;
};

const transports = {};
for (const httpVersion of ["1.1", "2"]) {
  for (const useBinaryFormat of [true, false]) {
    const options = { baseUrl, httpVersion, useBinaryFormat };
    transports[`connect ${httpVersion} ${useBinaryFormat}`] = createConnectTransport(options);
    transports[`grpc-web ${httpVersion} ${useBinaryFormat}`] = createGrpcWebTransport(options);
    if (httpVersion === "2") {
      transports[`grpc ${useBinaryFormat}`] = createGrpcTransport(options);
    }
  }
}

for (const [name, transport] of Object.entries(transports)) {
  const vms = createClient(VmService, transport);
  const watch = createClient(VmWatchService, transport);
  const { vmId, state } = await vms.createVm({ config });
  assert.equal(state, VmState.CREATED);
  const seen = [];
  const watching = (async () => {
    for await (const change of watch.watchVms({ vmId })) {
      seen.push(change.event);
      if (change.event === "removed") return;
    }
  })();
  assert.equal(await refused(vms.bootVm({ vmId: "nope" })), Code.NotFound);
  assert.equal(await refused(vms.pauseVm({ vmId })), Code.FailedPrecondition);
  assert.equal((await vms.bootVm({ vmId })).state, VmState.RUNNING);
  assert.equal((await watch.waitVm({ vmId, until: "running" })).state, VmState.RUNNING);
  assert.equal((await vms.pauseVm({ vmId })).state, VmState.PAUSED);
  const info = await vms.getVmInfo({ vmId });
  assert.equal(info.config.memory.sizeBytes, config.memory.sizeBytes);
  assert.equal((await vms.listVms({})).totalCount, 1);
  assert.ok((await vms.resumeVm({ vmId })).success);
  assert.equal((await vms.shutdownVm({ vmId, force: true })).state, VmState.SHUTDOWN);
  assert.ok((await vms.deleteVm({ vmId })).success);
  await watching;
  for (const event of ["present", "running", "paused", "removed"]) {
    assert.ok(seen.includes(event), `${event} in ${seen}`);
  }
  console.log(`${name}: fine`);
}
console.log("ALL FINE");
process.exit(0);
