//! Networks: addresses, names, ports, and what does not get out.

use std::io::{Read, Write};
use std::net::TcpStream;

use lodge_vm_tests::{Lab, assets};

fn run(lab: &Lab, name: &str, more: &[&str]) {
    lab.boot(name, &assets::networked(), more);
}

fn get(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}

#[test]
fn machines_get_addresses_find_each_other_and_are_reached() {
    let lab = Lab::new();
    std::thread::scope(|scope| {
        scope.spawn(|| run(&lab, "web", &["--port", "18431:80"]));
        scope.spawn(|| run(&lab, "client", &[]));
    });
    let address = lab.machine("web")["address"].as_str().unwrap().to_owned();
    assert!(lab.console_text("web").contains(&format!("DHCP-GOT {address}")));
    let page = get(18431);
    assert!(page.contains(&format!("served-by-{address}")), "{page}");
    lab.type_and_see("client", "wget -q -O - http://web/\n", &format!("served-by-{address}"));
    lab.type_and_see("client", "ping -c 1 web.lodge | tail -3\n", "0% packet loss");
    // Names that nobody has are answered at once, not passed on.
    lab.type_and_see("client", "nslookup nobody.lodge; echo looked-$((1 + 1))\n", "looked-2");
    assert!(lab.console_text("client").contains("NXDOMAIN"));
    // The same by TCP: a length, a question for `web.lodge`, and the address ends the answer.
    let question = "\\000\\033\\022\\064\\001\\000\\000\\001\\000\\000\\000\\000\\000\\000\\003web\\005lodge\\000\\000\\001\\000\\001";
    let ask =
        format!("printf '{question}' | nc 10.0.2.3 53 | tail -c 4 | od -An -tu1 | tr -s ' '\n");
    lab.type_and_see("client", &ask, &address.replace('.', " "));
    // Ports belong to the machine: they close with it.
    lab.ok(&["stop", "web", "--force"]);
    assert!(TcpStream::connect("127.0.0.1:18431").is_err());
    lab.ok(&["start", "web", "--wait", "ready"]);
    assert_eq!(lab.machine("web")["address"], address.as_str(), "an address is kept");
    assert!(get(18431).contains("served-by-"));
}

#[test]
fn networks_do_not_meet_and_the_host_is_not_reached() {
    let lab = Lab::new();
    let listener = std::net::TcpListener::bind("0.0.0.0:18432").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| run(&lab, "one", &["--net", "blue"]));
        scope.spawn(|| run(&lab, "two", &["--net", "red"]));
    });
    let other = lab.machine("two")["address"].as_str().unwrap().to_owned();
    let ask =
        |text: &str| lab.type_and_see("one", &format!("{text} || echo not-$((2 + 2))\n"), "not-4");
    ask(&format!("ping -c 1 -W 2 {other} >/dev/null"));
    ask("wget -T 2 -q -O - http://two/");
    let gateway = "$(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p')";
    ask(&format!("nc -w 2 {gateway} 18432 </dev/null"));
    // The host's end of the link, which routes the guests' packets, takes none for itself.
    let links = lodge_vm_tests::lab::command("ip").args(["-br", "-4", "addr"]).output().unwrap();
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    let link = links.lines().find(|l| l.split('@').next().unwrap().ends_with("-blue")).unwrap();
    let address = link.split_whitespace().nth(2).unwrap().split('/').next().unwrap();
    ask(&format!("nc -w 2 {address} 18432 </dev/null"));
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "somebody got through");
}

/// One that hears nothing for a while, as when its host is busy, is not taken for one that is gone.
#[test]
fn who_comes_while_a_machine_pauses_is_heard_afterwards() {
    let lab = Lab::new();
    run(&lab, "web", &["--port", "18438:80"]);
    lab.ok(&["pause", "web"]);
    let page = std::thread::scope(|scope| {
        let page = scope.spawn(|| get(18438));
        // Longer than the host goes by what it may know of its neighbour without asking.
        std::thread::sleep(std::time::Duration::from_secs(7));
        lab.ok(&["resume", "web"]);
        page.join().unwrap()
    });
    assert!(page.contains("served-by-"), "{page:?}");
}

#[test]
fn readiness_can_be_a_lease_or_an_open_port() {
    let lab = Lab::new();
    let (kernel, initrd) = (assets::kernel(), assets::networked());
    for (name, ready) in [("lease", "dhcp"), ("port", "port:80")] {
        lab.ok(&[
            "run",
            "--name",
            name,
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--append",
            "console=ttyS0 quiet cryptomgr.notests",
            "--memory",
            "256MiB",
            "--ready",
            ready,
            "--wait",
            "ready",
            "--timeout",
            "170",
        ]);
        assert_eq!(lab.machine(name)["ready"], true);
        // The lease is given before the guest can say that it has it.
        lab.until("its address", || lab.console_text(name).contains("DHCP-GOT"));
        lab.ok(&["stop", name, "--force"]);
    }
    let late = lab.run(&[
        "run",
        "--name",
        "never",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--append",
        "console=ttyS0 quiet cryptomgr.notests",
        "--memory",
        "256MiB",
        "--ready",
        "port:81",
        "--wait",
        "ready",
        "--timeout",
        "1",
    ]);
    assert_eq!(late.status.code(), Some(124));
    let complaint = String::from_utf8_lossy(&late.stderr).into_owned();
    assert!(complaint.contains("never was not ready after 1 s"), "{complaint}");
}
