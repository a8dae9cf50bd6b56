//! Figures of vmadm: whole commands with many machines, metadata, and what the jail costs. Printed
//! like the others; nothing is asserted.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::bench::{Row, median};
use crate::run::command;

const MACHINES: usize = 200;
const ROUNDS: usize = 21;
const QUESTIONS: usize = 50;

struct Place<'a> {
    lodge: &'a Path,
    home: &'a Path,
}

impl Place<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = command(&self.lodge.to_string_lossy());
        command.args(words).env("LODGE_HOME", self.home);
        command
    }

    fn say(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        child.stdin.take().context("piped")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Milliseconds of a whole process.
    fn time(&self, words: &[&str]) -> Result<f64> {
        let mut list = Vec::new();
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            let status = self.command(words).stdout(Stdio::null()).status()?;
            list.push(begun.elapsed().as_secs_f64() * 1000.0);
            if !status.success() {
                bail!("{words:?} failed");
            }
        }
        Ok(median(list))
    }
}

pub(crate) fn measure(lodge: &Path, home: &Path, kernel: &str, initrd: &str) -> Result<Vec<Row>> {
    let place = Place { lodge, home };
    for i in 0..MACHINES {
        let document = format!(
            r#"{{"brand":"kvm","autoboot":false,"ram":256,
            "disks":[{{"size":1024,"model":"virtio"}}],"nics":[{{"nic_tag":"admin",
            "model":"virtio","ip":"10.88.1.{}","netmask":"255.255.255.0"}}]}}"#,
            i + 1
        );
        place.say(&["vmadm", "create"], &document)?;
    }
    let first = place.say(&["vmadm", "lookup"], "")?;
    let first = first.lines().next().context("a machine")?.to_owned();
    let ms = |value: f64| format!("{value:.1} ms");
    let list = ms(place.time(&["vmadm", "list"])?);
    let get = ms(place.time(&["vmadm", "get", &first])?);
    for uuid in place.say(&["vmadm", "lookup"], "")?.lines() {
        place.say(&["vmadm", "delete", uuid], "")?;
    }
    let asked = metadata(&place, kernel, initrd)?;
    let (jailed, plain) = jail(lodge, home)?;
    let target = "to reach: 10 ms";
    Ok(vec![
        Row { figure: "vmadm list of 200, whole process, p50", measured: list, target },
        Row { figure: "vmadm get, whole process, p50", measured: get, target },
        Row {
            figure: "metadata GET as a guest under TCG sees it, its own part included",
            measured: ms(asked),
            target: "to reach: 5 ms at the host's side",
        },
        Row {
            figure: "the jail, around a program that ends at once; in brackets: without",
            measured: format!("{} ({})", ms(jailed - plain), ms(plain)),
            target,
        },
    ])
}

/// Milliseconds of one question, asked by a shell in the guest over its second serial port.
fn metadata(place: &Place<'_>, kernel: &str, initrd: &str) -> Result<f64> {
    let machine = json!({
        "name": "asks", "memory": "256MiB", "nics": [], "ready": "console:GUEST-READY",
        "boot": {"kernel": kernel, "initrd": initrd, "cmdline": "console=ttyS0 quiet"},
        "mdata": {"customer": {"k": "v"}},
    });
    let file = place.home.join("asks.json");
    std::fs::write(&file, machine.to_string())?;
    place.say(&["create", &file.to_string_lossy()], "")?;
    place.say(&["start", "asks", "--wait", "ready", "--timeout", "120"], "")?;
    let shown: Value = serde_json::from_str(&place.say(&["-o", "json", "inspect", "asks"], "")?)?;
    let id = shown["summary"]["id"].as_str().context("an identity")?.replace('-', "");
    let mut console = UnixStream::connect(place.home.join("run/m").join(id).join("console.sock"))?;
    console.set_read_timeout(Some(Duration::from_secs(60)))?;
    let loops = |count: usize| {
        format!(
            "stty -F /dev/ttyS1 raw -echo; exec 3<>/dev/ttyS1; i=0; while [ $i -lt {count} ]; do \
             echo GET k >&3; read a <&3; read b <&3; read c <&3; i=$((i+1)); done; echo DO\"\"NE-{count}\n"
        )
    };
    let mut run = |count: usize| -> Result<f64> {
        let begun = Instant::now();
        console.write_all(loops(count).as_bytes())?;
        let (mut seen, mut buffer) = (String::new(), [0; 4096]);
        while !seen.contains(&format!("DONE-{count}")) {
            let got = console.read(&mut buffer)?;
            seen.push_str(&String::from_utf8_lossy(&buffer[..got]));
        }
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    };
    let once = run(1)?;
    let many = run(QUESTIONS + 1)?;
    place.say(&["rm", "--force", "asks"], "")?;
    Ok((many - once) / QUESTIONS as f64)
}

/// Milliseconds of a small static program, in the jail and without.
fn jail(lodge: &Path, home: &Path) -> Result<(f64, f64)> {
    let program = "/bin/busybox";
    let stage = home.join("stage");
    std::fs::create_dir_all(&stage)?;
    let (mut jailed, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        command(program).arg("true").status()?;
        plain.push(begun.elapsed().as_secs_f64() * 1000.0);
        let (mut ours, theirs) = UnixStream::pair()?;
        let plan = json!({
            "program": program, "argv": ["busybox", "true"], "env": [], "binds": [],
            "keep_fds": [], "uid": 0x6cff_ffff_u32, "gid": 0x6cff_ffff_u32, "stage": stage,
            "cgroups": [], "status_fd": 2, "writes_files": false,
        });
        let begun = Instant::now();
        let mut child = command(&lodge.with_file_name("lodge-jail").to_string_lossy())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(std::os::fd::OwnedFd::from(theirs))
            .spawn()?;
        child.stdin.take().context("piped")?.write_all(plan.to_string().as_bytes())?;
        let mut said = Vec::new();
        ours.read_to_end(&mut said)?;
        jailed.push(begun.elapsed().as_secs_f64() * 1000.0);
        child.wait()?;
        if !said.ends_with(b"enter\n") {
            bail!("the jail did not open: {}", String::from_utf8_lossy(&said));
        }
    }
    Ok((median(jailed), median(plain)))
}
