//! Machines whose root is an flist, with real guests: what they see, what they write, and what
//! becomes of them when stores fail.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;

use lodge_vm_tests::lab::kill;
use lodge_vm_tests::zero_os::{Flist, text};
use lodge_vm_tests::{Lab, assets};

/// Refuses to start; what was said.
fn refused(lab: &Lab, flist: &Flist, more: &[&str]) -> String {
    let args = ["run", flist.path(), "--store", &flist.store, "--net", "none"];
    let complaint = lab.fails(&[&args[..], more].concat());
    assert_eq!(lab.json(&["ls", "-a"]), serde_json::json!([]), "nothing is left: {complaint}");
    complaint
}

/// An flist that is a whole disk boots from the machine's first one.
#[test]
fn a_whole_disk_goes_onto_the_first_disk() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "whole.flist", |root| {
        fs::remove_dir_all(root.join("boot")).unwrap();
        let mut image = assets::boot_sector("booted-from-image\r\n");
        image.resize(3 << 20, 0);
        image[2 << 20] = 7;
        fs::write(root.join("image.raw"), image).unwrap();
    });
    let document = |name: &str, more: &str| {
        let (source, store) = (flist.path(), &flist.store);
        let file = lab.home().join(format!("{name}.yaml"));
        let text = format!(
            "name: {name}\nflist: {{source: {source}, store: '{store}'}}\nmemory: 64MiB\nnics: []\n\
             ready: console:booted-from\n{more}\n"
        );
        fs::write(&file, text).unwrap();
        file
    };
    let create = |name: &str, more: &str| lab.ok(&["create", text(&document(name, more))]);
    let boots = |name: &str, what: &str| {
        lab.ok(&["start", name, "--wait", "ready", "--timeout", "100"]);
        assert!(lab.console_text(name).contains(what), "{}", lab.console_text(name));
        lab.ok(&["stop", "--force", name]);
    };
    // A layer above it, as large as was asked for; the second start takes nothing out again.
    create("blank", "disks: [{size: 8MiB}]");
    boots("blank", "booted-from-image");
    let id = lab.machine("blank")["id"].as_str().unwrap().to_owned();
    let kept = lab.home().join(format!("machines/{id}/image.raw"));
    assert_eq!(fs::metadata(&kept).unwrap().len(), 8 << 20);
    let taken = fs::metadata(&kept).unwrap().modified().unwrap();
    boots("blank", "booted-from-image");
    assert_eq!(fs::metadata(&kept).unwrap().modified().unwrap(), taken);
    // A disk of the host's is written to, and only while there is nothing on it.
    let own = lab.home().join("own.raw");
    fs::File::create(&own).unwrap().set_len(4 << 20).unwrap();
    create("own", &format!("disks: [{{source: {}}}]", own.display()));
    boots("own", "booted-from-image");
    let bytes = fs::read(&own).unwrap();
    assert_eq!((bytes[510], bytes[2 << 20], bytes.len()), (0x55, 7, 4 << 20));
    fs::write(&own, {
        let mut other = assets::boot_sector("booted-from-mine\r\n");
        other.resize(4 << 20, 0);
        other
    })
    .unwrap();
    boots("own", "booted-from-mine");
    // What cannot hold it, or has nothing to do with it, is refused.
    for (more, why) in [
        ("disks: []", "the flist holds a whole disk, /image.raw; the machine needs one"),
        ("disks: [{size: 1MiB}]", "has 3145728 bytes, and the machine's first disk 1048576"),
        ("disks: [{size: 8MiB}]\nboot: {cmdline: quiet}", "and has no command line"),
    ] {
        let refused = lab.fails(&["create", text(&document("not", more))]);
        assert!(refused.contains(why), "{more}: {refused}");
    }
}

