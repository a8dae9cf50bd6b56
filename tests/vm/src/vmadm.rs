//! An instance spoken to as `vmadm`, with its streams and exit statuses apart.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Lab;
use crate::lab::PATIENCE;

/// What a command printed, and its exit status.
#[derive(Debug)]
pub struct Said {
    pub out: String,
    pub err: String,
    pub code: i32,
}

pub struct Vmadm {
    pub lab: Lab,
}

/// The guide's machine.
pub const SEED: &str = r#"{"brand":"kvm","vcpus":1,"autoboot":false,"ram":1024,
    "resolvers":["208.67.222.222","208.67.220.220"],
    "disks":[{"boot":true,"model":"virtio","size":40960}],
    "nics":[{"nic_tag":"admin","model":"virtio","ip":"10.88.88.51","netmask":"255.255.255.0",
    "gateway":"10.88.88.1","primary":1}]}"#;

impl Vmadm {
    pub fn new() -> Self {
        Self { lab: Lab::new() }
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut all = vec!["vmadm"];
        all.extend(words);
        self.lab.command(&all)
    }

    pub fn says(&self, words: &[&str], input: &str) -> Said {
        let mut command = self.command(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that does not read its input has ended already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        Said { out: text(&output.stdout), err: text(&output.stderr), code }
    }

    /// Runs a command that must succeed; returns its message.
    pub fn ok(&self, words: &[&str]) -> String {
        self.feed(words, "")
    }

    /// The same with something to read.
    pub fn feed(&self, words: &[&str], input: &str) -> String {
        let said = self.says(words, input);
        assert_eq!(said.code, 0, "{words:?}: {said:?}");
        if said.err.is_empty() { said.out } else { said.err.trim_end().to_owned() }
    }

    /// Runs a command that must fail with status 1; returns its complaint.
    pub fn fails(&self, words: &[&str], input: &str) -> String {
        let said = self.says(words, input);
        assert_eq!(said.code, 1, "{words:?}: {said:?}");
        assert_eq!(said.out, "", "{words:?}: data belongs to no failure");
        said.err.trim_end().to_owned()
    }

    /// A new machine's identity.
    pub fn create(&self, document: &str) -> String {
        let message = self.feed(&["create"], document);
        let uuid = message.strip_prefix("Successfully created VM ");
        uuid.unwrap_or_else(|| panic!("{message}")).to_owned()
    }

    pub fn get(&self, uuid: &str) -> Value {
        serde_json::from_str(&self.ok(&["get", uuid])).unwrap()
    }

    pub fn info(&self, uuid: &str, kinds: &str) -> Value {
        serde_json::from_str(&self.ok(&["info", uuid, kinds])).unwrap()
    }

    pub fn state(&self, uuid: &str) -> String {
        self.get(uuid)["state"].as_str().unwrap().to_owned()
    }

    /// Puts a medium into a machine's folder.
    pub fn bring(&self, uuid: &str, file: &str, name: &str) {
        let root = self.get(uuid)["zonepath"].as_str().unwrap().to_owned() + "/root/";
        std::fs::copy(file, root + name).unwrap();
    }

    /// Waits until a machine's console holds a text; returns all of it.
    pub fn console(&self, uuid: &str, text: &str) -> String {
        let begun = std::time::Instant::now();
        loop {
            let said = self.lab.console_text(uuid);
            if said.contains(text) {
                return said;
            }
            assert!(begun.elapsed() < PATIENCE, "no {text:?} in {said}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

impl Default for Vmadm {
    fn default() -> Self {
        Self::new()
    }
}
