"""The client of Zero-OS against an open door: port, path of an flist, URL of its store, a
free port."""

import json
import sys

from zeroos.core0.client import Client
from zeroos.core0.client.client import ResultError

port, flist, store, ssh = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
cl = Client("127.0.0.1", port=port, ssl=False, timeout=60)

assert cl.ping().startswith("PONG Version: "), cl.ping()
assert cl.kvm.list() == []

# What the guide prints, in the generic form that released clients take, with the URL changed.
uuid = cl.json(
    "kvm.create",
    {
        "name": "azmy",
        "flist": "file://" + flist,
        "storage": store,
        "cpu": 2,
        "memory": 256,
        "media": None,
        "mount": None,
        "tags": None,
        "port": {ssh: 22},
        "config": {"/root/.ssh/authorized_keys": "ssh-rsa AAAA azmy@curiosity"},
        "nics": [{"type": "default"}],
    },
)
machines = cl.kvm.list()
assert [m["uuid"] for m in machines] == [uuid], machines
assert machines[0]["params"]["port"] == {str(ssh): 22}, machines
info = cl.kvm.info(uuid)
assert set(info) == {"Vcpu", "Net", "Block"}, info
assert cl.kvm.infops(uuid), "statistics"
cl.kvm.pause(uuid)
cl.kvm.resume(uuid)

try:
    cl.kvm.create("none", media=[{"url": "/nowhere"}], cpu=1, memory=0).get()
except (ResultError, AttributeError, TypeError):
    pass
try:
    cl.json("kvm.nope", {})
    raise AssertionError("an unknown command was done")
except ResultError as error:
    assert error.code != 0, error.code

try:
    cl.kvm.limit_disk_io(uuid, {"url": "/nowhere"}, totaliopssecset=True, totaliopssec=9)
    raise AssertionError("a disk that is not there was limited")
except ResultError as error:
    assert "is not attached to the vm" in str(error), error

cl.kvm.destroy(uuid)
assert cl.kvm.list() == []
try:
    cl.kvm.destroy(uuid)
    raise AssertionError("destroyed twice")
except ResultError as error:
    assert "couldn't find domain with the uuid" in str(error), error

streamed = cl.raw("kvm.list", {}, stream=True)
seen = []
streamed.callback = lambda level, message, flags: seen.append((level, message, flags))
assert json.loads(streamed.get().data) == []
print("ALL FINE")
