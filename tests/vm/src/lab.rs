//! An instance of Lodge for one test: its own folders, its own daemon, and a look around at the
//! end that nothing is left behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Guests are slow without hardware, and slower beside each other.
pub const PATIENCE: Duration = Duration::from_secs(180);

pub struct Lab {
    home: tempfile::TempDir,
    program: PathBuf,
    user: Option<u32>,
    /// The network namespace that is its host's.
    namespace: Option<String>,
    variables: Vec<(String, String)>,
}

#[expect(clippy::disallowed_methods, reason = "a test stands where people stand")]
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    Command::new(program)
}

/// Where the program under test is.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("LODGE_PROGRAM") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize().unwrap().join("target/quick/lodge")
}

impl Lab {
    pub fn new() -> Self {
        let home = tempfile::Builder::new().prefix("lodge-test-").tempdir().unwrap();
        Self { home, program: program(), user: None, namespace: None, variables: Vec::new() }
    }

    /// An instance that belongs to an ordinary user.
    pub fn of_user(uid: u32) -> Self {
        let mut lab = Self::new();
        lab.user = Some(uid);
        std::os::unix::fs::chown(lab.home(), Some(uid), Some(uid)).unwrap();
        for (name, minor) in [("tun", "200"), ("fuse", "229")] {
            let node = lab.home().join(name);
            let mut mknod = command("mknod");
            mknod.args(["-m", "666"]).arg(&node).args(["c", "10", minor]);
            assert!(mknod.status().unwrap().success());
        }
        lab
    }

    /// An instance whose host has the links of a namespace, and no others.
    pub fn within(namespace: &crate::namespace::Namespace) -> Self {
        let mut lab = Self::new();
        lab.namespace = Some(namespace.name().to_owned());
        lab
    }

    /// An instance whose programs are its own, so that they can be replaced.
    pub fn with_copies() -> Self {
        let mut lab = Self::new();
        let folder = lab.program.parent().unwrap().to_owned();
        for name in ["lodge", "lodge-jail"] {
            std::fs::copy(folder.join(name), lab.home().join(name)).unwrap();
        }
        lab.program = lab.home().join("lodge");
        lab
    }

    /// An instance that finds both small hypervisors in its own folder: the simulator, whose
    /// program `simulator` is.
    pub fn with_simulators(simulator: &str) -> Self {
        let mut lab = Self::new();
        for name in ["firecracker", "cloud-hypervisor"] {
            let path = lab.home().join(name);
            std::fs::copy(simulator, &path).unwrap();
            let variable = format!("LODGE_{}", name.replace('-', "_").to_uppercase());
            lab.set(&variable, path.to_str().unwrap());
        }
        lab
    }

    /// An instance whose store already holds the image `debian-12`.
    pub fn with_debian() -> Self {
        let lab = Self::new();
        crate::assets::debian_into(lab.home());
        lab
    }

