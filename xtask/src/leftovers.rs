//! Host objects that the suite may have left: interfaces, packet filter tables, control groups,
//! mounts, folders, processes. Only looks.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use crate::run::command;

/// Networks end a moment after their last machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// Everything that looks like Lodge's.
pub(crate) fn look() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut lines = |what: &str, program: &str, args: &[&str], part: &str| {
        let output = command(program).args(args).output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        for line in text.unwrap_or_default().lines().filter(|l| l.contains(part)) {
            found.insert(format!("{what} {}", line.trim()));
        }
    };
    lines("interface", "ip", &["-o", "-br", "link"], "lg");
    lines("table", "nft", &["list", "tables"], "lodge_");
    lines("process", "ps", &["-eo", "pid,args"], "lodge-test-");
    for mount in fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines() {
        if mount.contains("lodge") {
            found.insert(format!("mount {mount}"));
        }
    }
    for group in ["cpu", "memory", "pids", "."] {
        names(&format!("/sys/fs/cgroup/{group}/lodge"), "", "group", &mut found);
    }
    names("/tmp", "lodge-", "folder", &mut found);
    names("/tmp", "mmdebstrap.", "folder", &mut found);
    found
}

fn names(dir: &str, start: &str, what: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(start) && entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.insert(format!("{what} {dir}/{name}"));
        }
    }
}

/// What there is now and was not before.
pub(crate) fn since(before: &BTreeSet<String>) -> Vec<String> {
    let begun = Instant::now();
    loop {
        let left: Vec<String> = look().difference(before).cloned().collect();
        if left.is_empty() || begun.elapsed() > PATIENCE {
            return left;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