#[test]
fn the_guest_sees_a_root_that_it_can_write_to() {
    let lab = Lab::new();
    for name in ["a.flist", "a.fl"] {
        let flist = Flist::new(&lab, name, |_| {});
        flist.boot(&lab, "a", &[]);
        assert!(lab.console_text("a").contains("hello from the flist"));
        // Everything that a file system has to do, by whoever is root there.
        lab.type_and_see(
            "a",
            "cd /tmp && echo one > f && chown 12:34 f && chmod 4750 f && ln f g && ln -s f l && \
             mknod n c 1 3 && mkfifo p && mkdir d && mv g d/ && stat -c '%a %u %g %h %s' f && \
             stat -c '%F %t %T' n && stat -c %F p && readlink l && cat d/g && echo FIRST-$?\n",
            "FIRST-0",
        );
        let seen = lab.console_text("a");
        for line in ["4750 12 34 2 4", "character special file 1 3", "fifo"] {
            assert!(seen.contains(line), "{line}: {seen}");
        }
        lab.type_and_see(
            "a",
            "rm /etc/hello; mv /srv /moved; echo x | dd of=/moved/big bs=1 seek=600000 \
             conv=notrunc 2>/dev/null; md5sum /moved/big; rm -r /www; ls /; sync; echo SECOND-$?\n",
            "SECOND-0",
        );
        let sum = sum_in(&lab.console_text("a"));
        lab.ok(&["stop", "a", "--force"]);
        // What was written is the machine's, and is there again; the flist is as it was.
        lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
        lab.type_and_see(
            "a",
            "md5sum /moved/big; cat /tmp/f; stat -c '%a %u %g' /tmp/f; ls /etc/hello /www; echo \
             THIRD-$?\n",
            "THIRD-1",
        );
        let seen = lab.console_text("a");
        assert_eq!(sum_in(&seen), sum, "{seen}");
        flist.boot(&lab, "b", &[]);
        assert!(lab.console_text("b").contains("hello from the flist"));
        lab.ok(&["rm", "--force", "a"]);
        lab.ok(&["rm", "--force", "b"]);
    }
}

#[test]
fn the_same_root_over_virtio_fs() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.fl", |root| {
        // By the newer convention.
        fs::remove_file(root.join("boot/boot.yaml")).unwrap();
    });
    let args = ["run", flist.path(), "--name", "a", "--memory", "256MiB", "--store", &flist.store];
    let ready = ["--net", "none", "--ready", "console:GUEST-READY", "--wait", "ready"];
    lab.ok(&[&args[..], &ready, &["--append", "init=/sbin/init", "--timeout", "170"]].concat());
    lab.type_and_see(
        "a",
        "cd /tmp && echo one > f && chown 12:34 f && chmod 4750 f && ln f g && mknod n c 1 3 && \
         mv /srv /moved && echo x | dd of=/moved/big bs=1 seek=600000 conv=notrunc 2>/dev/null; \
         stat -c '%a %u %g %h %s' f; stat -c '%F %t %T' n; md5sum /moved/big; grep virtiofs \
         /proc/mounts; sync; echo FIRST-$?\n",
        "FIRST-0",
    );
    let seen = lab.console_text("a");
    for line in ["4750 12 34 2 4", "character special file 1 3", "vroot / virtiofs rw"] {
        assert!(seen.contains(line), "{line}: {seen}");
    }
    let sum = sum_in(&seen);
    lab.ok(&["stop", "a", "--force"]);
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
    lab.type_and_see("a", "md5sum /moved/big; cat /tmp/g; ls /srv; echo SECOND-$?\n", "SECOND-1");
    assert_eq!(sum_in(&lab.console_text("a")), sum);
}

#[test]
fn the_same_root_as_a_disk() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |root| {
        std::os::unix::fs::chown(root.join("etc/hello"), Some(55), Some(66)).unwrap();
    });
    let document = serde_json::json!({
        "name": "a", "memory": "256MiB", "nics": [], "ready": "console:GUEST-READY",
        "flist": {"source": flist.path(), "store": flist.store, "transport": "disk"},
        "files": [{"path": "/etc/put", "content": "put in\n"}],
    });
    let file = lab.home().join("machine.json");
    fs::write(&file, document.to_string()).unwrap();
    lab.ok(&["create", text(&file)]);
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
    lab.type_and_see(
        "a",
        "stat -c '%a %u %g' /etc/hello; cat /etc/put; grep ' / ' /proc/mounts; md5sum /srv/big; \
         echo kept > /root/kept; sync; echo FIRST-$?\n",
        "FIRST-0",
    );
    let seen = lab.console_text("a");
    for line in ["644 55 66", "put in", "ext4"] {
        assert!(seen.contains(line), "{line}: {seen}");
    }
    lab.ok(&["stop", "a", "--force"]);
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
    lab.type_and_see("a", "cat /root/kept; echo SECOND-$?\n", "SECOND-0");
    assert!(lab.console_text("a").contains("kept\r\n"));
}