    /// Sets a variable for every command of this instance.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = match (self.user, &self.namespace) {
            (None, None) => command(&self.program),
            (None, Some(name)) => {
                let mut command = command("ip");
                command.args(["netns", "exec", name]).arg(&self.program);
                command
            }
            (Some(uid), _) => {
                // Every distribution's udev opens these devices to all; a host without udev does not.
                let script = "mount --bind \"$1\" /dev/net/tun; mount --bind \"$2\" /dev/fuse; \
                              shift 2; exec \"$@\"";
                let mut command = command("unshare");
                command.args(["-m", "sh", "-c", script, "sh"]).arg(self.home().join("tun"));
                command.arg(self.home().join("fuse"));
                let uid = uid.to_string();
                command.args(["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups"]);
                command.arg(&self.program);
                command
            }
        };
        command.args(args).env("LODGE_HOME", self.home()).stdin(Stdio::null());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "lodge {args:?}: {}{text}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.last_words(),
        );
        text
    }

    /// Starts a small guest on the cloud kernel and waits until it says that it is there.
    pub fn boot(&self, name: &str, initrd: &str, more: &[&str]) {
        self.boot_kernel(name, &crate::assets::kernel(), initrd, more);
    }

    pub fn boot_kernel(&self, name: &str, kernel: &str, initrd: &str, more: &[&str]) {
        let mut args = vec!["run", "--name", name, "--kernel", kernel, "--initrd", initrd];
        args.extend(["--append", "console=ttyS0 quiet cryptomgr.notests", "--memory", "256MiB"]);
        args.extend(["--ready", "console:GUEST-READY", "--wait", "ready", "--timeout", "170"]);
        args.extend(more);
        self.ok(&args);
    }

    /// Runs a command that must fail; returns its complaint.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "lodge {args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).trim().to_owned()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["-o", "json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    /// The only machine's entry in `ls -a`, or the one of that name.
    pub fn machine(&self, name: &str) -> Value {
        let list = self.json(&["ls", "-a"]);
        let found = list.as_array().unwrap().iter().find(|m| m["name"] == name);
        found.cloned().unwrap_or(Value::Null)
    }

    pub fn state(&self, name: &str) -> String {
        self.machine(name)["state"].as_str().unwrap_or("absent").to_owned()
    }

    /// Waits for a machine's state without asking for it in a way that would change anything.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < PATIENCE, "{what} did not come\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn pid_of_hypervisor(&self, name: &str) -> u32 {
        let pid = self.json(&["inspect", name])["runs"]["pid"].as_u64();
        pid.unwrap().try_into().unwrap()
    }

    pub fn daemon(&self) -> u32 {
        let mut socket = UnixStream::connect(self.home().join("run/lodge.sock")).unwrap();
        socket.write_all(b"{\"do\":\"ping\"}\n").unwrap();
        let mut reply = [0; 200];
        let count = socket.read(&mut reply).unwrap();
        let text = std::str::from_utf8(&reply[..count]).unwrap();
        let line = text.lines().next().unwrap();
        let value: Value = serde_json::from_str(line).unwrap();
        value["pid"].as_u64().unwrap().try_into().unwrap()
    }

    pub fn kill_daemon(&self) {
        let pid = self.daemon();
        kill(pid, 9);
        let gone = || !Path::new(&format!("/proc/{pid}/fd/0")).exists();
        self.until("the daemon's end", gone);
    }

    pub fn console_text(&self, name: &str) -> String {
        self.ok(&["logs", name, "--tail", "10000"])
    }

    fn last_words(&self) -> String {
        let mut text = String::new();
        let logs = std::fs::read_dir(self.home().join("machines")).into_iter().flatten().flatten();
        for dir in logs {
            let log = std::fs::read(dir.path().join("console.log")).unwrap_or_default();
            let end = &log[log.len().saturating_sub(1500)..];
            text += &format!(
                "-- console of {:?}:\n{}\n",
                dir.file_name(),
                String::from_utf8_lossy(end)
            );
        }
        text
    }

    /// Types into a guest's console and waits for an answer.
    pub fn type_and_see(&self, name: &str, typed: &str, answer: &str) {
        let mut console = self.attach(name);
        console.stdin.as_mut().unwrap().write_all(typed.as_bytes()).unwrap();
        wait_for_text(&mut console, answer);
        end(console);
    }

    /// How far a guest that counts aloud has come.
    pub fn ticks(&self, name: &str) -> u64 {
        let text = self.console_text(name);
        let ticks = text.lines().filter_map(|l| l.trim().strip_prefix("tick ")?.parse().ok());
        ticks.max().unwrap_or(0)
    }

    pub fn attach(&self, name: &str) -> Child {
        let mut command = self.command(&["console", name]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().unwrap()
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a child's output until it holds a text.
pub fn wait_for_text(child: &mut Child, text: &str) -> String {
    use std::os::fd::AsFd;
    let stdout = child.stdout.as_mut().unwrap();
    let mut seen = Vec::new();
    let begun = Instant::now();
    while !String::from_utf8_lossy(&seen).contains(text) {
        let left = PATIENCE.checked_sub(begun.elapsed());
        let left =
            left.unwrap_or_else(|| panic!("no {text:?} in {}", String::from_utf8_lossy(&seen)));
        let mut ready = [rustix::event::PollFd::new(&stdout, rustix::event::PollFlags::IN)];
        let left = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
        rustix::event::poll(&mut ready, Some(&left)).unwrap();
        let mut buffer = [0; 4096];
        if ready[0].revents().is_empty() {
            continue;
        }
        let count = rustix::io::read(stdout.as_fd(), &mut buffer).unwrap();
        assert!(count > 0, "it ended before {text:?}: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

pub fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Waits until a process is gone.
pub fn wait_gone(pid: u32) {
    let begun = Instant::now();
    while Path::new(&format!("/proc/{pid}/fd/0")).exists() {
        assert!(begun.elapsed() < PATIENCE, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Signals a process that this suite started.
pub fn kill(pid: u32, signal: i32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A failing test leaves its machines to the same broom.
        let list = self.run(&["-o", "json", "ls", "-a"]);
        let list: Value = serde_json::from_slice(&list.stdout).unwrap_or_default();
        for machine in list.as_array().into_iter().flatten() {
            let id = machine["id"].as_str().unwrap_or("").to_owned();
            let _ = self.run(&["rm", "--force", &id]);
        }
        let _ = self.run(&["gc"]);
        let daemon = self.daemon();
        kill(daemon, 9);
        let home = self.home().to_owned();
        let begun = Instant::now();
        let left = loop {
            let left = processes_of(&home);
            if left.is_empty() || begun.elapsed() > Duration::from_secs(10) {
                break left;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if !std::thread::panicking() {
            assert_eq!(left, Vec::<String>::new(), "processes are left");
        }
        for line in left {
            eprintln!("left behind: {line}");
        }
    }
}

/// Processes whose command line or environment names the folder.
fn processes_of(home: &Path) -> Vec<String> {
    let needle = home.to_string_lossy().into_owned();
    let mut list = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        if pid == std::process::id() {
            continue;
        }
        let read = |name: &str| {
            let bytes = std::fs::read(entry.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        if read("cmdline").contains(&needle) || read("environ").contains(&needle) {
            list.push(format!("{pid} {}", read("cmdline")));
        }
    }
    list
}
