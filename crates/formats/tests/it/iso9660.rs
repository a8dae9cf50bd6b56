//! ISO 9660 volumes: `isoinfo` reads all three forms of every name.

use std::process::Command;

use lodge_formats::iso9660::{File, write};

#[expect(clippy::disallowed_methods, reason = "a test runs the reference tools")]
fn isoinfo(args: &[&str]) -> Vec<u8> {
    let output = Command::new("isoinfo").args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn the_reference_tool_reads_every_form() {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join("isoinfo").exists());
    if !found {
        // The machine suite's packages bring it; the host's alone do not need it.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.iso");
    // Enough that the folder has more than one sector.
    let contents: Vec<Vec<u8>> = (0..60_u32).map(|n| vec![n as u8; 50 * n as usize]).collect();
    let name = |n: usize| format!("{n:02}An-overlay_with.a rather long name.tar");
    let file = |(n, bytes): (usize, &Vec<u8>)| File {
        name: name(n),
        mode: 0o644,
        size: bytes.len() as u32,
        contents: std::io::Cursor::new(bytes.clone()),
    };
    let files = contents.iter().enumerate().map(file).collect();
    let bytes = write(std::fs::File::create(&path).unwrap(), "xcluster", files).unwrap();
    assert_eq!(bytes, path.metadata().unwrap().len());
    let image = path.to_str().unwrap();
    let about = String::from_utf8(isoinfo(&["-d", "-i", image])).unwrap();
    assert!(about.contains("Volume id: xcluster"), "{about}");
    assert!(about.contains("Joliet with UCS level 3"), "{about}");
    assert!(about.contains("Rock Ridge signatures version 1 found"), "{about}");
    for form in ["-R", "-J"] {
        let list = String::from_utf8(isoinfo(&[form, "-f", "-i", image])).unwrap();
        let mut list: Vec<&str> = list.lines().collect();
        list.sort_unstable();
        let mut names: Vec<String> = (0..60).map(|n| format!("/{}", name(n))).collect();
        names.sort();
        assert_eq!(list, names, "{form}");
        for n in [0, 1, 41, 59] {
            let read = isoinfo(&[form, "-x", &format!("/{}", name(n)), "-i", image]);
            assert!(read == contents[n], "{form} {n}");
        }
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    for name in ["", "a/b", &"x".repeat(129)] {
        let file = File { name: name.to_owned(), mode: 0o644, size: 0, contents: std::io::empty() };
        assert!(write(std::io::sink(), "x", vec![file]).is_err(), "{name:?}");
    }
}