#[test]
fn an_ordinary_users_root_has_owners_too() {
    let lab = Lab::of_user(1234);
    for name in ["a.flist", "a.fl"] {
        let flist = Flist::new(&lab, name, |root| {
            if name == "a.fl" {
                fs::remove_file(root.join("boot/boot.yaml")).unwrap();
            }
            std::os::unix::fs::chown(root.join("etc/hello"), Some(55), Some(66)).unwrap();
        });
        flist.boot(&lab, "a", &["--append", "init=/sbin/init"]);
        lab.type_and_see(
            "a",
            "cd /tmp && echo one > f && chown 12:34 f && chmod 4750 f && mknod n c 1 3 && stat -c \
             '%a %u %g' f /etc/hello && stat -c %F n; echo FIRST-$?\n",
            "FIRST-0",
        );
        let seen = lab.console_text("a");
        assert!(seen.contains("4750 12 34\r\n644 55 66\r\ncharacter special file"), "{seen}");
        lab.ok(&["rm", "--force", "a"]);
    }
}

/// The last MD5 digest that was printed.
fn sum_in(text: &str) -> String {
    let mut lines = text.lines().filter(|l| l.ends_with("/moved/big") && l.len() > 40);
    lines.next_back().map(|l| l[..32].to_owned()).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn files_are_put_in_before_it_boots_case_19() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |root| {
        fs::remove_file(root.join("boot/boot.yaml")).unwrap();
        fs::rename(root.join("boot/vmlinuz"), root.join("boot/kernel")).unwrap();
        // It leads out only for those who follow it on the host.
        symlink("/boot/kernel", root.join("boot/link")).unwrap();
    });
    let complaint = refused(&lab, &flist, &[]);
    assert!(complaint.contains("failed to open boot/boot.yaml"), "{complaint}");
    let yaml = lab.home().join("boot.yaml");
    fs::write(&yaml, "kernel: boot/../boot/link\ncmdline: console=ttyS0 quiet cryptomgr.notests\n")
        .unwrap();
    let hello = lab.home().join("hello");
    fs::write(&hello, "hello from the host\n").unwrap();
    let boot = format!("/boot/boot.yaml={}", yaml.display());
    let hello = format!("/etc/hello={}", hello.display());
    let key = format!("/root/.ssh/authorized_keys={}", yaml.display());
    flist.boot(&lab, "a", &["--file", &boot, "--file", &hello, "--file", &key]);
    assert!(lab.console_text("a").contains("hello from the host"));
    lab.type_and_see(
        "a",
        "stat -c '%a %u' /root/.ssh /root/.ssh/authorized_keys /etc/hello; echo SEEN-$?\n",
        "SEEN-0",
    );
    let seen = lab.console_text("a");
    // What was there keeps its mode; what was made is root's alone.
    assert!(seen.contains("700 0\r\n600 0\r\n644 0"), "{seen}");
}

#[test]
fn what_boots_lies_within_the_root_cases_12_to_17() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.fl", |root| {
        symlink("/etc/shadow", root.join("boot/shadow")).unwrap();
        symlink("loop", root.join("boot/loop")).unwrap();
    });
    let with = |yaml: &str| {
        let file = lab.home().join("boot.yaml");
        fs::write(&file, yaml).unwrap();
        format!("/boot/boot.yaml={}", file.display())
    };
    for (yaml, why) in [
        ("- a\n- list\n", "boot/boot.yaml:"),
        ("kernel: [", "boot/boot.yaml:"),
        ("initrd: /x\n", "the key `kernel` is missing"),
        ("kernel: ../../../../etc/shadow\n", "kernel /etc/shadow: No such file"),
        ("kernel: /boot/shadow\n", "No such file"),
        ("kernel: /boot/loop\n", "too many symbolic links"),
        ("kernel: /boot\n", "it is not a file"),
        ("kernel: /boot/vmlinuz\ninitrd: /nowhere\n", "initrd /nowhere: No such file"),
    ] {
        let complaint = refused(&lab, &flist, &["--file", &with(yaml)]);
        assert!(complaint.contains(why), "{yaml}: {complaint}");
    }
    let cmdline = |yaml: &str| {
        let file = with(yaml);
        let args = ["-o", "json", "plan", flist.path(), "--store", &flist.store, "--net", "none"];
        let plan = lab.ok(&[&args[..], &["--file", &file]].concat());
        let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
        let argv = &plan["chosen"]["warden"]["jail"]["argv"];
        let argv: Vec<&str> = argv
            .as_array()
            .unwrap_or_else(|| panic!("{plan}"))
            .iter()
            .map(|a| a.as_str().unwrap())
            .collect();
        argv[argv.iter().position(|a| *a == "-append").unwrap() + 1].to_owned()
    };
    let kernel = "kernel: /boot/vmlinuz\n";
    assert_eq!(cmdline(&format!("{kernel}nodefault: true\ncmdline: a b\n")), "a b");
    // Where guest code is emulated, one word more stands at the end.
    let line = cmdline(&format!("{kernel}cmdline: console=ttyS0\n"));
    assert_eq!(
        line.strip_suffix(" no_timer_check").unwrap_or(&line),
        "rootfstype=9p rootflags=rw,trans=virtio,cache=loose root=root console=ttyS0"
    );
    // Planning leaves nothing.
    assert_eq!(fs::read_dir(lab.home().join("machines")).unwrap().count(), 0);
}

