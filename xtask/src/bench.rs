//! Figures, as ratios against what people would run otherwise, side by side in one run. Nothing
//! is asserted here: what falls short is printed like everything else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{command, say};
use crate::{bench_door, bench_family, bench_flist, bench_vmadm, bench_vmm, bench_xcluster};

const ROUNDS: usize = 7;

struct Bench {
    /// Where the machine suite keeps what it makes.
    cache: PathBuf,
    lodge: PathBuf,
    home: PathBuf,
    kernel: String,
    initrd: String,
}

pub(crate) struct Row {
    pub(crate) figure: &'static str,
    pub(crate) measured: String,
    pub(crate) target: &'static str,
}

pub(crate) fn bench() -> Result<()> {
    let cache = PathBuf::from(std::env::var("HOME").unwrap_or_default()).join(".cache/lodge-test");
    let kernel =
        newest(&cache, "vmlinuz").context("run `make vm-test` once: it makes the guests")?;
    let initrd =
        newest(&cache, "shell-").context("run `make vm-test` once: it makes the guests")?;
    let home = std::env::temp_dir().join(format!("lodge-bench-{}", std::process::id()));
    fs::create_dir_all(&home)?;
    let lodge = std::env::current_dir()?.join("target/release/lodge");
    let bench = Bench { cache, lodge, home: home.clone(), kernel, initrd };
    let measured = bench.measure();
    // What a measurement that broke off has left.
    for machine in bench.json(&["ls", "--all"])?.as_array().into_iter().flatten() {
        bench.quiet(&["rm", "--force", machine["name"].as_str().unwrap_or_default()])?;
    }
    bench.quiet(&["gc"])?;
    if let Some(pid) = bench.daemon() {
        command("kill").arg(pid.to_string()).status()?;
    }
    std::thread::sleep(Duration::from_millis(300));
    fs::remove_dir_all(&home)?;
    measured
}

/// The file below `dir` with such a name that was made last.
fn newest(dir: &Path, start: &str) -> Option<String> {
    let mut found: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).ok()?.flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && (name.starts_with("linux-image") || name == "boot") {
                folders.push(path);
            } else if name.starts_with(start) {
                found.push((entry.metadata().ok()?.modified().ok()?, path));
            }
        }
    }
    found.into_iter().max().map(|(_, path)| path.to_string_lossy().into_owned())
}

