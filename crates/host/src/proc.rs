//! The one door for processes: every helper that Lodge runs starts here, with a clean environment
//! and its standard error kept for the error message.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("cannot run {program}: {source}")]
    Start { program: String, source: io::Error },
    #[error("{program} ended with {status}{}", tail(.stderr))]
    Failed { program: String, status: String, stderr: String },
}

fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(5)..];
    if last.is_empty() { String::new() } else { format!(": {}", last.join("; ")) }
}

/// A program to run.
#[derive(Debug)]
pub struct Tool {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
}

impl Tool {
    pub fn new(program: impl AsRef<Path>) -> Self {
        let env = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("LC_ALL", "C.UTF-8"),
        ];
        let env = env.map(|(k, v)| (k.into(), v.into()));
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: env.into(),
            folder: None,
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// Where it works; the caller's own folder where this is not called.
    pub fn within(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// The command with its clean environment, for callers that wire its streams themselves.
    #[expect(clippy::disallowed_methods, reason = "this is the one door")]
    pub fn command(&self) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).env_clear().envs(self.env.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::null());
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command
    }

    fn name(&self) -> String {
        self.program.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub fn start_error(&self, source: io::Error) -> ToolError {
        ToolError::Start { program: self.name(), source }
    }

    /// What it wrote to standard output, if it succeeded.
    pub async fn output(&self) -> Result<Vec<u8>, ToolError> {
        let output = self.command().output().await.map_err(|e| self.start_error(e))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(ToolError::Failed {
            program: self.name(),
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it with `input` on its standard input.
    pub async fn feed(&self, input: &[u8]) -> Result<(), ToolError> {
        use tokio::io::AsyncWriteExt;
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| self.start_error(e))?;
        let mut stdin = child.stdin.take().expect("piped");
        let written = stdin.write_all(input).await;
        drop(stdin);
        let output = child.wait_with_output().await.map_err(|e| self.start_error(e))?;
        if output.status.success() {
            return written.map_err(|e| self.start_error(e));
        }
        Err(ToolError::Failed {
            program: self.name(),
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// Closes every descriptor but the standard streams and those that a service manager has opened
/// for this process, which are returned. To be called before anything is opened.
pub fn take_inherited() -> Vec<OwnedFd> {
    use std::os::fd::FromRawFd;
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or(0).min(16);
    // SAFETY: at the start of a process nothing in it owns a descriptor above the standard ones.
    unsafe { libc::syscall(libc::SYS_close_range, 3 + count, u32::MAX, 0) };
    (0..count as i32)
        // SAFETY: the manager opened these numbers for this process, and nothing else owns them.
        .map(|i| unsafe { OwnedFd::from_raw_fd(3 + i) })
        .filter(|fd| rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).is_ok())
        .collect()
}

/// Tells the service manager something, if there is one that wants to know.
pub fn notify(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_encoded_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    // A manager that went away wants to know nothing more.
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(state.as_bytes(), &address);
    }
}

/// Ends a process at once. One that has ended already is none to end.
pub fn kill(pid: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Waits until a process has ended, reaped or not.
pub async fn ended(pid: u32) {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let Some(pid) = Pid::from_raw(pid as i32) else { return };
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK)
        // SAFETY: the descriptor is owned by what is registered and stays open as long.
        && let Ok(ended) = unsafe { tokio::io::unix::AsyncFd::register(pidfd) }
    {
        // An error would mean that it cannot be waited for; there is nothing better to do then.
        let _ = ended.readable().await;
    }
}

/// Tells the allocator to give memory back: a daemon lives long and works in short bursts.
pub fn stay_small() {
    // SAFETY: plain numbers, before there is a second thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
    }
}