#[test]
fn files_cannot_be_put_where_files_cannot_be_case_18() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |root| {
        symlink("/srv", root.join("etc/away")).unwrap();
        symlink("/nowhere", root.join("etc/dangling")).unwrap();
    });
    let file = lab.home().join("file");
    fs::write(&file, "content\n").unwrap();
    for (path, why) in [
        ("/boot", "it is there and is not a file"),
        ("/etc/hello/x", "/etc/hello is not a directory"),
        ("/etc/dangling/x", "File exists"),
    ] {
        let complaint = refused(&lab, &flist, &["--file", &format!("{path}={}", file.display())]);
        assert!(complaint.contains(why), "{path}: {complaint}");
    }
    // A link to a directory is followed within the root.
    flist.boot(&lab, "a", &["--file", &format!("/etc/away/x={}", file.display())]);
    lab.type_and_see("a", "cat /srv/x; echo SEEN-$?\n", "SEEN-0");
    assert!(!Path::new("/srv/x").exists());
}

#[test]
fn bad_blocks_are_errors_in_the_guest_and_nowhere_else_case_25() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |_| {});
    flist.boot(&lab, "a", &[]);
    // What the start has not read is damaged: a bit, a name, a length.
    let cached = |block: &Path| {
        let name = block.file_name().unwrap().to_str().unwrap();
        let cache = lab.home().join("cache/flist/blocks/flist");
        cache.join(&name[..2]).join(name).exists()
    };
    let unread: Vec<_> = flist.blocks().into_iter().filter(|b| !cached(b)).collect();
    assert!(unread.len() >= 6, "{unread:?}");
    for (i, block) in unread.iter().enumerate() {
        match i % 3 {
            0 => {
                let mut bytes = fs::read(block).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 4;
                fs::write(block, bytes).unwrap();
            }
            1 => fs::remove_file(block).unwrap(),
            _ => fs::write(block, b"short").unwrap(),
        }
    }
    lab.type_and_see("a", "cat /srv/big > /dev/null; echo BAD-$?\n", "BAD-1");
    assert!(lab.console_text("a").contains("error"));
    let (kept, why): (Vec<_>, &str) = (unread.iter().filter(|b| cached(b)).collect(), "bad bytes");
    assert!(kept.is_empty(), "{why}: {kept:?}");
    lab.type_and_see("a", "cat /etc/hello > /dev/null; echo GOOD-$?\n", "GOOD-0");
    assert_eq!(lab.state("a"), "running");
    let log = fs::read_dir(lab.home().join("machines")).unwrap().next().unwrap().unwrap();
    let log = fs::read_to_string(log.path().join("flist.log")).unwrap();
    assert!(log.contains("srv/big: block") && log.contains("no such block"), "{log}");
}