/// What the program said; an error where it failed.
pub(crate) fn lodge(program: &Path, home: &Path, args: &[&str]) -> Result<String> {
    let mut command = command(&program.to_string_lossy());
    let output = command.args(args).env("LODGE_HOME", home).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("lodge {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Milliseconds from the last request to start a machine until this happened.
pub(crate) fn moment(program: &Path, home: &Path, name: &str, kind: &str) -> Result<f64> {
    let events: Value =
        serde_json::from_str(&lodge(program, home, &["-o", "json", "timeline", name])?)?;
    let at = |e: &Value| e["at_us"].as_f64().unwrap_or(0.0);
    let list = events.as_array().context("a timeline")?;
    let found = list.iter().find(|e| e["kind"] == kind).context("the moment")?;
    Ok((at(found) - at(&list[0])) / 1000.0)
}

pub(crate) fn end(mut child: Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

pub(crate) fn median(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    list[list.len() / 2]
}

fn p95(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    list[(list.len() * 95).div_ceil(100) - 1]
}

pub(crate) fn memory(pid: u32, field: &str, file: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().filter_map(|l| l.strip_prefix(field));
    line.filter_map(|l| l.split_whitespace().next()?.parse::<f64>().ok()).sum::<f64>() / 1024.0
}

/// A kernel with a PVH entry that halts: `cli; hlt; jmp` back.
fn halting_kernel() -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    let (note, code, end) = (176u64, 204u64, 208u64);
    let mut file = vec![0; end as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64; entry, where the segments are described, and two of them.
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &(BASE + code).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    let mut segment = |at: u64, kind: u32, flags: u32, from: u64, size: u64, align: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        for (i, word) in [from, BASE + from, BASE + from, size, size, align].iter().enumerate() {
            put(at + 8 + 8 * i as u64, &word.to_le_bytes());
        }
    };
    segment(64, 1, 7, 0, end, 0x1000);
    segment(120, 4, 4, note, code - note, 4);
    put(note, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    put(note + 12, b"Xen\0");
    put(note + 16, &(BASE + code).to_le_bytes());
    put(code, &[0xfa, 0xf4, 0xeb, 0xfd]);
    file
}

impl Bench {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = command(&self.lodge.to_string_lossy());
        command.args(args).env("LODGE_HOME", &self.home).stdin(Stdio::null());
        command
    }

    fn quiet(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output()?;
        if !output.status.success() {
            bail!("lodge {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.quiet(&[&["-o", "json"], args].concat())?)?)
    }

    fn daemon(&self) -> Option<u32> {
        let socket =
            std::os::unix::net::UnixStream::connect(self.home.join("run/lodge.sock")).ok()?;
        use std::io::{BufRead, Write};
        (&socket).write_all(b"{\"do\":\"ping\"}\n").ok()?;
        let mut line = String::new();
        std::io::BufReader::new(&socket).read_line(&mut line).ok()?;
        serde_json::from_str::<Value>(&line).ok()?["pid"].as_u64()?.try_into().ok()
    }

    fn create(&self, name: &str, nics: &str) -> Result<()> {
        self.create_on(name, nics, &self.kernel)
    }

    fn create_on(&self, name: &str, nics: &str, kernel: &str) -> Result<()> {
        let initrd = &self.initrd;
        let text = format!(
            "name: {name}\nmemory: 128MiB\nnics: {nics}\nready: console:GUEST-READY\n\
             boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet}}\n"
        );
        let file = self.home.join("machine.yaml");
        fs::write(&file, text)?;
        self.quiet(&["create", &file.to_string_lossy()]).map(drop)
    }

    /// Milliseconds from the request to a moment of the last start.
    fn moment(&self, name: &str, kind: &str) -> Result<f64> {
        moment(&self.lodge, &self.home, name, kind)
    }

    /// Tells each figure when it is known.
    fn measure(&self) -> Result<()> {
        self.quiet(&["doctor"])?;
        let only = std::env::args().nth(2);
        let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
        let tell = |rows: Vec<Row>| {
            for Row { figure, measured, target } in rows {
                say(&format!("{figure:<62} {measured:>28}   {target}"));
            }
        };
        if wanted("start") {
            tell(vec![self.added()?]);
            tell(vec![self.boot()?]);
            tell(vec![self.small()?]);
            tell(vec![self.back()?]);
            tell(self.many()?);
            tell(vec![self.ten()?]);
            tell(vec![self.adoption()?]);
        }
        if wanted("vmm") {
            tell(bench_vmm::measure(&self.lodge, &self.home)?);
        }
        if wanted("door") {
            tell(bench_door::rows(&self.lodge, &self.home, &self.kernel)?);
        }
        if wanted("vmadm") {
            tell(bench_vmadm::measure(&self.lodge, &self.home, &self.kernel, &self.initrd)?);
        }
        if wanted("xcluster") {
            tell(bench_xcluster::measure(&self.lodge, &self.home, &self.cache)?);
        }
        if wanted("flist") {
            tell(bench_flist::measure(&self.lodge, &self.home, &self.cache)?);
        }
        if wanted("family") {
            tell(bench_family::measure(&self.lodge, &self.home)?);
        }
        Ok(())
    }

    /// The hypervisor runs guest code once its control socket answers; by hand that is the same
    /// QEMU with the same arguments, asked in the same way.
    fn added(&self) -> Result<Row> {
        self.create("one", "[{}]")?;
        let (mut before, mut by_hand, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            self.quiet(&["start", "one"])?;
            before.push(self.moment("one", "entered")?);
            whole.push(self.moment("one", "answers")?);
            let inspected = self.json(&["inspect", "one"])?;
            self.quiet(&["stop", "one", "--force"])?;
            let (took, child) = self.hand_started(&inspected, &self.unpacked()?)?;
            end(child)?;
            by_hand.push(took);
        }
        let (whole, hand) = (median(whole), median(by_hand));
        let measured = format!("{:.0} ms ({:.0} to enter)", whole - hand, median(before));
        let figure = "added to a start, network and jail included";
        Ok(Row { figure, measured, target: "to reach: 30 ms" })
    }

    /// Milliseconds until it answers, and the hypervisor, which runs on.
    fn hand_started(&self, inspected: &Value, kernel: &str) -> Result<(f64, Child)> {
        let argv = inspected["runs"]["argv"].as_array().context("arguments")?;
        let argv: Vec<&str> = argv.iter().filter_map(Value::as_str).collect();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = self.home.join(format!("hand-{number}.sock"));
        let mut args: Vec<String> = Vec::new();
        let mut skip = false;
        for arg in argv.iter().skip(1) {
            if std::mem::take(&mut skip) {
                continue;
            }
            if arg.starts_with("tap,") || arg.starts_with("virtio-net") {
                args.pop();
                continue;
            }
            let text = match *arg {
                "/kernel" => kernel.to_owned(),
                "/initrd" => self.initrd.clone(),
                a if a.starts_with("socket,id=qmp") => {
                    format!("socket,id=qmp,path={},server=on,wait=off", socket.display())
                }
                a if a.starts_with("socket,id=console") => "null,id=console".to_owned(),
                a => a.to_owned(),
            };
            args.push(text);
        }
        let begun = Instant::now();
        let child = command("qemu-system-x86_64").args(&args).spawn()?;
        let greeted = loop {
            if let Ok(stream) = std::os::unix::net::UnixStream::connect(&socket) {
                use std::io::{BufRead, Write};
                let mut reader = std::io::BufReader::new(&stream);
                let mut line = String::new();
                reader.read_line(&mut line)?;
                (&stream).write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
                reader.read_line(&mut line)?;
                break begun.elapsed();
            }
            std::thread::sleep(Duration::from_micros(500));
        };
        Ok((greeted.as_secs_f64() * 1000.0, child))
    }

    fn unpacked(&self) -> Result<String> {
        let mut kernels = fs::read_dir(self.home.join("cache/kernels"))?.flatten();
        let found = kernels.find(|e| e.path().extension().is_some_and(|x| x == "pvh"));
        Ok(found.context("an unpacked kernel")?.path().to_string_lossy().into_owned())
    }

    /// Lodge's choice against the board and the kernel that people take by hand.
    fn boot(&self) -> Result<Row> {
        self.create("two", "[]")?;
        let measured = self.boots("two")?;
        let figure = "boot to a marker, against qemu -M q35 with the bzImage";
        Ok(Row { figure, measured, target: "to reach: 0.85x" })
    }

    /// The kernel that Lodge builds against the one that Debian does, on the same board by hand.
    fn small(&self) -> Result<Row> {
        let small = self.cache.join("kernels/ws/xcluster/bzImage-linux-6.1");
        let small = small.to_str().context("a path in UTF-8")?;
        self.create_on("small", "[]", small)?;
        let measured = self.boots("small")?;
        let figure = "the same with the small kernel, against Debian's";
        Ok(Row { figure, measured, target: "0.4x" })
    }

    /// A guest whose memory was saved, until it runs again, against booting it.
    fn back(&self) -> Result<Row> {
        let seconds = |args: &[&str]| -> Result<f64> {
            let begun = Instant::now();
            self.quiet(args)?;
            Ok(begun.elapsed().as_secs_f64())
        };
        let (mut saved, mut back, mut boot) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            boot.push(seconds(&["start", "two", "--wait", "ready"])?);
            saved.push(seconds(&["suspend", "two"])?);
            back.push(seconds(&["start", "two"])?);
            self.quiet(&["stop", "two", "--force"])?;
        }
        let (saved, back, boot) = (median(saved), median(back), median(boot));
        Ok(Row {
            figure: "back from saved memory, against a boot; saving it",
            measured: format!("{:.2}x ({back:.2} / {boot:.2} s); {saved:.2} s", back / boot),
            target: "reported",
        })
    }

    fn boots(&self, name: &str) -> Result<String> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            self.quiet(&["start", name, "--wait", "ready"])?;
            ours.push(begun.elapsed().as_secs_f64());
            self.quiet(&["stop", name, "--force"])?;
            theirs.push(self.plain_boot()?);
        }
        let (ours, theirs) = (median(ours), median(theirs));
        Ok(format!("{:.2}x ({ours:.2} s / {theirs:.2} s)", ours / theirs))
    }

    fn plain_boot(&self) -> Result<f64> {
        use std::io::Read;
        let args = "-accel tcg -cpu max -nodefaults -no-user-config -M q35 -m 128 -display none -serial stdio";
        let begun = Instant::now();
        let mut child = command("qemu-system-x86_64")
            .args(args.split(' '))
            .args([
                "-kernel",
                &self.kernel,
                "-initrd",
                &self.initrd,
                "-append",
                "console=ttyS0 quiet",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut seen = Vec::new();
        let stdout = child.stdout.as_mut().context("piped")?;
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&seen).contains("GUEST-READY") {
            let count = stdout.read(&mut buffer)?;
            if count == 0 {
                bail!("the guest by hand ended early");
            }
            seen.extend_from_slice(&buffer[..count]);
        }
        let took = begun.elapsed().as_secs_f64();
        child.kill()?;
        child.wait()?;
        Ok(took)
    }

    /// Two hundred machines: creating, listing, and what the daemon weighs.
    fn many(&self) -> Result<Vec<Row>> {
        use std::io::{BufRead, Write};
        let daemon = self.daemon().context("the daemon")?;
        let idle = memory(daemon, "VmRSS:", "status");
        let stream = std::os::unix::net::UnixStream::connect(self.home.join("run/lodge.sock"))?;
        let mut reader = std::io::BufReader::new(&stream);
        let mut ask = |request: String| -> Result<f64> {
            let begun = Instant::now();
            (&stream).write_all(request.as_bytes())?;
            let mut line = String::new();
            while line != "\n" {
                line.clear();
                reader.read_line(&mut line)?;
            }
            Ok(begun.elapsed().as_secs_f64() * 1000.0)
        };
        let mut creates = Vec::new();
        for i in 0..200 {
            creates.push(ask(format!(
                "{{\"do\":\"create\",\"draft\":{{\"name\":\"m{i}\",\"disks\":[{{\"size\":\"1GiB\"}}],\"nics\":[]}}}}\n"
            ))?);
        }
        let lists: Result<Vec<f64>> =
            (0..50).map(|_| ask("{\"do\":\"list\",\"all\":true}\n".to_owned())).collect();
        let loaded = memory(daemon, "VmRSS:", "status");
        let row = |figure, measured, target| Row { figure, measured, target };
        Ok(vec![
            row("create, durable, p50", format!("{:.2} ms", median(creates)), "to reach: 3 ms"),
            row(
                "ls of 200 through the socket, p50",
                format!("{:.2} ms", median(lists?)),
                "to reach: 2 ms",
            ),
            row("daemon, resident, idle", format!("{idle:.1} MiB"), "to reach: 12 MiB"),
            row("daemon, resident, 200 machines", format!("{loaded:.1} MiB"), "to reach: 18 MiB"),
        ])
    }

    /// What is added to ten starts at once, over ten by hand at once, against what is added to one.
    fn ten(&self) -> Result<Row> {
        // Guests that stand still at once: what competes is the starting, not the running.
        let halts = self.home.join("halts");
        fs::write(&halts, halting_kernel())?;
        let kernel = halts.to_string_lossy();
        let names: Vec<String> = (0..10).map(|i| format!("t{i}")).collect();
        for name in &names {
            self.create_on(name, "[]", &kernel)?;
        }
        let (mut alone, mut by_hand) = (Vec::new(), Vec::new());
        let mut inspected = Value::Null;
        for _ in 0..ROUNDS {
            self.quiet(&["start", "t0"])?;
            alone.push(self.moment("t0", "answers")?);
            inspected = self.json(&["inspect", "t0"])?;
            self.quiet(&["stop", "t0", "--force"])?;
            let (took, child) = self.hand_started(&inspected, &kernel)?;
            end(child)?;
            by_hand.push(took);
        }
        let (mut together, mut together_by_hand) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            std::thread::scope(|scope| {
                for name in &names {
                    scope.spawn(|| self.quiet(&["start", name]));
                }
            });
            let moments: Result<Vec<f64>> =
                names.iter().map(|n| self.moment(n, "answers")).collect();
            together.push(p95(moments?));
            for name in &names {
                self.quiet(&["stop", "--force", name])?;
            }
            // All run on until the last one answers, as they do under Lodge.
            let started: Result<Vec<(f64, Child)>> = std::thread::scope(|scope| {
                let started =
                    names.iter().map(|_| scope.spawn(|| self.hand_started(&inspected, &kernel)));
                let started: Vec<_> = started.collect();
                started.into_iter().map(|s| s.join().expect("no panic")).collect()
            });
            let (moments, children): (Vec<f64>, Vec<Child>) = started?.into_iter().unzip();
            children.into_iter().try_for_each(end)?;
            together_by_hand.push(p95(moments));
        }
        for name in &names {
            self.quiet(&["rm", "--force", name])?;
        }
        let (ten, ten_by_hand) = (median(together), median(together_by_hand));
        let (one, one_by_hand) = (median(alone), median(by_hand));
        let (ten_added, one_added) = (ten - ten_by_hand, one - one_by_hand);
        let measured = format!(
            "{:.1}x ({ten:.0}-{ten_by_hand:.0} / {one:.0}-{one_by_hand:.0} ms)",
            ten_added / one_added
        );
        Ok(Row {
            figure: "added to ten starts at once, p95, against one alone",
            measured,
            target: "to reach: 2x",
        })
    }

    fn adoption(&self) -> Result<Row> {
        let names: Vec<String> = (0..5).map(|i| format!("a{i}")).collect();
        for name in &names {
            self.create(name, "[]")?;
            self.quiet(&["start", name])?;
        }
        let pid = self.daemon().context("the daemon")?;
        let inspected = self.json(&["inspect", "a0"])?;
        let hypervisor = inspected["runs"]["pid"].as_u64().context("a process")?;
        let status = fs::read_to_string(format!("/proc/{hypervisor}/status"))?;
        let warden = status.lines().find_map(|l| l.strip_prefix("PPid:")).context("a parent")?;
        let private = memory(warden.trim().parse()?, "Private_Dirty:", "smaps_rollup");
        command("kill").args(["-9", &pid.to_string()]).status()?;
        std::thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        // The first command starts a daemon, which answers when all are taken up.
        self.quiet(&["ls"])?;
        let took = begun.elapsed().as_secs_f64();
        let list = self.quiet(&["events"])?;
        if list.matches("adopted").count() < 5 {
            bail!("not all were adopted");
        }
        say(&format!(
            "{:<62} {:>28}   to reach: 3 MiB",
            "warden, private",
            format!("{private:.1} MiB")
        ));
        for name in &names {
            self.quiet(&["rm", "--force", name])?;
        }
        let figure = "re-adoption of 5 after kill -9, the command included";
        Ok(Row { figure, measured: format!("{took:.3} s"), target: "to reach: 0.1 s" })
    }
}
