//! The calls and the life of a machine, against real guests.

use lodge_vm_tests::metald::Server;
use serde_json::{Value, json};

#[test]
fn cases_06_and_08_to_13_what_is_checked_first() {
    let server = Server::new("");
    let refused = |config: Value| {
        server.refused("CreateVm", json!({"config": config}), 400, "invalid_argument")
    };
    let message = server.refused("CreateVm", json!({}), 400, "invalid_argument");
    assert_eq!(message, "vm config is required");
    let with = |key: &str, value: Value| {
        let mut config = server.good();
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value,
        }
        refused(config)
    };
    for part in ["cpu", "memory", "boot"] {
        assert_eq!(with(part, Value::Null), format!("{part} configuration is required"));
    }
    for cpu in [json!({"vcpu_count": 0}), json!({"vcpu_count": -1}), json!({})] {
        assert_eq!(with("cpu", cpu), "vcpu_count must be greater than 0");
    }
    assert_eq!(
        with("cpu", json!({"vcpu_count": 4, "max_vcpu_count": 2})),
        "max_vcpu_count must be greater than or equal to vcpu_count"
    );
    assert_eq!(
        with("memory", json!({"size_bytes": 0})),
        "memory size_bytes must be greater than 0"
    );
    assert_eq!(with("boot", json!({})), "kernel_path is required");
    assert_eq!(with("storage", json!([])), "at least one storage device is required");
    assert_eq!(with("storage", json!([{"path": ""}])), "storage device 0 path is required");
    // Cases 28 to 31.
    for count in [json!("abc"), json!(1.5), json!(3_000_000_000_i64)] {
        assert!(with("cpu", json!({"vcpu_count": count})).starts_with("unmarshal message:"));
    }
    for count in [json!("1"), json!(1.0)] {
        server.create(|config| config["cpu"]["vcpu_count"] = count);
    }
    assert!(with("memory", json!({"size_bytes": 134_217_729})).contains("whole number of MiB"));
    let disk = json!({"path": server.asset("rootfs.ext4"), "is_root_device": true});
    assert!(with("storage", json!([disk, disk])).contains("storage[1].is_root_device"));
    assert!(
        with("network", json!([{"id": "eth0", "mode": "DUAL"}])).starts_with("unmarshal message:")
    );
    // Paths: what is not there, what is elsewhere, what a link leads to.
    let storage = |path: &str| with("storage", json!([{"path": path}]));
    assert!(storage("/etc/shadow").contains("not below an asset folder"));
    let none = server.asset("none").display().to_string();
    assert!(storage(&none).contains("storage[0].path"), "{}", storage(&none));
    std::os::unix::fs::symlink("/etc/shadow", server.asset("link")).unwrap();
    let link = server.asset("link").display().to_string();
    assert!(storage(&link).contains("link leads out"), "{}", storage(&link));
    std::fs::write(server.asset("junk"), "not a kernel").unwrap();
    let message = with("boot", json!({"kernel_path": server.asset("junk")}));
    assert!(
        message.contains("boot.kernel_path") && message.contains("not a Linux kernel"),
        "{message}"
    );
    assert_eq!(server.ok("ListVms", json!({}))["totalCount"], 2);
    assert!(server.lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
}

