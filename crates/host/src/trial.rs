//! The jail put to the test on this host: this program takes the hypervisor's place in it and tries
//! to get out, while the host watches what must not change.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{ChildStderr, Stdio};
use std::time::Duration;

use lodge_jail::cgroup::{self, Limits};
use lodge_jail::{Bind, JailPlan};

use crate::elf;
use crate::escape;
use crate::facts::Facts;
use crate::paths;
use crate::proc::Tool;

/// The word by which this program knows that it is inside.
pub const INSIDE: &str = "try-to-escape";
/// It reports and ends within this.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the trial may use, of which it tries to use more.
const MEMORY: u64 = 256 << 20;
const THREADS: u32 = 64;
const GROUP: &str = "trial";

/// Ways out with whether each is closed; those that only the host sees are among them.
pub type Report = Vec<(String, bool)>;

/// Inside: tries everything and says so, a line each, on standard output.
pub fn inside(canary: &str) -> std::process::ExitCode {
    let mut said = String::new();
    for (way, closed) in escape::attempts(canary) {
        said.push_str(if closed { "closed " } else { "open " });
        said.push_str(way);
        said.push('\n');
    }
    let _ = std::io::stdout().write_all(said.as_bytes());
    let _ = std::io::stdout().write_all(b"end\n");
    // The last one ends it: more memory than it may have.
    let mut kept: Vec<Vec<u8>> = Vec::new();
    while kept.len() < 64 {
        kept.push(vec![1; (MEMORY / 16) as usize]);
    }
    let _ = std::io::stdout().write_all(b"open more memory than it may have\n");
    std::process::ExitCode::SUCCESS
}

/// Outside: sets the canaries out, runs the trial, and looks after them.
pub async fn run(facts: &Facts) -> Result<Report, String> {
    let text = |e: std::io::Error| e.to_string();
    let stage = tempfile::tempdir().map_err(text)?;
    let canary = stage.path().join("canary");
    fs::write(&canary, "untouched").map_err(text)?;
    let name = SocketAddr::from_abstract_name(&escape::ABSTRACT[1..]).map_err(text)?;
    // Somebody else may be making the same trial; then it is theirs that must not be reached.
    let listener = UnixListener::bind_addr(&name).ok();
    let mut sibling = Tool::new("/bin/sleep").arg("120").command().spawn().map_err(text)?;
    let (mut ours, theirs) = UnixStream::pair().map_err(text)?;
    let (mut status, told) = UnixStream::pair().map_err(text)?;
    let room = stage.path().join("room");
    paths::make_dir(&room).map_err(text)?;
    let limits =
        Limits { cpu_percent: None, cpu_weight: 100, memory_bytes: Some(MEMORY), threads: THREADS };
    let group = format!("{GROUP}-{}", std::process::id());
    let cgroups = cgroup::create(&facts.cgroups, &group, &limits).map_err(text)?;
    let limited = !cgroups.is_empty();
    let plan = plan(&canary, &room, (theirs.as_raw_fd(), told.as_raw_fd()), cgroups)?;
    let mut stderr = start(&plan, vec![theirs.into(), told.into()])?;
    let listen = move || {
        let (mut said, mut entered, mut why) = (String::new(), String::new(), String::new());
        let _ = ours.set_read_timeout(Some(PATIENCE));
        let in_time = ours.read_to_string(&mut said).is_ok();
        let _ = status.set_read_timeout(Some(Duration::from_secs(1)));
        let _ = status.read_to_string(&mut entered);
        // Its parent has ended, so it is ours to reap.
        let pid = entered.lines().find_map(|line| line.strip_prefix("pid ")?.parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
        let _ = stderr.read_to_string(&mut why);
        (said, why, in_time)
    };
    let heard = tokio::task::spawn_blocking(listen).await.map_err(|e| e.to_string())?;
    let (said, why, in_time) = heard;
    let _ = cgroup::remove(&facts.cgroups, &group);
    if !said.contains("end\n") {
        let why = why.lines().last().unwrap_or("it says nothing");
        return Err(format!("the trial did not end: {why}"));
    }
    let lines = said.lines().filter_map(|line| line.split_once(' '));
    let mut report: Report = lines.map(|(sign, way)| (way.to_owned(), sign == "closed")).collect();
    if !limited {
        // Without a control group nothing limits threads here; `inspect` says so of machines too.
        report.retain(|(way, _)| !way.starts_with("more "));
    }
    if limited && !report.iter().any(|(way, _)| way.starts_with("more memory")) {
        report.push(("more memory than it may have".into(), in_time));
    }
    let alive = sibling.try_wait().is_ok_and(|status| status.is_none());
    report.push(("a process of the host, which lives on".into(), alive));
    let _ = sibling.kill().await;
    let same = fs::read_to_string(&canary).is_ok_and(|text| text == "untouched");
    report.push(("a file of the host, which is unchanged".into(), same));
    if let Some(listener) = listener {
        let _ = listener.set_nonblocking(true);
        report.push((
            "a socket of the host, which nobody reached".into(),
            listener.accept().is_err(),
        ));
    }
    Ok(report)
}

fn plan(
    canary: &std::path::Path,
    room: &std::path::Path,
    (terminal, status_fd): (i32, i32),
    cgroups: Vec<std::path::PathBuf>,
) -> Result<JailPlan, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let files = elf::closure(std::slice::from_ref(&program)).map_err(|e| e.to_string())?;
    let bind = |path: &std::path::PathBuf| Bind {
        source: path.clone(),
        target: path.clone(),
        writable: false,
        device: false,
        executable: true,
    };
    // As a machine whose identity no machine has.
    let uid = crate::survey::user_of(lodge_spec::MachineId(uuid_of_trial()));
    Ok(JailPlan {
        program,
        argv: vec!["lodge".into(), INSIDE.into(), canary.display().to_string()],
        env: Vec::new(),
        binds: files.iter().map(bind).collect(),
        keep_fds: Vec::new(),
        uid,
        gid: uid,
        stage: room.to_owned(),
        cgroups,
        status_fd,
        writes_files: false,
        binds_sockets: false,
        network: None,
        fuse: None,
        terminal: Some(terminal),
    })
}

/// All bits set: no random identity looks like this.
fn uuid_of_trial() -> uuid::Uuid {
    uuid::Uuid::max()
}

/// Runs `lodge-jail`, which ends when the trial has begun; the trial's standard error.
fn start(plan: &JailPlan, lent: Vec<OwnedFd>) -> Result<ChildStderr, String> {
    let text = |e: std::io::Error| format!("lodge-jail: {e}");
    for fd in &lent {
        let flags = rustix::io::fcntl_getfd(fd).map_err(|e| text(e.into()))?;
        let flags = flags - rustix::io::FdFlags::CLOEXEC;
        rustix::io::fcntl_setfd(fd, flags).map_err(|e| text(e.into()))?;
    }
    let program = paths::sibling_program("lodge-jail").map_err(text)?;
    let mut command = Tool::new(program).command().into_std();
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(text)?;
    drop(lent);
    let plan = serde_json::to_vec(plan).map_err(|e| e.to_string())?;
    child.stdin.take().ok_or("no pipe")?.write_all(&plan).map_err(text)?;
    let stderr = child.stderr.take().ok_or("no pipe")?;
    let _ = child.wait();
    Ok(stderr)
}
