//! An instance with its Connect door open, and the plainest of its clients: curl, as people type
//! it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::lab::{command, wait_gone};
use crate::{Lab, assets};

pub struct Server {
    pub lab: Lab,
    pub port: u16,
    child: Child,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The header lines, trailers included, in lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {text} ({self:?})"))
    }

    /// The code and the message of an error.
    pub fn error(&self) -> (String, String) {
        let value = self.json();
        let part = |key: &str| value[key].as_str().unwrap_or("").to_owned();
        (part("code"), part("message"))
    }
}

impl Server {
    /// `settings`: what stands in `[metald]`.
    pub fn new(settings: &str) -> Self {
        Self::of(Lab::new(), settings)
    }

    pub fn of(lab: Lab, settings: &str) -> Self {
        let folder = lab.home().join("assets");
        std::fs::create_dir(&folder).unwrap();
        std::fs::copy(assets::kernel(), folder.join("vmlinux")).unwrap();
        std::fs::copy(assets::shell(), folder.join("vmlinux.initrd")).unwrap();
        let disk = |name: &str, byte: u8| {
            std::fs::write(folder.join(name), vec![byte; 4 << 20]).unwrap();
        };
        disk("rootfs.ext4", b'R');
        disk("app.ext4", b'A');
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let text =
            format!("[metald]\nassets = [{folder:?}]\nlisten = '127.0.0.1:{port}'\n{settings}");
        std::fs::write(lab.home().join("lodge.toml"), text).unwrap();
        let child = start(&lab);
        Self { lab, port, child }
    }

    /// Kills the daemon and starts it anew, as a supervisor would.
    pub fn restart(&mut self) {
        let pid = self.child.id();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        wait_gone(pid);
        self.child = start(&self.lab);
    }

    pub fn asset(&self, name: &str) -> PathBuf {
        self.lab.home().join("assets").join(name)
    }

    /// A machine that boots in a moment and is then a shell.
    pub fn good(&self) -> Value {
        json!({
            "cpu": {"vcpu_count": 1},
            "memory": {"size_bytes": 134_217_728},
            "boot": {
                "kernel_path": self.asset("vmlinux"),
                "kernel_args": "console=ttyS0 quiet cryptomgr.notests reboot=k panic=1 pci=off",
            },
            "storage": [{"path": self.asset("rootfs.ext4"), "readonly": false}],
        })
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Curl with these arguments, on a path.
    pub fn curl(&self, path: &str, args: &[&str], body: &[u8]) -> Answer {
        let head = tempfile::NamedTempFile::new().unwrap();
        let mut curl = command("curl");
        curl.args(["-s", "-S", "--max-time", "170", "-D"]).arg(head.path()).args(args);
        if !body.is_empty() || args.contains(&"POST") {
            curl.args(["--data-binary", "@-"]);
        }
        curl.arg(self.url(path)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = curl.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let body = body.to_vec();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            let _ = stdin.write_all(&body);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        let head = std::fs::read_to_string(head.path()).unwrap().to_lowercase();
        let first = head.lines().rfind(|l| l.starts_with("http/")).unwrap_or("");
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Answer { status, head, body: output.stdout }
    }

    /// A call in JSON.
    pub fn call(&self, method: &str, body: Value) -> Answer {
        self.call_as(method, body, None)
    }

    pub fn call_as(&self, method: &str, body: Value, token: Option<&str>) -> Answer {
        let header = token.map(|token| format!("Authorization: {token}"));
        let mut args = vec!["-X", "POST", "-H", "Content-Type: application/json"];
        args.extend(header.iter().flat_map(|h| ["-H", h.as_str()]));
        self.curl(
            &format!("/vmprovisioner.v1.VmService/{method}"),
            &args,
            body.to_string().as_bytes(),
        )
    }

    /// A call that must succeed.
    pub fn ok(&self, method: &str, body: Value) -> Value {
        let answer = self.call(method, body.clone());
        assert_eq!(
            answer.status,
            200,
            "{method} {body}: {}",
            String::from_utf8_lossy(&answer.body)
        );
        answer.json()
    }

    /// A call that must be refused with a code; the message.
    pub fn refused(&self, method: &str, body: Value, status: u16, code: &str) -> String {
        let answer = self.call(method, body.clone());
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, status, "{method} {body}: {text}");
        let (found, message) = answer.error();
        assert_eq!(found, code, "{method} {body}: {text}");
        message
    }

    /// Creates a good machine, changed by whoever asks; its identity.
    pub fn create(&self, change: impl FnOnce(&mut Value)) -> String {
        let mut config = self.good();
        change(&mut config);
        self.ok("CreateVm", json!({"config": config}))["vmId"].as_str().unwrap().to_owned()
    }

    pub fn state(&self, id: &str) -> String {
        let info = self.ok("GetVmInfo", json!({"vm_id": id}));
        info["state"].as_str().unwrap_or("absent").to_owned()
    }

    /// Waits for a text on the guest's console.
    pub fn await_console(&self, id: &str, text: &str) {
        self.lab.until(text, || self.lab.console_text(&self.name(id)).contains(text));
    }

    /// The machine's name on the command line.
    pub fn name(&self, id: &str) -> String {
        let list = self.lab.json(&["ls", "-a"]);
        let named = list.as_array().unwrap().iter().any(|m| m["name"] == id);
        assert!(named, "{id} in {list}");
        id.to_owned()
    }
}

fn start(lab: &Lab) -> Child {
    let mut serve = lab.command(&["serve"]);
    let mut child = serve.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

impl Drop for Server {
    fn drop(&mut self) {
        // Machines first, while there is somebody to take them down; the lab ends the daemon.
        for machine in self.lab.json(&["ls", "-a"]).as_array().into_iter().flatten() {
            let _ = self.lab.run(&["rm", "--force", machine["id"].as_str().unwrap_or("")]);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
