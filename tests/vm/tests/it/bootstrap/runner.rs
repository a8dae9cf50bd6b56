//! The runner in a guest whose init is busybox, against a server that does everything wrong, over
//! the line of QEMU that people type. Many cases share a guest: each has a folder and a path of its
//! own.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use lodge_vm_tests::assets;
use lodge_vm_tests::bootstrap::{Asked, Qemu, Reply, Web, runner, status};
use lodge_vm_tests::lab::{command, program};

/// What the server says when it is asked for a script for the nth time, from 0.
type Answer = fn(usize) -> Reply;

struct Case {
    name: &'static str,
    /// Files beside the usual ones; a name that begins with `-` is one that is taken away.
    files: &'static [(&'static str, &'static str)],
    answer: Answer,
    /// What the guest does in the case's folder before, in the words of its shell.
    before: &'static str,
}

fn ok(text: &str) -> Reply {
    Reply::Ok(text.into())
}

const FAIL: &str = "echo failing\nexit 7\n";

const CASES: &[Case] = &[
    Case { name: "g1", files: &[], answer: |_| ok("echo said by the script\n"), before: "" },
    Case {
        name: "g2",
        files: &[],
        answer: |_| ok("n=$(cat n); n=$((n+1)); echo $n > n; [ $n -gt 3 ]\n"),
        before: "echo 0 > n",
    },
    Case { name: "g3", files: &[], answer: |_| ok(FAIL), before: "" },
    // No script for a while, also with errors of every kind; then one.
    Case {
        name: "g4",
        files: &[],
        answer: |n| match n {
            0 => status(404, b"exit 0\n"),
            1 => status(500, b"exit 0\n"),
            2 => Reply::Close,
            _ => ok("echo at last\n"),
        },
        before: "",
    },
    Case {
        name: "g6",
        files: &[("bootstrap-max-retry", "a[$(touch injected)]")],
        answer: |_| ok(FAIL),
        before: "",
    },
    Case { name: "g6b", files: &[("bootstrap-max-retry", "02")], answer: |_| ok(FAIL), before: "" },
    Case { name: "g6c", files: &[("-bootstrap-max-retry", "")], answer: |_| ok(FAIL), before: "" },
    Case {
        name: "g7",
        files: &[],
        answer: |_| ok("echo 1 > bootstrap-max-retry\nexit 3\n"),
        before: "",
    },
    Case {
        name: "g8",
        files: &[],
        answer: |n| match n {
            0 => ok("rm start-bootstrap\nexit 4\n"),
            _ => ok("echo resumed\n"),
        },
        before: "(sleep 8; cat retry-amount > held; touch start-bootstrap) &",
    },
    Case { name: "g9", files: &[("require-script", "")], answer: |_| ok(""), before: "" },
    Case {
        name: "g10",
        files: &[],
        answer: |_| Reply::Ok(b"printf 'raw \xff\xfe bytes\\n'\n# \xc3\x28\nexit 0\n".to_vec()),
        before: "",
    },
    Case {
        name: "g11a",
        files: &[("bootstrap-max-retry", "1")],
        answer: |_| ok("#!/bin/sh\r\nexit 0\r\n"),
        before: "",
    },
    Case {
        name: "g11b",
        files: &[("bootstrap-max-retry", "1")],
        answer: |_| Reply::Ok(b"\x7fELF\x02\x01\x01\0\0".to_vec()),
        before: "",
    },
    Case {
        name: "g11c",
        files: &[("bootstrap-max-retry", "1")],
        answer: |_| ok("<!DOCTYPE html>\n<html></html>\n"),
        before: "",
    },
    Case {
        name: "g11d",
        files: &[],
        answer: |_| ok("#!/bin/awk -f\nBEGIN { print \"said by awk\" }\n"),
        before: "",
    },
    Case {
        name: "g12",
        files: &[],
        answer: |n| match n {
            0 => Reply::Raw(
                b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\ntouch half-was-run\n".to_vec(),
            ),
            _ => ok("echo whole\n"),
        },
        before: "",
    },
    Case {
        name: "g13",
        files: &[],
        answer: |n| {
            match n {
            0 => Reply::Raw(b"HTTP/1.0 200 OK\r\n\r\ntouch half-was-run\n".to_vec()),
            // Its end is told, but it is not what it was.
            1 => Reply::Raw(
                b"HTTP/1.0 200 OK\r\nContent-Length: 19\r\nRepr-Digest: sha-256=:LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE=:\r\n\r\ntouch half-was-run\n"
                    .to_vec(),
            ),
            _ => ok("echo whole\n"),
        }
        },
        before: "",
    },
    Case {
        name: "g16",
        files: &[],
        answer: |_| ok("echo with room\n"),
        before: "dd if=/dev/zero of=/small/fill bs=1k 2>/dev/null; (sleep 6; runs=$(cat retry-amount); rm /small/fill; echo $runs > held) &",
    },
    Case { name: "g17", files: &[], answer: |_| ok("sleep 6\n"), before: "" },
    Case {
        name: "g18",
        files: &[],
        answer: |_| ok("echo not held up\n"),
        before: "echo 1 > lock; echo 1 > /tmp/pidLockFile",
    },
    Case {
        name: "timeout",
        files: &[
            ("bootstrap-timeout", "2"),
            ("bootstrap-max-retry", "1"),
            ("bootstrap-env", "GREETING=hello\n"),
        ],
        answer: |_| ok("echo $GREETING there; sleep 100\n"),
        before: "",
    },
];