#[test]
fn cases_14_to_18_the_life_of_a_machine_is_truthful() {
    let server = Server::new("");
    let id = server.create(|_| {});
    let by_id = json!({"vm_id": id});
    let refused = |method: &str, body: &Value| {
        server.refused(method, body.clone(), 400, "failed_precondition")
    };
    for method in ["ShutdownVm", "PauseVm", "ResumeVm", "RebootVm"] {
        assert!(
            refused(method, &by_id).contains("CREATED")
                || refused(method, &by_id).contains("created")
        );
    }
    let running = json!({"success": true, "state": "VM_STATE_RUNNING"});
    assert_eq!(server.ok("BootVm", by_id.clone()), running);
    assert!(refused("BootVm", &by_id).contains("VM_STATE_RUNNING"));
    server.await_console(&id, "GUEST-READY");
    let info = server.ok("GetVmInfo", by_id.clone());
    assert_eq!(info["backendInfo"]["backend_type"], "qemu");
    assert!(
        info["metrics"]["memoryUsageBytes"].as_str().unwrap().parse::<u64>().unwrap() > 50 << 20
    );
    let paused = json!({"success": true, "state": "VM_STATE_PAUSED"});
    for _ in 0..2 {
        assert_eq!(server.ok("PauseVm", by_id.clone()), paused);
    }
    assert_eq!(server.state(&id), "VM_STATE_PAUSED");
    assert_eq!(server.ok("ListVms", json!({}))["vms"][0]["state"], "VM_STATE_PAUSED");
    let only = json!({"state_filter": ["VM_STATE_PAUSED", "VM_STATE_SHUTDOWN"]});
    assert_eq!(server.ok("ListVms", only)["totalCount"], 1);
    let only = json!({"state_filter": ["VM_STATE_RUNNING"]});
    assert_eq!(server.call("ListVms", only).body, b"{}");
    assert!(refused("RebootVm", &by_id).contains("force"));
    for _ in 0..2 {
        assert_eq!(server.ok("ResumeVm", by_id.clone()), running);
    }
    assert!(refused("DeleteVm", &by_id).contains("force"));
    let log = |text: &str| server.lab.console_text(&id).matches(text).count();
    assert_eq!(server.ok("RebootVm", json!({"vm_id": id, "force": true})), running);
    server.lab.until("the second boot", || log("GUEST-READY") == 2);
    let force = json!({"vm_id": id, "force": true, "timeout_seconds": 10});
    let down = json!({"success": true, "state": "VM_STATE_SHUTDOWN"});
    let pid: u32 = info["backendInfo"]["process_id"].as_str().unwrap().parse().unwrap();
    for _ in 0..2 {
        assert_eq!(server.ok("ShutdownVm", force.clone()), down);
        assert!(!std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists());
    }
    assert_eq!(server.ok("BootVm", by_id.clone()), running);
    assert_eq!(
        server.ok("DeleteVm", json!({"vm_id": id, "force": true})),
        json!({"success": true})
    );
    for method in
        ["GetVmInfo", "DeleteVm", "BootVm", "ShutdownVm", "PauseVm", "ResumeVm", "RebootVm"]
    {
        let message = server.refused(method, by_id.clone(), 404, "not_found");
        assert_eq!(message, format!("VM not found: {id}"));
        assert_eq!(server.refused(method, json!({}), 400, "invalid_argument"), "vm_id is required");
        let message = server.refused(method, json!({"vm_id": "nope"}), 404, "not_found");
        assert_eq!(message, "VM not found: nope");
    }
    let negative = json!({"vm_id": server.create(|_| {}), "timeout_seconds": -1});
    server.refused("ShutdownVm", negative, 400, "invalid_argument");
}

#[test]
fn a_guest_that_hears_its_power_button_is_asked_and_waited_for() {
    let server = Server::new("");
    let quiet = lodge_vm_tests::assets::guest(
        "for e in /dev/input/event*; do head -c 24 $e >/dev/null && poweroff -f & done\nsleep 1\necho GUEST-READY\nsh\n",
    );
    std::fs::copy(quiet, server.asset("initrd.img")).unwrap();
    let id = server.create(|config| {
        // The power button is an ACPI device, which a guest without PCI has as well.
        config["boot"]["initrd_path"] = json!(server.asset("initrd.img"));
    });
    server.ok("BootVm", json!({"vm_id": id}));
    server.await_console(&id, "GUEST-READY");
    let answer = server.ok("ShutdownVm", json!({"vm_id": id, "timeout_seconds": 60}));
    assert_eq!(answer["state"], "VM_STATE_SHUTDOWN");
    let events = server.lab.ok(&["events", &id]);
    assert!(!events.contains("stop-timed-out"), "{events}");
}

