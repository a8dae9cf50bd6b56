//! A real SSH server for root of this host, whose home is a folder of the test's own, and which
//! does one thing only.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::Lab;
use crate::lab::command;
use crate::python::must;
use crate::zero_os::{free_port, text};

pub struct SshServer {
    child: Child,
    port: u16,
    folder: PathBuf,
}

impl SshServer {
    /// Whoever comes with the right key runs this, whatever it asks for.
    pub fn new(folder: &Path, does: &str) -> Self {
        let (home, port) = (folder.join("home"), free_port());
        let private = |path: &Path| fs::DirBuilder::new().mode(0o700).recursive(true).create(path);
        private(&home.join(".ssh")).unwrap();
        let (host, key) = (folder.join("host"), folder.join("key"));
        let made = command("dropbearkey").args(["-t", "ed25519", "-f"]).arg(&host).output();
        let said = must(made);
        let public = said.lines().find(|line| line.starts_with("ssh-")).unwrap();
        let words: Vec<&str> = public.split(' ').collect();
        let known = format!("[127.0.0.1]:{port} {} {}\n", words[0], words[1]);
        fs::write(folder.join("known"), known).unwrap();
        let mut keygen = command("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key);
        must(keygen.output());
        let keys = home.join(".ssh/authorized_keys");
        fs::copy(folder.join("key.pub"), &keys).unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
        let script = "mount --bind \"$1\" /root; shift; exec dropbear -F -E -s \"$@\"";
        let child = command("unshare")
            .args(["-m", "sh", "-ec", script, "sh", text(&home), "-p"])
            .arg(format!("127.0.0.1:{port}"))
            .args(["-r", text(&host), "-P", text(&folder.join("pid")), "-c", does])
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("log")).unwrap())
            .spawn();
        let server = Self { child: child.unwrap(), port, folder: folder.to_owned() };
        let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        let begun = std::time::Instant::now();
        while !listens() {
            assert!(begun.elapsed() < crate::lab::PATIENCE, "the SSH server does not come up");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server
    }

    /// The way to another instance on this host.
    pub fn to(lab: &Lab) -> Self {
        let folder = lab.home().join("ssh");
        fs::create_dir_all(&folder).unwrap();
        let (home, program) = (lab.home().display(), crate::lab::program());
        Self::new(&folder, &format!("LODGE_HOME={home} {} receive", program.display()))
    }

    pub fn url(&self) -> String {
        let Self { port, folder, .. } = self;
        let folder = folder.display();
        format!("ssh://root@127.0.0.1:{port}?keyfile={folder}/key&known_hosts={folder}/known")
    }

    /// As libvirt writes it.
    pub fn libvirt_url(&self) -> String {
        format!("qemu+{}", self.url()).replace('?', "/system?")
    }
}

impl Drop for SshServer {
    fn drop(&mut self) {
        crate::lab::kill(self.child.id(), 15);
        let _ = self.child.wait();
    }
}