#[test]
fn a_silent_store_is_an_error_in_bounded_time_and_others_are_asked_case_25() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.fl", |_| {});
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", silent.local_addr().unwrap());
    let begun = std::time::Instant::now();
    let args = ["run", flist.path(), "--store", &url, "--net", "none", "--name", "a"];
    let complaint = lab.fails(&args);
    assert!(complaint.contains("did not answer in time"), "{complaint}");
    assert!(begun.elapsed().as_secs() < 60, "bounded");
    // With another store behind it everything is there.
    let (dir, file) = (flist.dir.join("web"), flist.dir.join("both.fl"));
    fs::create_dir_all(&dir).unwrap();
    fs::rename(flist.dir.join("blocks"), dir.join("blocks")).unwrap();
    let nginx = lodge_vm_tests::zero_os::Server::nginx(&dir);
    let route = format!("http://127.0.0.1:{}/blocks", nginx.port);
    lab.ok(&["flist", "merge", flist.path(), "--out", text(&file), "--route", &route]);
    let two = Flist { dir: flist.dir.clone(), file, store: url };
    two.boot(&lab, "b", &[]);
    assert!(lab.console_text("b").contains("hello from the flist"));
}

#[test]
fn the_cache_is_everybodys_and_nobody_is_believed_cases_29_30_35() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |_| {});
    flist.boot(&lab, "a", &[]);
    let sum = "md5sum /srv/big; echo SUM-$?\n";
    lab.type_and_see("a", sum, "SUM-0");
    let expected =
        lab.console_text("a").lines().find(|l| l.ends_with("/srv/big")).unwrap().to_owned();
    lab.ok(&["rm", "--force", "a"]);
    // The store is gone; all that is needed is here.
    let away = flist.dir.join("away");
    fs::rename(flist.dir.join("blocks"), &away).unwrap();
    flist.boot(&lab, "b", &[]);
    lab.type_and_see("b", sum, "SUM-0");
    assert!(lab.console_text("b").contains(&expected));
    lab.ok(&["rm", "--force", "b"]);
    // What lies in the cache was changed behind our back: every file of it.
    let mut changed = 0;
    for folder in fs::read_dir(lab.home().join("cache/flist/blocks/flist")).unwrap().flatten() {
        for file in fs::read_dir(folder.path()).unwrap().flatten() {
            let mut bytes = fs::read(file.path()).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(file.path(), bytes).unwrap();
            changed += 1;
        }
    }
    assert!(changed > 5);
    fs::rename(&away, flist.dir.join("blocks")).unwrap();
    flist.boot(&lab, "c", &[]);
    // While it reads, the daemon dies; the guest does not notice.
    let mut console = lab.attach("c");
    console.stdin.as_mut().unwrap().write_all(sum.as_bytes()).unwrap();
    lab.kill_daemon();
    lodge_vm_tests::lab::wait_for_text(&mut console, "SUM-0");
    lodge_vm_tests::lab::end(console);
    assert!(lab.console_text("c").contains(&expected));
}

#[test]
fn the_process_that_serves_the_root_has_nothing() {
    let lab = Lab::new();
    let flist = Flist::new(&lab, "a.flist", |_| {});
    flist.boot(&lab, "a", &[]);
    let pid = server_of(&lab);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        (field("CapEff:"), field("NoNewPrivs:"), field("Seccomp:")),
        ("0000000000000000".into(), "1".into(), "2".into())
    );
    assert!(!field("Uid:").split(' ').any(|uid| uid == "0"), "{status}");
    // A stranger's flist does not lead to this host's files.
    let args = ["run", flist.path(), "--net", "none", "--name", "b"];
    let complaint = lab.fails(&args);
    assert!(complaint.contains("is on this host"), "{complaint}");
    // Its end is noticed, and does not take the machine along.
    kill(pid, 9);
    lab.until("the mark", || lab.ok(&["events", "a"]).contains("root-lost"));
    assert_eq!(lab.state("a"), "running");
}

/// The process behind the only machine's root.
fn server_of(lab: &Lab) -> u32 {
    let hypervisor = lab.pid_of_hypervisor("a");
    let parent = |pid: u32| -> u32 {
        let mut text = String::new();
        let file = fs::File::open(format!("/proc/{pid}/stat"));
        let _ = file.and_then(|mut f| f.read_to_string(&mut text));
        let after = text.rsplit(')').next().unwrap_or("").to_owned();
        after.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0)
    };
    let warden = parent(hypervisor);
    let all = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = all.filter_map(|e| e.file_name().to_string_lossy().parse::<u32>().ok());
    let is = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent(*pid) == warden && words.split(|b| *b == 0).any(|w| w == b"flistd")
    };
    pids.find(is).expect("a process that serves the root")
}