#[test]
fn the_guest_sees_what_was_asked_for() {
    let server = Server::new("");
    let id = server.create(|config| {
        config["cpu"] = json!({"vcpu_count": 2, "topology": {"sockets": 1, "cores_per_socket": 2, "threads_per_core": 1}});
        config["memory"]["size_bytes"] = json!(268_435_456);
        config["boot"]["kernel_args"] = json!("console=ttyS0 quiet cryptomgr.notests pci=off from.the=caller");
        config["storage"] = json!([
            {"path": server.asset("app.ext4"), "readonly": true, "id": "data"},
            {"path": server.asset("rootfs.ext4"), "is_root_device": true},
        ]);
        config["network"] = json!([{
            "id": "eth0", "mac_address": "02:00:00:00:00:07", "interface_type": "virtio-net",
            "ipv4_config": {"address": "10.0.2.77", "dns_servers": ["9.9.9.9"]},
        }]);
        config["console"] = json!({"enabled": true, "console_type": "serial"});
        config["metadata"] = json!({"team": "blue"});
    });
    assert_eq!(server.ok("ListVms", json!({}))["vms"][0]["metadata"]["team"], "blue");
    server.ok("BootVm", json!({"vm_id": id}));
    server.await_console(&id, "GUEST-READY");
    let sees = |typed: &str, answer: &str| server.lab.type_and_see(&id, typed, answer);
    sees("echo cpus-$(nproc) mem-$(free -m | awk '/Mem/ {print ($2 > 200)}')\n", "cpus-2 mem-1");
    sees("cat /proc/cmdline\n", "from.the=caller root=/dev/vda rw");
    sees(
        "echo $(head -c 1 /dev/vda)$(head -c 1 /dev/vdb)-$(cat /sys/block/vdb/ro)-$(cat /sys/block/vdb/serial)\n",
        "RA-1-data",
    );
    sees("echo changed > /dev/vda; sync; echo now-$(head -c 7 /dev/vda)\n", "now-changed");
    sees(
        "ip link set eth0 up; udhcpc -q -n -i eth0 -s /dhcp; cat /sys/class/net/eth0/address\n",
        "02:00:00:00:00:07",
    );
    sees("ip -4 addr show eth0; cat /etc/resolv.conf\n", "nameserver 9.9.9.9");
    let info = server.ok("GetVmInfo", json!({"vm_id": id}));
    assert_eq!(info["networkInfo"]["ipAddress"], "10.0.2.77");
    assert_eq!(info["networkInfo"]["dnsServers"], json!(["9.9.9.9"]));
    let count = |path: &str| {
        info.pointer(path).and_then(Value::as_str).unwrap_or("0").parse::<u64>().unwrap()
    };
    assert!(count("/metrics/networkStats/bytesTransmitted") > 0, "{info}");
    assert!(count("/metrics/storageStats/bytesWritten") > 0, "{info}");
    let text = String::from_utf8(server.curl("/metrics", &[], b"").body).unwrap();
    let line = format!(
        "lodge_vm_disk_written_bytes_total{{vm_id=\"{id}\",customer_id=\"default-customer\""
    );
    assert!(text.contains(&line), "{text}");
    // The file itself is nobody's to change.
    assert_eq!(std::fs::read(server.asset("rootfs.ext4")).unwrap()[0], b'R');
}

/// Each part of a description as a guide would show it, and what its guest makes of it.
#[test]
fn every_part_of_a_description_takes_effect() {
    let server = Server::new("");
    std::fs::copy(lodge_vm_tests::assets::shell(), server.asset("initrd.img")).unwrap();
    let id = server.create(|config| {
        config["cpu"] = json!({"vcpu_count": 2, "max_vcpu_count": 4});
        config["memory"] = json!({"size_bytes": 268_435_456, "hotplug_size_bytes": 268_435_456});
        config["storage"] = json!([
            {"path": server.asset("rootfs.ext4"), "readonly": false, "is_root_device": true},
            {"path": server.asset("app.ext4"), "readonly": true, "is_root_device": false},
        ]);
        config["boot"] = json!({
            "kernel_path": server.asset("vmlinux"),
            "kernel_args": "console=ttyS0 quiet cryptomgr.notests reboot=k panic=1 init=/sbin/init",
            "initrd_path": server.asset("initrd.img"),
        });
    });
    server.ok("BootVm", json!({"vm_id": id}));
    server.await_console(&id, "GUEST-READY");
    let sees = |typed: &str, answer: &str| server.lab.type_and_see(&id, typed, answer);
    sees("echo has-$(nproc)-cpus\n", "has-2-cpus");
    sees(
        "echo first-$(head -c 1 /dev/vda)-second-$(head -c 1 /dev/vdb)-$(cat /sys/block/vdb/ro)\n",
        "first-R-second-A-1",
    );
    sees("grep -c init=/sbin/init /proc/cmdline && echo args-seen\n", "args-seen");
    server.lab.ok(&["set", &id, "--cpus", "4"]);
    sees(
        "sleep 2; for c in 2 3; do echo 1 > /sys/devices/system/cpu/cpu$c/online; done; echo now-$(nproc)\n",
        "now-4",
    );
    server.lab.ok(&["set", &id, "--memory", "512MiB"]);
    sees(
        "sleep 2; for m in /sys/devices/system/memory/memory*; do grep -q offline $m/state && echo online > $m/state; done; echo more-$(free -m | awk '/Mem/ {print ($2 > 400)}')\n",
        "more-1",
    );
    let info = server.ok("GetVmInfo", json!({"vm_id": id}));
    assert_eq!(info["config"]["cpu"]["maxVcpuCount"], 4);
    assert_eq!(info["config"]["memory"]["maxSizeBytes"], "536870912");
}