/// What the guest does, case by case, and what it shows at the end.
fn script() -> String {
    let mut text = String::from(
        "mkdir -p /root /small\nmount -t ext4 /dev/vda /root\nmount -t tmpfs -o size=256k none /small\n\
         cp -r /root/g16/. /small/; rm -r /root/g16; ln -s /small /root/g16\n\
         cat > /case <<'END'\ncd /root/$1\n/root/runner --dir . --log log --lock lock --url \
         http://10.0.2.100/$1 run </dev/null\necho $? > status\nEND\n\
         chmod +x /root/runner\n\
         # Without an interface at first: nothing is counted, nothing hangs.\n\
         (sh /case g20) & sleep 2\n\
         echo G20-RUNS $(cat /root/g20/retry-amount) $(grep -c waiting /root/g20/log)\n\
         ip link set lo up; ip link set eth0 up; udhcpc -q -n -i eth0 -s /dhcp\n",
    );
    for case in CASES {
        let (name, before) = (case.name, case.before);
        let _ = write!(text, "cd /root/{name}; {before}\n(sh /case {name}) &\n");
    }
    text += "sleep 3; cd /root/g17; /root/runner --dir . --log log --lock lock --url http://10.0.2.100/g17 run; \
             echo G17-SECOND $?; grep -c '^[^ ]* run ' log\n\
             wait\n\
             nc -w 2 10.0.2.2 $(sed 's/.*port=\\([0-9]*\\).*/\\1/' /proc/cmdline) </dev/null && echo LOOPBACK-REACHED\n";
    let names = CASES.iter().map(|c| c.name).chain(["g20"]).collect::<Vec<_>>().join(" ");
    let _ = write!(
        text,
        "for c in {names}; do cd /root/$c; echo \"CASE $c status=$(cat status) runs=$(cat retry-amount) \
         outcome=$(cat outcome)\"; sed \"s/^/$c| /\" log; [ -e held ] && echo \"HELD $c $(cat held)\"; \
         [ -e half-was-run ] && echo HALF; [ -e injected ] && echo INJECTED; done\n\
         echo ALL-CASES-DONE\nsh\n"
    );
    text
}

/// A disk with a folder for each case.
fn disk(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(&root).unwrap();
    fs::copy(runner(), root.join("runner")).unwrap();
    let g20 = Case { name: "g20", files: &[], answer: |_| ok(""), before: "" };
    for case in CASES.iter().chain([&g20]) {
        let folder = root.join(case.name);
        fs::create_dir_all(&folder).unwrap();
        let usual = [
            ("bootstrap-max-retry", "10\n"),
            ("retry-amount", "0\n"),
            ("start-bootstrap", ""),
            ("bootstrap-pause", "0\n"),
        ];
        for (name, text) in usual.iter().chain(case.files) {
            match name.strip_prefix('-') {
                Some(name) => fs::remove_file(folder.join(name)).unwrap(),
                None => fs::write(folder.join(name), text).unwrap(),
            }
        }
    }
    let disk = dir.join("disk.img");
    let mut lodge = command(program());
    lodge.args(["image", "make"]).arg(&root).arg(&disk).args(["--size", "64MB"]);
    assert!(lodge.env("LODGE_HOME", dir).status().unwrap().success());
    disk
}

