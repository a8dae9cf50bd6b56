//! Clusters of real nodes: what they are told, where they are, and how they come and go.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::xcluster::Xc;

#[test]
fn cases_4_22_23_28_29_31_32_33_35_nodes_are_what_they_were_asked_to_be() {
    let mut xc = Xc::with_image();
    xc.files("inimage", &[("etc/who", "image"), ("etc/onlyimage", "x")]);
    xc.ok(&["ximage", "inimage"]);
    xc.files("oncd", &[("etc/who", "cd"), ("etc/init.d/init.hook", "echo hooked >/hooked\n")]);
    for (name, value) in [
        ("__mem1", "192"),
        ("__smp1", "1"),
        ("__nets2", "0,1,3"),
        ("__append1", "foo=1"),
        ("__mtu", "1400"),
        ("xcluster_Q", "it's"),
        ("xcluster_TWO", "a\nb"),
        ("__nvm", "2"),
        ("__nrouters", "0"),
    ] {
        xc.set(name, value);
    }
    xc.ok(&["mkcdrom", "env", "xnet", "template", "oncd"]);
    xc.ok(&["start"]);
    assert_eq!(xc.says(&["status", "--quiet"]).code, 2);
    assert!(xc.ok_status().contains("alive 1\nalive 2\ndead  3\n"));
    let again = xc.fails(&["boot_vm", "1"]);
    assert_eq!(again, "ERROR: Node already active [1]\n");
    let cmdline = xc.rsh(1, "cat /proc/cmdline");
    for word in ["root=/dev/vda", "rw", "init=/init", "mtu0=1400", "mtu1=1400", "foo=1"] {
        assert!(cmdline.split_whitespace().any(|w| w == word), "{word}: {cmdline}");
    }
    let memory: u32 = xc.rsh(1, "awk '/MemTotal/{print $2}' /proc/meminfo").trim().parse().unwrap();
    assert!((150_000..196_608).contains(&memory), "{memory}");
    assert_eq!(xc.rsh(1, "nproc").trim(), "1");
    assert_eq!(xc.rsh(2, "nproc").trim(), "2");
    assert_eq!(xc.rsh(2, "hostname").trim(), "vm-002");
    assert_eq!(xc.rsh(2, "cat /sys/class/net/eth2/address").trim(), "00:00:00:01:03:02");
    assert_eq!(xc.rsh(1, "cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu"), "1400\n1400\n");
    assert_eq!(xc.rsh(1, "cat /etc/who /etc/onlyimage /hooked"), "cdxhooked\n");
    assert_eq!(xc.rsh(1, ". /etc/xcluster_env; echo \"$Q-$TWO-$__nvm\""), "it's-a\nb-2\n");
    assert_eq!(xc.rsh(1, "template_test tcase_version"), "template on vm-001\n");
    // Over the cluster's net, to the host, and by name.
    xc.rsh(1, "ping -c1 -W5 192.168.1.2");
    xc.rsh(1, "ping -c1 -W5 1000::1:192.168.1.2");
    xc.rsh(1, "ping -c1 -W5 192.168.0.250");
    assert!(xc.rsh(1, "nslookup vm-002").contains("192.168.0.2"));
    let file = xc.path("copied");
    xc.ok(&["rcp", "1", "/etc/os-release", file.to_str().unwrap()]);
    assert!(fs::read_to_string(&file).unwrap().contains("ID=xcluster"));
    assert_eq!(xc.says(&["rsh", "1", "exit 7"]).code, 7);
    // A reboot keeps the disk and unpacks nothing twice.
    xc.rsh(
        1,
        "echo kept >/root/kept; echo mine >/etc/who; sync; (sleep 1; reboot) >/dev/null 2>&1 &",
    );
    xc.lab.until("the reboot", || {
        let said = xc.says(&["rsh", "1", "cut -d. -f1 /proc/uptime; cat /root/kept /etc/who"]);
        said.code == 0 && said.out.ends_with("kept\nmine\n") && xc.reboots(1) == 2
    });
    let hosts = xc.rsh(1, "cat /etc/hosts");
    assert_eq!(hosts.matches("vm-001").count(), 1, "{hosts}");
    // One goes and comes back with a new disk; the other does not notice.
    xc.rsh(2, "echo kept >/root/kept");
    let up = xc.rsh(1, "cat /proc/sys/kernel/random/boot_id");
    xc.ok(&["scalein", "2"]);
    assert_eq!(xc.says(&["status", "--quiet"]).code, 1);
    xc.ok(&["scaleout", "2"]);
    assert_eq!(xc.says(&["rsh", "2", "cat /root/kept"]).code, 1);
    assert_eq!(xc.rsh(1, "cat /proc/sys/kernel/random/boot_id"), up);
    // The image changes under nobody's feet.
    xc.ok(&["ximage", "oncd"]);
    assert_eq!(xc.rsh(1, "cat /etc/who /root/kept"), "mine\nkept\n");
    xc.ok(&["stop_vm", "1"]);
    assert_eq!(xc.lab.state("xc-vm-001"), "paused");
    xc.ok(&["reset_vm", "1"]);
    xc.lab.until("the reset", || xc.says(&["rsh", "1", "true"]).code == 0);
    xc.ok(&["stop"]);
    assert_eq!(xc.says(&["status", "--quiet"]).code, 0);
    assert_eq!(xc.says(&["rsh", "1", "true"]).code, 255);
}

