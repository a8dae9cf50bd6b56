//! Figures of roots that are flists: how much of a Debian is fetched until it is ready, what that
//! costs in time, and its file system against a plain folder behind the same transport. Nothing is
//! asserted.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::bench::{Row, lodge, memory};
use crate::run::command;

/// Files in a tree of which the server's memory is told.
const MANY: usize = 100_000;

struct Place<'a> {
    lodge: &'a Path,
    home: &'a Path,
    web: PathBuf,
    key: PathBuf,
}

pub(crate) fn measure(lodge: &Path, home: &Path, cache: &Path) -> Result<Vec<Row>> {
    let web = home.join("web");
    fs::create_dir_all(&web)?;
    let place = Place { lodge, home, web, key: home.join("flist-key") };
    let mut keygen = command("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&place.key).status()?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut server = place.nginx(port)?;
    let rows = place.debian(port);
    // Asked, so that its worker ends with it.
    command("kill").arg(server.id().to_string()).status()?;
    server.wait()?;
    let mut rows = rows?;
    rows.push(place.many(&cache.join("kernels/ws/xcluster/bzImage-linux-6.1"))?);
    Ok(rows)
}

impl Place<'_> {
    fn run(&self, args: &[&str]) -> Result<String> {
        lodge(self.lodge, self.home, args)
    }

    fn nginx(&self, port: u16) -> Result<Child> {
        let own = self.home.join("nginx");
        fs::create_dir_all(&own)?;
        let (own_text, web) = (own.display(), self.web.display());
        let config = format!(
            "daemon off;\nuser root;\nerror_log {own_text}/error.log;\npid {own_text}/pid;\nevents {{}}\nhttp {{\n\
             log_format sent '$body_bytes_sent';\naccess_log {own_text}/sent.log sent;\n\
             client_body_temp_path {own_text}/b; proxy_temp_path {own_text}/p; fastcgi_temp_path {own_text}/f;\n\
             uwsgi_temp_path {own_text}/u; scgi_temp_path {own_text}/s;\n\
             server {{ listen 127.0.0.1:{port}; root {web}; }}\n}}\n"
        );
        fs::write(own.join("conf"), config)?;
        Ok(command("nginx").arg("-c").arg(own.join("conf")).stderr(Stdio::null()).spawn()?)
    }

    /// Bytes that the web server has sent so far.
    fn sent(&self) -> f64 {
        let text = fs::read_to_string(self.home.join("nginx/sent.log")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse::<f64>().ok()).sum()
    }

    /// Seconds until a new machine of this name is ready.
    fn ready(&self, document: &Value) -> Result<f64> {
        let file = self.home.join("flist-machine.json");
        fs::write(&file, document.to_string())?;
        self.run(&["create", &file.to_string_lossy()])?;
        let name = document["name"].as_str().context("a name")?;
        let begun = Instant::now();
        self.run(&["start", name, "--wait", "ready", "--timeout", "300"])?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn debian(&self, port: u16) -> Result<Vec<Row>> {
        self.run(&["image", "build", "debian-12", "--packages", "linux-image-amd64"])?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (flist, blocks) = (self.web.join("debian.flist"), self.web.join("blocks"));
        let (store, route) =
            (format!("dir://{}", text(&blocks)), format!("http://127.0.0.1:{port}/blocks"));
        let args = ["flist", "create", "debian-12", &text(&flist), "--store", &store];
        let made = self.run(&[&args[..], &["--route", &route]].concat())?;
        let made: Value = serde_json::from_str(&made)?;
        let plain = self.home.join("plain");
        self.run(&["flist", "extract", &text(&flist), &text(&plain)])?;
        let ssh = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let document = |name: &str| {
            json!({
                "name": name,
                "flist": {"source": format!("http://127.0.0.1:{port}/debian.flist")},
                "memory": "1GiB",
                "ready": "console:^lodge-ready",
                "ssh_keys": [fs::read_to_string(self.key.with_extension("pub")).unwrap_or_default()],
                "ports": [format!("{ssh}:22")],
                "shares": [{"source": text(&plain), "tag": "plain", "read_only": true}],
            })
        };
        let before = self.sent();
        let cold = self.ready(&document("cold"))?;
        let fetched = self.sent() - before;
        self.run(&["rm", "--force", "cold"])?;
        let before = self.sent();
        let local = self.ready(&document("local"))?;
        let again = self.sent() - before;
        let (walk, read) = self.compared(ssh)?;
        self.run(&["rm", "--force", "local"])?;
        let number = |key: &str| made[key].as_f64().context("a number");
        let (stored, bytes) = (number("stored")?, number("bytes")?);
        let row = |figure, measured, target| Row { figure, measured, target };
        Ok(vec![
            row(
                "bytes fetched until a Debian is ready, of those in the flist",
                format!(
                    "{:.1} % of all, {:.1} % of stored ({:.0} MB)",
                    fetched / bytes * 100.0,
                    fetched / stored * 100.0,
                    fetched / 1e6
                ),
                "to reach: 10 %",
            ),
            row("bytes that a second machine of it fetches", format!("{again:.0}"), "to reach: 0"),
            row(
                "time to ready, cold over loopback, against all local",
                format!("{:.2}x ({cold:.1} / {local:.1} s)", cold / local),
                "to reach: 1.3x",
            ),
            row("a walk through it, against a plain folder over 9p", walk, "to reach: 0.5x"),
            row("reading it through, against a plain folder over 9p", read, "to reach: 0.5x"),
        ])
    }

    /// In the guest, its caches dropped before each: how fast the root is for a plain folder's 1.
    fn compared(&self, port: u16) -> Result<(String, String)> {
        let script = "mkdir -p /mnt && mount -t 9p -o \
             trans=virtio,version=9p2000.L,cache=loose,ro plain /mnt && \
             t() { echo 3 > /proc/sys/vm/drop_caches; a=$(date +%s%N); eval \"$1\"; \
             echo $((($(date +%s%N) - a) / 1000000)); }; for i in 1 2 3; do \
             t 'find /usr/lib -xdev -ls >/dev/null'; t 'find /mnt/usr/lib -ls >/dev/null'; \
             t 'cat /usr/lib/x86_64-linux-gnu/*.so.* /usr/lib/modules/*/kernel/net/*/*.ko >/dev/null'; \
             t 'cat /mnt/usr/lib/x86_64-linux-gnu/*.so.* /mnt/usr/lib/modules/*/kernel/net/*/*.ko >/dev/null'; done";
        let output = self.ssh(port, script).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let all: Vec<f64> = said.lines().filter_map(|line| line.trim().parse().ok()).collect();
        if all.len() != 12 {
            bail!("the guest said {said:?} {}", String::from_utf8_lossy(&output.stderr));
        }
        // The first round has fetched what there was to fetch.
        let mean = |i: usize| (all[4 + i] + all[8 + i]) / 2.0;
        let text = |own: f64, plain: f64| format!("{:.2}x ({own:.0} / {plain:.0} ms)", plain / own);
        Ok((text(mean(0), mean(1)), text(mean(2), mean(3))))
    }

    fn ssh(&self, port: u16, script: &str) -> Command {
        let mut ssh = command("ssh");
        ssh.args(["-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        ssh.arg("-i").arg(&self.key).args(["-p", &port.to_string(), "root@127.0.0.1", script]);
        ssh.stdin(Stdio::null());
        ssh
    }

    /// The server's memory with many files; what boots of them is not looked at.
    fn many(&self, kernel: &Path) -> Result<Row> {
        let root = self.home.join("many");
        for folder in 0..100 {
            let folder = root.join(format!("folder-{folder}"));
            fs::create_dir_all(&folder)?;
            for file in 0..MANY / 100 {
                fs::write(folder.join(format!("file-{file}")), format!("{file}"))?;
            }
        }
        for folder in ["boot", "bin", "sbin"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        fs::copy("/bin/busybox", root.join("sbin/init"))?;
        fs::copy(kernel, root.join("boot/vmlinuz"))?;
        fs::write(
            root.join("boot/boot.yaml"),
            "kernel: /boot/vmlinuz\ncmdline: init=/bin/busybox sleep 1000\n",
        )?;
        let (flist, store) =
            (self.home.join("many.flist"), format!("dir://{}", self.home.join("m").display()));
        let (root_text, flist_text) = (root.to_string_lossy(), flist.to_string_lossy());
        self.run(&["flist", "create", &root_text, &flist_text, "--store", &store])?;
        let run = ["run", &flist_text, "--name", "many", "--store", &store, "--net", "none"];
        self.run(&run)?;
        std::thread::sleep(Duration::from_secs(4));
        let pid = self.server().context("the process that serves the root")?;
        let private = memory(pid, "Private_Clean:", "smaps_rollup")
            + memory(pid, "Private_Dirty:", "smaps_rollup");
        self.run(&["rm", "--force", "many"])?;
        Ok(Row {
            figure: "memory of the process that serves a root of 100,000 files",
            measured: format!("{private:.1} MiB private"),
            target: "to reach: 32 MiB",
        })
    }

    fn server(&self) -> Option<u32> {
        let home = self.home.to_string_lossy().into_owned();
        let pids = fs::read_dir("/proc").ok()?.flatten();
        let mut pids = pids.filter_map(|e| e.file_name().to_string_lossy().parse::<u32>().ok());
        pids.find(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("\0flistd\0") && words.contains(&home)
        })
    }
}