#[test]
fn case_33_pages_are_stable_and_tokens_are_bound() {
    let server = Server::new("");
    let mut ids: Vec<String> = (0..3).map(|_| server.create(|_| {})).collect();
    let first = server.ok("ListVms", json!({"page_size": 2}));
    let seen = |page: &Value| -> Vec<String> {
        let vms = page["vms"].as_array().unwrap();
        vms.iter().map(|vm| vm["vmId"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((seen(&first).len(), &first["totalCount"]), (2, &json!(3)));
    let token = first["nextPageToken"].as_str().unwrap();
    // One more in between does not move the rest.
    server.create(|_| {});
    let second = server.ok("ListVms", json!({"page_size": 2, "page_token": token}));
    assert_eq!((seen(&second).len(), second.get("nextPageToken")), (1, None));
    ids.reverse();
    assert_eq!([seen(&first), seen(&second)].concat(), ids);
    for bad in [
        json!({"page_token": "zzz"}),
        json!({"page_token": token, "state_filter": [1]}),
        json!({"page_size": -1}),
        json!({"state_filter": [0]}),
        json!({"state_filter": ["X"]}),
    ] {
        server.refused("ListVms", bad, 400, "invalid_argument");
    }
}

#[test]
fn case_38_room_for_more_memory_is_what_the_guide_says() {
    let server = Server::new("");
    let with = |more: Value| {
        let id = server.create(|config| {
            config["memory"] = json!({"size_bytes": 268_435_456, "hotplug_size_bytes": more});
            config["boot"]["kernel_args"] = json!("console=ttyS0 quiet cryptomgr.notests");
        });
        (server.ok("GetVmInfo", json!({"vm_id": id}))["config"]["memory"].clone(), id)
    };
    let (memory, id) = with(json!(268_435_456));
    assert_eq!(
        memory,
        json!({"sizeBytes": "268435456", "hotplugEnabled": true, "maxSizeBytes": "536870912"})
    );
    assert_eq!(with(json!(0)).0, json!({"sizeBytes": "268435456"}));
    server.ok("BootVm", json!({"vm_id": id}));
    server.await_console(&id, "GUEST-READY");
    server.lab.ok(&["set", &id, "--memory", "512MiB"]);
    // A board without PCI takes nothing more, and says so at once.
    let mut config = server.good();
    config["memory"]["hotplug_size_bytes"] = json!(268_435_456);
    config["boot"]["kernel_args"] = json!("console=ttyS0 pci=off");
    let message = server.refused("CreateVm", json!({"config": config}), 400, "invalid_argument");
    assert!(
        message.contains("memory.max_size_bytes") && message.contains("boot.kernel_args"),
        "{message}"
    );
}

#[test]
fn case_39_nothing_is_lost_with_the_daemon() {
    let mut server = Server::new("");
    let (created, running) = (server.create(|_| {}), server.create(|_| {}));
    server.ok("BootVm", json!({"vm_id": running}));
    server.await_console(&running, "GUEST-READY");
    server.restart();
    assert_eq!(server.state(&created), "VM_STATE_CREATED");
    assert_eq!(server.state(&running), "VM_STATE_RUNNING");
    server.ok("PauseVm", json!({"vm_id": running}));
    // A guest's hypervisor that dies by itself is not running any more, in any view.
    let info = server.ok("GetVmInfo", json!({"vm_id": running}));
    let pid = info["backendInfo"]["process_id"].as_str().unwrap().parse().unwrap();
    lodge_vm_tests::lab::kill(pid, 9);
    server.lab.until("the end to be seen", || server.state(&running) == "VM_STATE_SHUTDOWN");
    let info = server.ok("GetVmInfo", json!({"vm_id": running}));
    assert!(info["backendInfo"]["reason"].as_str().unwrap().contains("signal 9"), "{info}");
    server.ok("BootVm", json!({"vm_id": running}));
}
