//! Figures of images that set themselves up: how long one takes to build, another size of it, and
//! to pack; and how long a guest takes to its script's first line, against the same QEMU by hand.
//! Nothing is asserted.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bench::{Row, lodge};
use crate::run::command;

const IMAGE: &str = "debian12-10G-vm-bootstrap";
const SCRIPT: &[u8] = b"#!/bin/bash\nexit 0\n";

struct Place<'a> {
    lodge: &'a Path,
    home: &'a Path,
    out: PathBuf,
}

pub(crate) fn measure(lodge: &Path, home: &Path) -> Result<Vec<Row>> {
    let place = Place { lodge, home, out: home.join("family") };
    fs::create_dir_all(&place.out)?;
    // Fills the cache of packages.
    place.build("[10]", "[]", &["--afresh"])?;
    let begun = Instant::now();
    place.build("[10]", "[]", &["--afresh"])?;
    let whole = begun.elapsed().as_secs_f64();
    let second = place.build("[10, 11]", "[]", &[])?;
    let (gzip, zstd) = (place.build("[12]", "[gzip]", &[])?, place.build("[13]", "[zstd]", &[])?);
    let mut rows = vec![
        Row {
            figure: "a Debian image from a warm cache of packages, to bootable disk",
            measured: format!("{whole:.1} s"),
            target: "<= 45 s (60 s by hand)",
        },
        Row { figure: "a second size of it", measured: format!("{second:.1} s"), target: "<= 3 s" },
        Row {
            figure: "packed with zstd; with gzip",
            measured: format!("{:.1} s; {:.1} s", zstd - second, gzip - second),
            target: "zstd <= 3 s (gzip 35.7 s by hand)",
        },
    ];
    rows.push(place.first_line()?);
    Ok(rows)
}

impl Place<'_> {
    fn run(&self, args: &[&str]) -> Result<String> {
        lodge(self.lodge, self.home, args)
    }

    /// Builds; seconds that the last image took beside its tree.
    fn build(&self, sizes: &str, compress: &str, more: &[&str]) -> Result<f64> {
        let file = self.out.join("matrix.yml");
        let text =
            format!("compress: {compress}\nimages: [{{distro: debian12, sizes: {sizes}}}]\n");
        fs::write(&file, text)?;
        let said = self.run(&[&["image", "matrix", &file.to_string_lossy()], more].concat())?;
        let built = said.lines().filter_map(|l| l.split_once(": built in "));
        let seconds = built.filter_map(|(_, s)| s.strip_suffix(" s")?.parse().ok()).next_back();
        seconds.context("nothing was built")
    }

    /// From the start of the hypervisor to the request that fetches the script, which it runs then.
    fn first_line(&self) -> Result<Row> {
        let disk = self.out.join(format!("output-{IMAGE}/packer-{IMAGE}"));
        let script = self.home.join("first.sh");
        fs::write(&script, SCRIPT)?;
        self.run(&["image", "add", &disk.to_string_lossy(), "--name", "first"])?;
        let (mut own, mut hand) = (Vec::new(), Vec::new());
        for round in 0..3 {
            own.push(self.by_lodge(&format!("first-{round}"), &script)?);
            hand.push(self.by_hand(&disk)?);
        }
        let median = |list: &mut Vec<f64>| {
            list.sort_by(f64::total_cmp);
            list[list.len() / 2]
        };
        let (own, hand) = (median(&mut own), median(&mut hand));
        Ok(Row {
            figure: "boot to the script's first line, against the same by hand",
            measured: format!("{:.2}x ({own:.1} s / {hand:.1} s)", own / hand),
            target: "<= 1.05x",
        })
    }

    fn by_lodge(&self, name: &str, script: &Path) -> Result<f64> {
        let script = script.to_string_lossy();
        let memory = ["--memory", "1GiB", "--cpus", "1", "--wait", "bootstrap", "--timeout", "300"];
        let args = ["run", "first", "--name", name, "--bootstrap", &script];
        self.run(&[&args[..], &memory[..]].concat())?;
        let events: Value = serde_json::from_str(&self.run(&["timeline", name, "-o", "json"])?)?;
        let at = |kind: &str| {
            let found = events.as_array()?.iter().find(|e| e["kind"] == kind)?;
            found["at_us"].as_f64()
        };
        let span = at("bootstrap").zip(at("entered")).context("the moments")?;
        self.run(&["rm", "--force", name])?;
        Ok((span.0 - span.1) / 1e6)
    }

    fn by_hand(&self, disk: &Path) -> Result<f64> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (asked, heard) = mpsc::channel();
        std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let _ = stream.read(&mut [0; 4096]);
            let _ = asked.send(Instant::now());
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", SCRIPT.len());
            let _ = stream.write_all(&[head.as_bytes(), SCRIPT].concat());
        });
        let layer = self.home.join("by-hand.qcow2");
        let _ = fs::remove_file(&layer);
        let mut img = command("qemu-img");
        img.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(disk).arg(&layer);
        img.status()?;
        let mut qemu = command("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024"]);
        qemu.args(["-display", "none", "-serial", "null", "-net", "nic,model=virtio", "-net"]);
        qemu.arg(format!("user,guestfwd=tcp:10.0.2.100:80-cmd:netcat 127.0.0.1 {port}"));
        qemu.arg("-drive").arg(format!("file={},if=virtio,format=qcow2", layer.display()));
        let begun = Instant::now();
        let mut child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let at = heard.recv_timeout(Duration::from_secs(300));
        child.kill()?;
        child.wait()?;
        Ok((at.context("the guest did not ask")? - begun).as_secs_f64())
    }
}
