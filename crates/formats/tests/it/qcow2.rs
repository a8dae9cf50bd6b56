//! qcow2 images: `qemu-img` agrees about every byte, in both directions.

use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Command;

use lodge_formats::qcow2::volume::{Reader, Writer};

#[expect(clippy::disallowed_methods, reason = "a test runs the reference tools")]
fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn known() -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join("qemu-img").exists())
}

#[test]
fn the_reference_tool_agrees() {
    if !known() {
        // The machine suite's packages bring it; the host's alone do not need it.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [own, raw, packed] =
        ["own", "raw", "packed"].map(|n| dir.path().join(n).to_str().unwrap().to_owned());
    let size = 1_u64 << 30;
    let mut disk = vec![0; 5 << 20];
    for (i, byte) in disk.iter_mut().enumerate().skip(70_000).take(3 << 20) {
        *byte = (i / 100) as u8;
    }
    let mut writer = Writer::new(std::fs::File::create(&own).unwrap(), size);
    writer.seek(SeekFrom::Start(600 << 20)).unwrap();
    writer.write_all(b"far").unwrap();
    writer.seek(SeekFrom::Start(70_000)).unwrap();
    writer.write_all(&disk[70_000..]).unwrap();
    writer.finish().unwrap();
    assert!(qemu_img(&["check", &own]).contains("No errors"));
    qemu_img(&["convert", "-O", "raw", &own, &raw]);
    let mut bytes = vec![0; disk.len()];
    std::fs::File::open(&raw).unwrap().read_exact(&mut bytes).unwrap();
    assert!(bytes == disk);
    for compress in [&["-c"][..], &["-o", "cluster_size=4k"], &["-o", "compat=0.10"]] {
        let mut args = vec!["convert", "-O", "qcow2"];
        args.extend(compress);
        args.extend([raw.as_str(), &packed]);
        qemu_img(&args);
        let mut reader = Reader::open(std::fs::File::open(&packed).unwrap()).unwrap();
        assert_eq!(reader.size(), size);
        reader.read_exact(&mut bytes).unwrap();
        assert!(bytes == disk, "{compress:?}");
        let mut far = [0; 3];
        reader.seek(SeekFrom::Start(600 << 20)).unwrap();
        reader.read_exact(&mut far).unwrap();
        assert_eq!(&far, b"far");
    }
}
