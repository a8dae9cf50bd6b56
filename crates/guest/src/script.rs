//! Judging a script and running it: as root, in the folder, with nothing to read and its output in
//! the log.

use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use crate::folder::Folder;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin";

/// A body that no interpreter should see: the exit status it would have, and why.
pub(crate) fn unfit(body: &[u8]) -> Option<(i32, &'static str)> {
    let start = &body[..body.len().min(4096)];
    let text = start.trim_ascii_start();
    let html = [&b"<!doctype"[..], b"<html", b"<?xml"];
    let is_html =
        html.iter().any(|h| text.len() >= h.len() && text[..h.len()].eq_ignore_ascii_case(h));
    let first_line = start.split(|b| *b == b'\n').next().unwrap_or_default();
    if start.starts_with(b"\x7fELF") {
        Some((126, "it is a program (ELF), not a script"))
    } else if start.contains(&0) {
        Some((126, "it is not text"))
    } else if is_html {
        Some((2, "it is a page (HTML), not a script; is this the right server?"))
    } else if first_line.ends_with(b"\r") {
        Some((2, "its lines end in CR LF; write it with Unix line ends"))
    } else {
        None
    }
}

/// What a script ended with.
pub(crate) struct Ended {
    pub(crate) exit: i32,
    pub(crate) timed_out: bool,
}

pub(crate) fn run(folder: &Folder, log: File) -> io::Result<Ended> {
    let path = folder.script();
    let mut command = interpreter(&path)?;
    command
        .current_dir(folder.path())
        .env_clear()
        .envs([("PATH", PATH), ("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")])
        .envs([("TERM", "xterm"), ("SHELL", "/bin/bash")])
        .envs(folder.environment())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    let mut child = command.spawn()?;
    let Some(limit) = folder.timeout() else {
        return Ok(Ended { exit: code(child.wait()?), timed_out: false });
    };
    let pid = rustix::process::Pid::from_child(&child);
    let (done, alarm) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = alarm.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            // The leader is not reaped before this thread is done, so the group is still its own.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        late
    });
    let ended = wait_without_reaping(pid);
    drop(done);
    let timed_out = watch.join().unwrap_or(false);
    ended?;
    Ok(Ended { exit: code(child.wait()?), timed_out })
}

fn wait_without_reaping(pid: rustix::process::Pid) -> io::Result<()> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::Pid(pid), options) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

/// A script says in its first line who reads it; one that does not is for bash, or for the shell
/// that there is.
#[expect(clippy::disallowed_methods, reason = "a guest has no daemon to go through")]
fn interpreter(path: &Path) -> io::Result<Command> {
    let start = std::fs::read(path)?;
    let line = start.split(|b| *b == b'\n').next().unwrap_or_default();
    let words = String::from_utf8_lossy(line).into_owned();
    if let Some(words) = words.strip_prefix("#!") {
        let mut words = words.trim().splitn(2, char::is_whitespace);
        if let Some(program) = words.next().filter(|p| !p.is_empty()) {
            let mut command = Command::new(program);
            command.args(words.next().map(str::trim)).arg(path);
            return Ok(command);
        }
    }
    let shells = ["/bin/bash", "/usr/bin/bash", "/bin/sh"];
    let shell = shells.into_iter().find(|s| Path::new(s).exists()).unwrap_or("/bin/sh");
    let mut command = Command::new(shell);
    command.arg(path);
    Ok(command)
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_g11_what_is_no_script_is_known_before_it_runs() {
        let page = b"\n<!DOCTYPE html><html>";
        for (body, exit) in [
            (&b"\x7fELF\x02\x01"[..], Some(126)),
            (b"#!/bin/sh\r\nexit 0\r\n", Some(2)),
            (page, Some(2)),
            (b"\x00\x01", Some(126)),
            (b"echo \xff\xfe\nexit 0\n", None),
            (b"#!/usr/bin/python3\nprint()\n", None),
            (b"echo '<html>'\n", None),
        ] {
            assert_eq!(unfit(body).map(|(exit, _)| exit), exit, "{body:?}");
        }
    }
}