fn answer(asked: &Asked) -> Reply {
    let case = CASES.iter().find(|case| asked.path == format!("/{}", case.name));
    match case {
        Some(case) => (case.answer)(asked.before),
        None if asked.path == "/g20" => ok("echo with a network\n"),
        None => status(404, b""),
    }
}

/// What a case left: its line, and its log.
fn case<'a>(text: &'a str, name: &str) -> (&'a str, String) {
    let line = text.lines().find(|l| l.starts_with(&format!("CASE {name} "))).unwrap_or_default();
    let log = text.lines().filter_map(|l| l.strip_prefix(&format!("{name}| ")));
    (line.trim_end(), log.map(|l| format!("{l}\n")).collect())
}

#[test]
fn cases_g1_to_g18_and_g20_and_h4_in_a_guest_of_busybox() {
    let dir = tempfile::tempdir().unwrap();
    let web = Web::new(answer);
    let disk = disk(dir.path());
    let (kernel, initrd) = (assets::kernel(), assets::guest(&script()));
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let append = format!("console=ttyS0 quiet cryptomgr.notests no_timer_check port={}", web.port);
    let args = ["-kernel", &kernel, "-initrd", &initrd, "-append", &append, "-drive", &drive];
    // Restricted, it still reaches its script and nothing else.
    let guest = Qemu::start(dir.path(), Some((web.port, true)), &args);
    let text = guest.until("ALL-CASES-DONE").replace('\r', "");
    let expect = |name: &str, line: &str, words: &[&str]| {
        let (found, log) = case(&text, name);
        assert_eq!(found, format!("CASE {name} {line}"), "{log}");
        for word in words {
            assert!(log.contains(word), "{name}: {word:?} is not in\n{log}");
        }
        log
    };
    let times = |log: &str, word: &str| log.matches(word).count();
    expect("g1", "status=0 runs=1 outcome=succeeded", &["said by the script"]);
    let log = expect("g2", "status=0 runs=4 outcome=succeeded", &[]);
    assert_eq!(times(&log, "ERROR: bootstrap script exited with return code 1."), 3, "{log}");
    let log = expect("g3", "status=7 runs=10 outcome=given-up", &["retry amount reached"]);
    assert_eq!(times(&log, "failing"), 10, "{log}");
    let log = expect("g4", "status=0 runs=1 outcome=succeeded", &["404", "500", "at last"]);
    assert_eq!(times(&log, "waiting for a script"), 3, "{log}");
    expect("g6", "status=7 runs=10 outcome=given-up", &["warning: bootstrap-max-retry holds"]);
    assert!(!text.contains("INJECTED"));
    expect("g6b", "status=7 runs=2 outcome=given-up", &[]);
    expect("g6c", "status=7 runs=10 outcome=given-up", &["warning: bootstrap-max-retry cannot"]);
    expect("g7", "status=3 runs=1 outcome=given-up", &[]);
    expect("g8", "status=0 runs=2 outcome=succeeded", &["resumed", "nothing runs until it is"]);
    assert!(text.contains("HELD g8 1"), "{text}");
    let log = expect("g9", "status=1 runs=10 outcome=given-up", &["the script is empty"]);
    assert_eq!(times(&log, "return code 1."), 10, "{log}");
    expect("g10", "status=0 runs=1 outcome=succeeded", &["raw "]);
    expect("g11a", "status=2 runs=1 outcome=given-up", &["CR LF"]);
    expect("g11b", "status=126 runs=1 outcome=given-up", &["ELF"]);
    expect("g11c", "status=2 runs=1 outcome=given-up", &["HTML"]);
    expect("g11d", "status=0 runs=1 outcome=succeeded", &["said by awk"]);
    expect("g12", "status=0 runs=1 outcome=succeeded", &["whole"]);
    let log = expect("g13", "status=0 runs=1 outcome=succeeded", &["does not say how long"]);
    assert!(log.contains("digest is not the one that its server gives"), "{log}");
    assert!(!text.contains("HALF\n"));
    expect("g16", "status=0 runs=1 outcome=succeeded", &["with room"]);
    assert!(text.contains("HELD g16 0"), "{text}");
    expect("g17", "status=0 runs=1 outcome=succeeded", &[]);
    assert!(text.contains("G17-SECOND 0"));
    expect("g18", "status=0 runs=1 outcome=succeeded", &["not held up"]);
    expect("timeout", "status=137 runs=1 outcome=given-up", &["hello there", "took longer"]);
    assert!(text.contains("G20-RUNS 0 1"), "{text}");
    expect("g20", "status=0 runs=1 outcome=succeeded", &["with a network"]);
    assert!(!text.contains("LOOPBACK-REACHED"), "{text}");
}

