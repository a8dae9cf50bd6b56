//! `lodge flist`: made, looked at, taken apart, in both formats and with every kind of store.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use lodge_vm_tests::Lab;
use lodge_vm_tests::lab::command;
use lodge_vm_tests::zero_os::{Server, text};

/// A tree with one of everything.
fn tree(to: &Path) {
    fs::create_dir_all(to.join("usr/bin")).unwrap();
    fs::write(to.join("usr/bin/tool"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(to.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    let big: Vec<u8> = (0..1_300_000u32).map(|i| (i * 31 + i / 977) as u8).collect();
    fs::write(to.join("usr/big"), big).unwrap();
    fs::write(to.join("usr/empty"), b"").unwrap();
    symlink("usr/bin/tool", to.join("link")).unwrap();
    symlink("/etc/shadow", to.join("out")).unwrap();
    std::os::unix::fs::chown(to.join("usr/empty"), Some(1234), Some(77)).unwrap();
    assert!(
        command("mknod").arg(to.join("null")).args(["c", "1", "3"]).status().unwrap().success()
    );
    assert!(command("mkfifo").arg(to.join("pipe")).status().unwrap().success());
}

fn same(lab: &Lab, a: &Path, b: &Path) {
    let output = command("diff").args(["-r", "--no-dereference"]).args([a, b]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Of devices it says only that it cannot compare them.
    let lines: Vec<&str> =
        said.lines().filter(|l| !l.contains("special file") && !l.contains("is a fifo")).collect();
    assert!(lines.is_empty(), "{said} {}", lab.home().display());
    for name in ["usr/bin/tool", "usr/empty", "null", "link"] {
        let meta = |root: &Path| fs::symlink_metadata(root.join(name)).unwrap();
        let (one, other) = (meta(a), meta(b));
        let all = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.rdev(), m.mtime());
        assert_eq!(all(&one), all(&other), "{name}");
    }
}

#[test]
fn what_goes_in_comes_out_through_every_store() {
    let lab = Lab::new();
    let root = lab.home().join("tree");
    tree(&root);
    let redis = Server::redis();
    let web = lab.home().join("web");
    fs::create_dir_all(&web).unwrap();
    let nginx = Server::nginx(&web);
    let dir = format!("dir://{}", web.join("blocks").display());
    let http = format!("http://127.0.0.1:{}/blocks", nginx.port);
    let db = format!("redis://127.0.0.1:{}", redis.port);
    for (i, (name, store, route)) in
        [("a.flist", &dir, &http), ("b.fl", &dir, &http), ("c.flist", &db, &db), ("d.fl", &db, &db)]
            .into_iter()
            .enumerate()
    {
        let file = lab.home().join(name);
        let create = |file: &Path| {
            let args = ["flist", "create", text(&root), text(file), "--store", store];
            lab.ok(&[&args[..], &["--route", route, "--tag", "author=me"]].concat());
        };
        create(&file);
        let again = lab.home().join(format!("again-{name}"));
        create(&again);
        assert_eq!(fs::read(&file).unwrap(), fs::read(&again).unwrap(), "the same bytes again");
        let said = lab.ok(&["flist", "verify", text(&file)]);
        assert!(said.contains("blocks are right"), "{said}");
        let out = lab.home().join(format!("out{i}"));
        lab.ok(&["flist", "extract", text(&file), text(&out)]);
        same(&lab, &root, &out);
        let listed = lab.ok(&["flist", "ls", text(&file), "/usr"]);
        assert!(listed.contains("-rw-r--r--  1234    77            0 empty"), "{listed}");
        assert_eq!(lab.ok(&["flist", "cat", text(&file), "/link"]), "#!/bin/sh\n");
        let complaint = lab.fails(&["flist", "cat", text(&file), "/out"]);
        assert!(complaint.contains("there is none"), "{complaint}");
        let inspected: serde_json::Value =
            serde_json::from_str(&lab.ok(&["flist", "inspect", text(&file)])).unwrap();
        assert_eq!((&inspected["files"], &inspected["links"]), (&3.into(), &2.into()));
        assert_eq!(inspected["tags"]["author"], "me");
    }
}

#[test]
fn a_bucket_is_a_store_too() {
    let lab = Lab::new();
    let root = lab.home().join("tree");
    tree(&root);
    let server = Server::s3(&lodge_vm_tests::python::environment(&["moto[server]==5.1.15"], false));
    let url = format!("http://127.0.0.1:{}/blocks", server.port);
    let made = command("curl").args(["-fsS", "-X", "PUT", &url]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (file, out) = (lab.home().join("a.fl"), lab.home().join("out"));
    let store = format!("s3://key:secret@127.0.0.1:{}/blocks", server.port);
    lab.ok(&["flist", "create", text(&root), text(&file), "--store", &store]);
    // What is written down is without the secret; whoever reads it brings their own.
    let inspected = lab.ok(&["flist", "inspect", text(&file)]);
    assert!(inspected.contains("/blocks") && !inspected.contains("secret"), "{inspected}");
    lab.ok(&["flist", "extract", text(&file), text(&out), "--store", &store]);
    same(&lab, &root, &out);
}

#[test]
fn archives_and_disks_become_flists_and_flists_are_laid_over_each_other() {
    let lab = Lab::new();
    let root = lab.home().join("tree");
    tree(&root);
    let store = format!("dir://{}", lab.home().join("blocks").display());
    let at = |name: &str| lab.home().join(name);
    let create = |source: &Path, file: &Path| {
        lab.ok(&["flist", "create", text(source), text(file), "--store", &store])
    };
    let packed =
        command("tar").arg("-czf").arg(at("tree.tgz")).arg("-C").arg(&root).arg(".").status();
    assert!(packed.unwrap().success());
    create(&at("tree.tgz"), &at("tar.flist"));
    let (file, out) = (at("tar.flist"), at("out"));
    lab.ok(&["flist", "extract", text(&file), text(&out), "--store", &store]);
    same(&lab, &root, &out);
    lab.ok(&["image", "make", text(&root), text(&at("disk.img"))]);
    create(&at("disk.img"), &at("disk.fl"));
    let disk = at("disk.fl");
    let args = ["flist", "cat", text(&disk), "usr/bin/tool", "--store", &store];
    assert_eq!(lab.ok(&args), "#!/bin/sh\n");
    // Later ones are on top.
    fs::create_dir_all(at("above/usr/bin")).unwrap();
    fs::write(at("above/usr/bin/tool"), "new\n").unwrap();
    create(&at("above"), &at("above.flist"));
    let both = at("both.flist");
    lab.ok(&[
        "flist",
        "merge",
        text(&file),
        text(&at("above.flist")),
        "--out",
        text(&both),
        "--route",
        &store,
    ]);
    assert_eq!(lab.ok(&["flist", "cat", text(&both), "/usr/bin/tool"]), "new\n");
    assert_eq!(lab.ok(&["flist", "cat", text(&both), "/usr/empty"]), "");
    let (one, other) = (text(&file), at("disk.fl"));
    let complaint =
        lab.fails(&["flist", "merge", one, text(&other), "--out", text(&at("x.flist"))]);
    assert!(complaint.contains("cannot be merged"), "{complaint}");
}

#[test]
fn what_is_wrong_is_said() {
    let lab = Lab::new();
    let at = |name: &str| lab.home().join(name);
    fs::create_dir_all(at("tree")).unwrap();
    fs::write(at("tree/file"), vec![7; 2 << 20]).unwrap();
    let store = format!("dir://{}", at("blocks").display());
    let (tree, file) = (at("tree"), at("a.fl"));
    lab.ok(&["flist", "create", text(&tree), text(&file), "--store", &store]);
    // One block of one: four pieces of the same bytes.
    let folder = fs::read_dir(at("blocks")).unwrap().next().unwrap().unwrap().path();
    let block = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&block).unwrap();
    let whole = bytes.clone();
    bytes[9] ^= 1;
    fs::write(&block, &bytes).unwrap();
    let output = lab.run(&["flist", "verify", text(&file)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && said.contains("other bytes"), "{said}");
    fs::write(&block, whole).unwrap();
    lab.ok(&["flist", "verify", text(&file)]);
    fs::remove_file(&block).unwrap();
    let output = lab.run(&["flist", "verify", text(&file)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("file: ") && said.contains("no such block"), "{said}");
    for (args, why) in [
        (vec!["flist", "inspect", text(&at("tree/file"))], "an flist is a gzipped tar archive"),
        (
            vec!["flist", "create", "nowhere", "x.fl", "--store", &store],
            "neither a file or a folder",
        ),
        (
            vec!["flist", "create", text(&tree), text(&file), "--store", "ftp://x/y"],
            "stores of the kind ftp:// are not known",
        ),
        (vec!["run", "debian-12", "--store", &store], "--store is about flists"),
    ] {
        let complaint = lab.fails(&args);
        assert!(complaint.contains(why), "{args:?}: {complaint}");
    }
}
