//! Flists of small guests, real servers for their blocks, and the plainest client of the Zero-OS
//! door: the Redis protocol as it is on the wire.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Lab;
use crate::lab::{PATIENCE, command, wait_gone};

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin
if [ -e /sys/class/net/eth0 ]; then
    ip link set lo up
    ip link set eth0 up
    udhcpc -q -n -i eth0 -s /etc/dhcp
    httpd -p 80 -h /www
fi
cat /etc/hello
echo GUEST-READY
exec sh
"#;

const DHCP: &str = "#!/bin/busybox sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo DHCP-GOT $ip
";

/// A free port of this host.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A root that boots in a second: busybox, and the small kernel, which has 9p in it.
pub fn small_root(to: &Path) {
    let (kernel, _) = crate::xcluster::kernel();
    for dir in ["bin", "boot", "dev", "etc", "proc", "sbin", "sys", "tmp", "www", "root", "srv"] {
        fs::create_dir_all(to.join(dir)).unwrap();
    }
    fs::set_permissions(to.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy("/bin/busybox", to.join("bin/busybox")).unwrap();
    let listed = command("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8_lossy(&listed.stdout).lines().filter(|a| *a != "busybox") {
        symlink("busybox", to.join("bin").join(applet)).unwrap();
    }
    fs::copy(kernel, to.join("boot/vmlinuz")).unwrap();
    let file = |path: &str, mode: u32, text: &str| {
        fs::write(to.join(path), text).unwrap();
        fs::set_permissions(to.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    file("sbin/init", 0o755, INIT);
    file("etc/dhcp", 0o755, DHCP);
    file("etc/hello", 0o644, "hello from the flist\n");
    file("www/index.html", 0o644, "served\n");
    file(
        "boot/boot.yaml",
        0o644,
        "kernel: /boot/vmlinuz\ncmdline: console=ttyS0 quiet cryptomgr.notests\n",
    );
    // More than one block, and something to read that no start needs.
    let big: Vec<u8> =
        (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(to.join("srv/big"), big).unwrap();
}

/// A folder with the small root's flist, made with its blocks in `blocks` beside it.
pub struct Flist {
    pub dir: PathBuf,
    pub file: PathBuf,
    pub store: String,
}

impl Flist {
    /// `change` is shown the root before the flist is made.
    pub fn new(lab: &Lab, name: &str, change: impl FnOnce(&Path)) -> Self {
        let dir = lab.home().join("flist").join(name.replace('.', "-"));
        let root = dir.join("root");
        small_root(&root);
        change(&root);
        let (file, store) = (dir.join(name), format!("dir://{}", dir.join("blocks").display()));
        // By whoever may read it all; an ordinary user's machine only reads what comes of it.
        let mut create = command(crate::lab::program());
        create.args(["flist", "create", text(&root), text(&file), "--store", &store]);
        let output = create.env("LODGE_HOME", lab.home()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::remove_dir_all(&root).unwrap();
        Self { dir, file, store }
    }

    pub fn path(&self) -> &str {
        text(&self.file)
    }

    /// All files that are blocks.
    pub fn blocks(&self) -> Vec<PathBuf> {
        let folders = fs::read_dir(self.dir.join("blocks")).unwrap().flatten();
        let files = folders.flat_map(|f| fs::read_dir(f.path()).unwrap().flatten());
        files.map(|f| f.path()).collect()
    }

    /// Boots a machine without a network and waits until it says that it is there.
    pub fn boot(&self, lab: &Lab, name: &str, more: &[&str]) {
        let mut args = vec!["run", self.path(), "--name", name, "--memory", "256MiB"];
        args.extend(["--store", &self.store, "--net", "none"]);
        args.extend(["--ready", "console:GUEST-READY", "--wait", "ready", "--timeout", "170"]);
        args.extend(more);
        lab.ok(&args);
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A server that a test started; ends with it.
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Server {
    fn wait(mut child: Child, port: u16) -> Self {
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < PATIENCE && child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, port }
    }

    /// Redis, as Debian packs it.
    pub fn redis() -> Self {
        let port = free_port();
        let child = command("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .current_dir("/tmp")
            .stdout(Stdio::null())
            .spawn();
        Self::wait(child.unwrap(), port)
    }

    /// nginx, serving the files of a folder.
    pub fn nginx(folder: &Path) -> Self {
        let port = free_port();
        let own = folder.join(format!(".nginx-{port}"));
        fs::create_dir_all(&own).unwrap();
        let config = format!(
            "daemon off;\nworker_processes 1;\nuser root;\nerror_log {own}/error.log;\npid {own}/pid;\n\
             events {{ worker_connections 256; }}\nhttp {{\n  access_log {own}/access.log;\n  \
             client_body_temp_path {own}/b; proxy_temp_path {own}/p; fastcgi_temp_path {own}/f;\n  \
             uwsgi_temp_path {own}/u; scgi_temp_path {own}/s;\n  \
             server {{ listen 127.0.0.1:{port}; root {folder}; }}\n}}\n",
            own = own.display(),
            folder = folder.display(),
        );
        fs::write(own.join("conf"), config).unwrap();
        let child = command("nginx").arg("-c").arg(own.join("conf")).stderr(Stdio::null()).spawn();
        Self::wait(child.unwrap(), port)
    }

    /// A server of the S3 protocol, out of a Python environment.
    pub fn s3(environment: &Path) -> Self {
        let port = free_port();
        let child = command(environment.join("bin/moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self::wait(child.unwrap(), port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        crate::lab::kill(self.child.id(), 15);
        let _ = self.child.wait();
    }
}

/// An instance with its Zero-OS door open.
pub struct Door {
    pub lab: Lab,
    pub port: u16,
    child: Child,
}

impl Door {
    /// `settings`: what stands in `[zero_os]`.
    pub fn new(settings: &str) -> Self {
        Self::of(Lab::new(), settings)
    }

    pub fn of(lab: Lab, settings: &str) -> Self {
        let file = format!("[metald]\nlisten = 'off'\n[zero_os]\n{settings}\n");
        fs::write(lab.home().join("lodge.toml"), file).unwrap();
        let port = free_port();
        let child = Self::serve(&lab, port);
        Self { lab, port, child }
    }

    fn serve(lab: &Lab, port: u16) -> Child {
        let mut serve = lab.command(&["serve", "--zero-os", &format!("127.0.0.1:{port}")]);
        let mut child = serve.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        child
    }

    /// Ends the daemon as a power cut would, and starts it again.
    pub fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.child = Self::serve(&self.lab, self.port);
    }

    pub fn client(&self) -> Client {
        Client::connect(self.port)
    }

    /// Where the door is open in a namespace.
    pub fn client_at(&self, namespace: &crate::namespace::Namespace) -> Client {
        let port = self.port;
        namespace.visit(move || Client::connect(port))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let pid = self.child.id();
        let _ = self.child.kill();
        let _ = self.child.wait();
        wait_gone(pid);
    }
}

/// A value of the Redis protocol.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Text(String),
    Error(String),
    Number(i64),
    Bytes(Vec<u8>),
    Nothing,
    List(Vec<Said>),
}

pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, words: &[&[u8]]) -> Said {
        let mut out = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            out.extend(format!("${}\r\n", word.len()).as_bytes());
            out.extend(*word);
            out.extend(b"\r\n");
        }
        self.raw(&out)
    }

    pub fn raw(&mut self, bytes: &[u8]) -> Said {
        self.0.get_mut().write_all(bytes).unwrap();
        self.read()
    }

    pub fn say(&mut self, line: &str) -> Said {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        self.send(&words)
    }

    fn read(&mut self) -> Said {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let line = line.trim_end();
        let (kind, rest) = line.split_at(line.len().min(1));
        match kind {
            "+" => Said::Text(rest.into()),
            "-" => Said::Error(rest.into()),
            ":" => Said::Number(rest.parse().unwrap()),
            "_" => Said::Nothing,
            "$" | "*" | "%" if rest == "-1" => Said::Nothing,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                Said::Bytes(bytes)
            }
            "*" => Said::List((0..rest.parse().unwrap()).map(|_| self.read()).collect()),
            "%" => {
                let count: usize = rest.parse().unwrap();
                Said::List((0..count * 2).map(|_| self.read()).collect())
            }
            _ => panic!("{line:?}"),
        }
    }

    /// Hands a job in under a fresh name and returns its result.
    pub fn job(&mut self, command: &str, arguments: Value) -> Value {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = format!("job-{}-{number}", std::process::id());
        let job = json!({
            "id": id, "command": command, "arguments": arguments, "queue": null,
            "max_time": null, "stream": false, "tags": null,
        });
        self.hand_in(&job);
        self.result(&id)
    }

    pub fn hand_in(&mut self, job: &Value) {
        let said = self.send(&[b"RPUSH", b"core:default", job.to_string().as_bytes()]);
        assert!(matches!(said, Said::Number(_)), "{said:?}");
    }

    /// As clients wait for it.
    pub fn result(&mut self, id: &str) -> Value {
        let flag = format!("result:{id}:flag");
        let said = self.send(&[b"BRPOPLPUSH", flag.as_bytes(), flag.as_bytes(), b"10"]);
        assert_eq!(said, Said::Bytes(Vec::new()));
        let key = format!("result:{id}");
        match self.send(&[b"BRPOPLPUSH", key.as_bytes(), key.as_bytes(), b"170"]) {
            Said::Bytes(bytes) => serde_json::from_slice(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The value of a job that succeeds.
    pub fn value(&mut self, command: &str, arguments: Value) -> Value {
        let result = self.job(command, arguments);
        assert_eq!(result["state"], "SUCCESS", "{command}: {result}");
        assert_eq!((&result["level"], &result["code"]), (&json!(20), &json!(0)));
        serde_json::from_str(result["data"].as_str().unwrap()).unwrap()
    }

    /// Code and message of a job that fails.
    pub fn error(&mut self, command: &str, arguments: Value) -> (i64, String) {
        let result = self.job(command, arguments);
        assert_eq!(result["state"], "ERROR", "{command}: {result}");
        let message = serde_json::from_str(result["data"].as_str().unwrap()).unwrap();
        (result["code"].as_i64().unwrap(), message)
    }
}