#[test]
fn case_30_routers_and_testers_reach_each_other() {
    let mut xc = Xc::with_image();
    xc.set("__nvm", "1");
    xc.set("__nrouters", "1");
    xc.set("__ntesters", "1");
    xc.ok(&["mkcdrom", "env", "xnet"]);
    xc.ok(&["start"]);
    let mac = |id, dev: &str| xc.rsh(id, &format!("cat /sys/class/net/{dev}/address"));
    assert_eq!(mac(201, "eth2").trim(), "00:00:00:01:02:c9");
    assert_eq!(mac(221, "eth1").trim(), "00:00:00:01:02:dd");
    assert_eq!(xc.rsh(221, "hostname").trim(), "vm-221");
    // From the tester through the router to the node, and back.
    xc.rsh(221, "ping -c1 -W5 192.168.1.1");
    xc.rsh(221, "ping -c1 -W5 1000::1:192.168.1.1");
    // Net 2 is not where nodes are.
    assert!(!xc.rsh(1, "ip -o addr").contains("192.168.2."));
    xc.ok(&["stop", "--now"]);
}

#[test]
fn the_copy_of_an_image_extended_with_systemd_starts_with_it() {
    let mut xc = Xc::with_image();
    let own = xc.path("ws/xcluster/my-hd.img");
    fs::copy(xc.image(), &own).unwrap();
    xc.set("__image", own.to_str().unwrap());
    xc.ok(&["ximage", "systemd"]);
    xc.set("__nvm", "1");
    xc.set("__nrouters", "0");
    xc.ok(&["start"]);
    assert_eq!(xc.rsh(1, "cat /proc/1/comm").trim(), "systemd");
    xc.lab.until("a running system", || {
        xc.says(&["rsh", "1", "systemctl is-system-running"]).out.trim() == "running"
    });
    xc.ok(&["stop", "--now"]);
}