#[test]
fn cases_g5_g14_and_g15_across_boots_and_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let web = Web::new(|asked: &Asked| match asked.before {
        // Not there at first, as a helper that cannot connect.
        0..3 => Reply::Close,
        // Twice it does not come to its end.
        _ => ok("sync; [ $(cat retry-amount) = 3 ] && exit 0\nreboot -f; sleep 100\n"),
    });
    let root = dir.path().join("root");
    fs::create_dir_all(&root).unwrap();
    fs::copy(runner(), root.join("runner")).unwrap();
    fs::write(root.join("start-bootstrap"), "").unwrap();
    fs::write(root.join("bootstrap-max-retry"), "10\n").unwrap();
    let disk = dir.path().join("disk.img");
    let mut lodge = command(program());
    lodge.args(["image", "make"]).arg(&root).arg(&disk).args(["--size", "64MB"]);
    assert!(lodge.env("LODGE_HOME", dir.path()).status().unwrap().success());
    let initrd = assets::guest(
        "mkdir -p /root; mount -t ext4 /dev/vda /root; cd /root; echo BOOT-WITH $(cat retry-amount)\n\
         ip link set eth0 up; udhcpc -q -n -i eth0 -s /dhcp; chmod +x runner\n\
         ./runner --dir . --log log --lock /lock --url http://10.0.2.100/vm-bootstrap run\n\
         echo ENDED $? runs=$(cat retry-amount) waits=$(grep -c waiting log)\n\
         # From here on it writes without end, until it is cut off.\n\
         while :; do ./runner --dir . rearm; ./runner --dir . disarm; n=$((n+1)); [ $n = 3 ] && echo WRITING; done\n",
    );
    let kernel = assets::kernel();
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let append = "console=ttyS0 quiet cryptomgr.notests no_timer_check";
    let args = ["-kernel", &kernel, "-initrd", &initrd, "-append", append, "-drive", &drive];
    let guest = Qemu::start(dir.path(), Some((web.port, false)), &args);
    let text = guest.until("WRITING");
    assert!(text.contains("ENDED 0 runs=3 waits=1"), "{text}");
    for boot in ["BOOT-WITH\r", "BOOT-WITH 1", "BOOT-WITH 2"] {
        assert!(text.contains(boot), "{boot}: {text}");
    }
    // The power goes in the middle of it. What is there afterwards is whole.
    std::thread::sleep(std::time::Duration::from_millis(700));
    drop(guest);
    let look = assets::guest(
        "mkdir -p /root; mount -t ext4 /dev/vda /root; cd /root\n\
         echo AMOUNT \"<$(cat retry-amount)>\" \"<$(cat outcome 2>/dev/null)>\"\nsh\n",
    );
    let args =
        ["-kernel", &kernel, "-initrd", &look, "-append", append, "-drive", &drive, "-snapshot"];
    let text = Qemu::start(dir.path(), None, &args).until(">\r\n").replace('\r', "");
    let whole = ["AMOUNT <0> <disarmed>", "AMOUNT <0> <>"];
    assert!(whole.iter().any(|line| text.contains(line)), "{text}");
}