#[test]
fn a_cluster_of_its_own_number_is_entered_with_a_shell() {
    let mut xc = Xc::with_image();
    xc.set("USER", "lodgetest");
    let i = (std::process::id() % 100 + 1).to_string();
    xc.ok(&["nsadd", &i]);
    xc.set("__nvm", "1");
    xc.set("__nrouters", "0");
    let program = lodge_vm_tests::lab::program();
    let xc_of = |words: &str| format!("{} xc {words}", program.display());
    let inside = |script: &str| xc.says(&["nsenter", &i, "sh", "-c", script]);
    let links = inside("ip -o -4 addr").out;
    for net in 0..3 {
        assert!(links.contains(&format!("xcbr{net}    inet 192.168.{net}.250/24")), "{links}");
    }
    let more = inside(&format!("{} && ip -o -4 addr show xcbr7", xc_of("br_setup 7")));
    assert!(more.out.contains("192.168.7.250/24"), "{more:?}");
    let started = inside(&xc_of("start"));
    assert_eq!(started.code, 0, "{started:?}");
    let there = inside(&format!(
        "{}; curl -s http://192.168.0.1/cgi-bin/info | head -1",
        xc_of("rsh 1 hostname")
    ));
    assert_eq!(there.out, "vm-001\nvm-001\n", "{there:?}");
    // The cluster without a number is another one.
    assert_eq!(xc.says(&["status", "--quiet"]).code, 0);
    assert_eq!(inside(&xc_of("status --quiet")).code, 1);
    assert_eq!(inside(&xc_of("stop --now")).code, 0);
    xc.ok(&["nsdel", &i]);
    let left = command("ip").args(["netns", "list"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains("lodgetest_xcluster"));
}

#[test]
fn consoles_are_windows_of_tmux_or_here() {
    let mut xc = Xc::with_image();
    let sockets = xc.path("tmux");
    fs::create_dir_all(&sockets).unwrap();
    xc.set("TMUX_TMPDIR", sockets.to_str().unwrap());
    xc.set("__nvm", "1");
    xc.set("__nrouters", "0");
    xc.set("__kvm_opt", "-device something");
    let started = xc.says(&["starts"]);
    assert_eq!(started.code, 0, "{started:?}");
    assert!(started.err.contains("WARNING: __kvm_opt has no effect here"), "{started:?}");
    assert!(started.err.contains("Tmux session [xcluster-xc]"), "{started:?}");
    let tmux = |words: &[&str]| {
        let mut command = command("tmux");
        let output = command.args(words).env("TMUX_TMPDIR", &sockets).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let windows = tmux(&["list-windows", "-t", "xcluster-xc", "-F", "#{window_name}"]);
    assert_eq!(windows, "vm-001\n");
    xc.lab.until("the console in its window", || {
        tmux(&["send-keys", "-t", "xcluster-xc:vm-001", "hostname", "Enter"]);
        tmux(&["capture-pane", "-p", "-t", "xcluster-xc:vm-001"]).contains("\nvm-001\n")
    });
    // One more in the foreground, with arguments of its own, until it is ended elsewhere.
    let mut here = xc.command(&["boot_vm", "3", "extra=1"]);
    here.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut here = here.spawn().unwrap();
    let seen = lodge_vm_tests::lab::wait_for_text(&mut here, "vm-003 ");
    assert!(seen.contains("Xcluster starting..."), "{seen}");
    assert!(xc.rsh(3, "cat /proc/cmdline").contains(" extra=1"));
    xc.ok(&["scalein", "--now", "3"]);
    assert!(here.wait().unwrap().success());
    xc.ok(&["stop"]);
    assert_eq!(tmux(&["list-sessions"]), "");
}

/// Its kernel is in it, and stays when the image is extended; it boots with one beside it as well.
#[test]
fn an_image_may_boot_by_itself() {
    let mut xc = Xc::new();
    for (style, beside) in [("ext4", false), ("ext3", false), ("ext4", true)] {
        xc.ok(&["mkimage", "--bootable", "--size=500M", &format!("--fs={style}")]);
        xc.files("added", &[("etc/added", style)]);
        xc.ok(&["ximage", "added"]);
        // Only looked at where the image does not have one.
        let kernel = lodge_vm_tests::xcluster::kernel().0;
        xc.unset("__kbin");
        let bootable: &[&str] = match beside {
            true => &["boot_vm", "1"],
            false => &["boot_vm", "--bootable", "1"],
        };
        if beside {
            xc.set("__kbin", kernel.to_str().unwrap());
        }
        drop(xc.raw());
        let mut here = xc.command(bootable);
        here.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut here = here.spawn().unwrap();
        lodge_vm_tests::lab::wait_for_text(&mut here, "vm-001 ");
        assert_eq!(xc.rsh(1, "cat /etc/added"), style);
        let cmdline = xc.rsh(1, "cat /proc/cmdline");
        assert!(cmdline.contains("root=/dev/vda rw init=/init console=ttyS0"), "{cmdline}");
        assert_eq!(cmdline.contains("BOOT_IMAGE=/boot/bzImage"), !beside, "{cmdline}");
        xc.ok(&["scalein", "--now", "1"]);
        assert!(here.wait().unwrap().success());
        let said = xc.fails(&["boot_vm", "--bootable", "1", "word=1"]);
        assert!(said.contains("its kernel's words in it"), "{said}");
        xc.set("__kbin", kernel.to_str().unwrap());
    }
}

#[test]
fn a_node_that_does_not_answer_is_named_and_left_to_be_looked_at() {
    let mut xc = Xc::with_image();
    xc.files(
        "mute",
        &[(
            "etc/init.d/20sshd.rc",
            "#!/bin/sh\nmkdir -p /etc/dropbear; test \"$(hostname)\" = vm-001 || exec dropbear -B -R\n",
        )],
    );
    xc.ok(&["mkcdrom", "mute"]);
    xc.set("__nvm", "2");
    xc.set("__nrouters", "0");
    xc.set("__timeout", "25");
    let said = xc.fails(&["start"]);
    assert!(said.contains("vm-001: xc-vm-001 was not ready after 25 s"), "{said}");
    assert!(said.ends_with("ERROR: not up: vm-001\n"), "{said}");
    assert_eq!(xc.says(&["status", "--quiet"]).code, 2);
    xc.rsh(2, "true");
    xc.ok(&["stop", "--now"]);
}

#[test]
fn an_ordinary_user_has_clusters_too() {
    let mut xc = Xc::of_user(12_346);
    xc.ok(&["mkimage"]);
    xc.ok(&["ximage", "env"]);
    xc.ok(&["mkcdrom", "xnet"]);
    xc.set("__nvm", "2");
    xc.set("__nrouters", "0");
    // Ends when both answer.
    xc.ok(&["start"]);
    assert_eq!(xc.says(&["status", "--quiet"]).code, 2);
    let page = xc.says(&["nsenter", "9", "sh", "-c", "id -u; ip -o link"]);
    assert!(page.out.starts_with("0\n"), "{page:?}");
    xc.ok(&["nsdel", "9"]);
    xc.lab.type_and_see("xc-vm-001", "ping -c1 -W9 192.168.1.2\n", "1 packets received");
    xc.ok(&["stop", "--now"]);
}

#[test]
fn a_cluster_is_described_in_one_file() {
    let xc = Xc::with_image();
    let port = 19_000 + std::process::id() % 50 * 20;
    let text = format!(
        "name: lab\nimage: ws/xcluster/hd.img\nkernel: {}\noverlays: [env]\nnodes: 1\nrouters: 0\n\
         ssh_ports: {port}\ntelnet_ports: {}\nvms:\n  \"1\": {{ append: foo=1 }}\n",
        lodge_vm_tests::xcluster::kernel().0.display(),
        port + 10,
    );
    let file = xc.path("lab.yaml");
    fs::write(&file, text).unwrap();
    let mut start = xc.lab.command(&["cluster", "start", file.to_str().unwrap()]);
    start.env("XCLUSTER_WORKSPACE", xc.path("ws"));
    start.env("XCLUSTER_OVLPATH", lodge_vm_tests::xcluster::shipped());
    let started = start.output().unwrap();
    assert!(started.status.success(), "{started:?}");
    let machine = xc.lab.machine("lab-vm-001");
    assert_eq!(machine["state"], "running");
    assert!(xc.lab.ok(&["cluster", "status", "lab"]).starts_with("alive 1\n"));
    assert!(xc.lab.console_text("lab-vm-001").contains("foo=1"));
    xc.lab.ok(&["cluster", "stop", "lab"]);
    assert_eq!(xc.lab.state("lab-vm-001"), "absent");
    let odd = xc.path("odd.yaml");
    fs::write(&odd, "name: lab\nnods: 3\n").unwrap();
    let why = xc.lab.fails(&["cluster", "start", odd.to_str().unwrap()]);
    assert!(why.contains("unknown field `nods`"), "{why}");
}

trait Looks {
    fn ok_status(&self) -> String;
    fn reboots(&self, id: u8) -> usize;
}

impl Looks for Xc {
    /// What `status` prints; its exit status is a number.
    fn ok_status(&self) -> String {
        self.says(&["status"]).out
    }

    /// How often a node has begun.
    fn reboots(&self, id: u8) -> usize {
        let text = self.lab.console_text(&format!("xc-vm-{id:03}"));
        text.matches("Xcluster starting...").count()
    }
}

/// Packets as large as the nets carry, seen by a capture that is fetched.
#[test]
fn large_packets_cross_a_net_and_are_captured() {
    let mut xc = Xc::with_image();
    for (name, value) in [("__mtu", "9000"), ("__nvm", "2"), ("__nrouters", "0")] {
        xc.set(name, value);
    }
    xc.ok(&["mkcdrom", "env", "xnet"]);
    xc.ok(&["start"]);
    assert_eq!(xc.rsh(1, "cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu"), "9000\n9000\n");
    let capture = std::path::Path::new("/tmp/vm-001-eth1.pcap");
    let _ = fs::remove_file(capture);
    xc.ok(&["tcpdump", "--start", "1", "eth1", "icmp"]);
    xc.lab.until("the capture", || {
        let ping = xc.says(&["rsh", "2", "ping -c1 -W5 -s 8900 192.168.1.1"]);
        let written = xc.says(&["rsh", "1", "wc -c </tmp/vm-001-eth1.pcap"]).out;
        ping.code == 0 && written.trim().parse().is_ok_and(|bytes: u32| bytes > 8900)
    });
    // In one piece: nothing of it was cut up on the way.
    xc.ok(&["tcpdump", "--get", "1", "eth1"]);
    let bytes = fs::read(capture).unwrap();
    fs::remove_file(capture).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_c3d4_u32.to_le_bytes());
    let mut records = Vec::new();
    let mut rest = &bytes[24..];
    while let [_, _, _, _, _, _, _, _, a, b, c, d, tail @ ..] = rest {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        records.push(length);
        rest = &tail[4 + length..];
    }
    // Ethernet, IP and ICMP before what was sent.
    assert!(records.contains(&(14 + 20 + 8 + 8900)), "{records:?}");
    let missing = xc.fails(&["tcpdump", "--get", "1", "eth7"]);
    assert!(missing.contains("/tmp/vm-001-eth7.pcap could not be fetched"), "{missing}");
    xc.ok(&["stop"]);
}

#[test]
fn overlays_are_injected_into_what_runs() {
    let mut xc = Xc::with_image();
    xc.set("__nvm", "1");
    xc.set("__nrouters", "0");
    xc.ok(&["start"]);
    xc.files("injected", &[("etc/who", "injected"), ("opt/deep/down/file", "there")]);
    // Any host that ssh knows its way to; here by a configuration of its own.
    let port = 1 + xc.variable("XCLUSTER_SSH_BASE").parse::<u32>().unwrap();
    let config = xc.path("ssh.conf");
    let text = format!(
        "Host node\nUser root\nHostName 127.0.0.1\nPort {port}\nBatchMode yes\n\
         StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
    );
    fs::write(&config, text).unwrap();
    let bin = xc.path("bin");
    fs::create_dir_all(&bin).unwrap();
    let script = format!("#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n", config.display());
    fs::write(bin.join("ssh"), script).unwrap();
    fs::set_permissions(bin.join("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    xc.set("PATH", &format!("{}:{path}", bin.display()));
    xc.ok(&["inject", "--addr=node", "--sudo=", "template", "injected"]);
    assert_eq!(xc.rsh(1, "cat /etc/who /opt/deep/down/file"), "injectedthere");
    assert_eq!(xc.rsh(1, "template_test tcase_version"), "template on vm-001\n");
    // A node has no sudo, and says so; an overlay that is not there is not sent.
    let said = xc.fails(&["inject", "--addr=node", "injected"]);
    assert!(
        said.contains("sudo: not found") && said.contains("injected: ssh node ended"),
        "{said}"
    );
    assert!(xc.fails(&["inject", "--addr=node", "--sudo=", "absent"]).contains("absent"));
    assert!(xc.fails(&["inject", "injected"]).contains("No address; say --addr=user@host"));
    xc.ok(&["stop", "--now"]);
}
