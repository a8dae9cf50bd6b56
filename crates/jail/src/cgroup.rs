//! Resource limits through control groups: version 2, version 1, or none at all where the host
//! gives us neither. One group per confined process; made, joined by the jail, removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a group enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Percent of one CPU.
    pub cpu_percent: Option<u32>,
    /// 1 to 10000, 100 being the usual.
    pub cpu_weight: u32,
    pub memory_bytes: Option<u64>,
    pub threads: u32,
}

/// Which hierarchy this process may make groups in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hierarchy {
    /// The folder to make groups in.
    V2(PathBuf),
    /// The mounted controllers, each with the folder to make groups in.
    V1(Vec<(String, PathBuf)>),
    /// Why there are no limits.
    None(String),
}

const PERIOD_US: u64 = 100_000;
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

impl Hierarchy {
    /// Looks at what is mounted under `root` (`/sys/fs/cgroup`) and whether it can be written.
    pub fn detect(root: &Path) -> Self {
        if let Ok(list) = fs::read_to_string(root.join("cgroup.controllers")) {
            return Self::detect_v2(root, &list);
        }
        let found = CONTROLLERS.iter().map(|name| (name.to_string(), root.join(name)));
        let found: Vec<_> = found.filter(|(_, path)| path.join("cgroup.procs").exists()).collect();
        if found.is_empty() {
            return Self::None(format!("no cgroup controllers are mounted in {}", root.display()));
        }
        match found.iter().find(|(_, path)| !writable(path)) {
            Some((_, path)) => Self::None(format!("{} is not writable", path.display())),
            None => Self::V1(found),
        }
    }

    fn detect_v2(root: &Path, controllers: &str) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
        let is_root = rustix::process::geteuid().is_root();
        let base = if is_root { root.to_owned() } else { root.join(own) };
        let missing: Vec<_> = CONTROLLERS
            .iter()
            .filter(|c| !controllers.split_whitespace().any(|w| w == **c))
            .collect();
        if !missing.is_empty() {
            return Self::None(format!("cgroup v2 offers no {missing:?} controller"));
        }
        if !writable(&base) {
            return Self::None(format!("{} is not delegated to this user", base.display()));
        }
        Self::V2(base)
    }
}

fn writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Makes the group `lodge/NAME` with its limits; returns the files to join it by.
pub fn create(hierarchy: &Hierarchy, name: &str, limits: &Limits) -> io::Result<Vec<PathBuf>> {
    let mut joins = Vec::new();
    for (dir, settings) in groups(hierarchy, name, limits) {
        if let (Hierarchy::V2(base), Some(parent)) = (hierarchy, dir.parent()) {
            fs::create_dir_all(parent)?;
            for above in [base.as_path(), parent] {
                // Fails where a controller is already on or the group has processes of its own.
                let _ = fs::write(above.join("cgroup.subtree_control"), "+cpu +memory +pids");
            }
        }
        fs::create_dir_all(&dir)?;
        for (file, value) in settings {
            fs::write(dir.join(file), value)?;
        }
        joins.push(dir.join("cgroup.procs"));
    }
    Ok(joins)
}

/// Puts other limits in force on a group that is there; what is not limited any more is set free.
pub fn change(hierarchy: &Hierarchy, name: &str, limits: &Limits) -> io::Result<()> {
    for (dir, settings) in groups(hierarchy, name, limits) {
        for (file, value) in free(hierarchy, &dir).into_iter().chain(settings) {
            fs::write(dir.join(file), value)?;
        }
    }
    Ok(())
}

/// What lifts the limits of a group that may have none.
fn free(hierarchy: &Hierarchy, dir: &Path) -> Settings {
    let names: &[&'static str] = match hierarchy {
        Hierarchy::V2(_) => &["cpu.max", "memory.max"],
        Hierarchy::V1(_) => &["cpu.cfs_quota_us", "memory.limit_in_bytes"],
        Hierarchy::None(_) => &[],
    };
    let lifted = if matches!(hierarchy, Hierarchy::V2(_)) { "max" } else { "-1" };
    let there = names.iter().filter(|name| dir.join(name).exists());
    there.map(|name| (*name, lifted.to_owned())).collect()
}

/// Removes the group; a group that does not exist is removed already.
pub fn remove(hierarchy: &Hierarchy, name: &str) -> io::Result<()> {
    for dir in folders(hierarchy, name) {
        match fs::remove_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The names of all groups that `create` made and nobody removed.
pub fn list(hierarchy: &Hierarchy) -> Vec<String> {
    let mut names: Vec<String> = folders(hierarchy, "x")
        .iter()
        .filter_map(|dir| fs::read_dir(dir.parent()?).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.dedup();
    names
}

fn folders(hierarchy: &Hierarchy, name: &str) -> Vec<PathBuf> {
    match hierarchy {
        Hierarchy::V2(base) => vec![base.join("lodge").join(name)],
        Hierarchy::V1(list) => list.iter().map(|(_, p)| p.join("lodge").join(name)).collect(),
        Hierarchy::None(_) => Vec::new(),
    }
}

type Settings = Vec<(&'static str, String)>;

fn groups(hierarchy: &Hierarchy, name: &str, limits: &Limits) -> Vec<(PathBuf, Settings)> {
    let quota = limits.cpu_percent.map(|percent| u64::from(percent) * PERIOD_US / 100);
    let weight = u64::from(limits.cpu_weight);
    let pids = limits.threads.to_string();
    match hierarchy {
        Hierarchy::V2(base) => {
            let mut settings = vec![("cpu.weight", weight.to_string()), ("pids.max", pids)];
            settings.extend(quota.map(|quota| ("cpu.max", format!("{quota} {PERIOD_US}"))));
            settings.extend(limits.memory_bytes.map(|n| ("memory.max", n.to_string())));
            vec![(base.join("lodge").join(name), settings)]
        }
        Hierarchy::V1(controllers) => controllers
            .iter()
            .map(|(controller, path)| {
                let mut settings = Vec::new();
                match controller.as_str() {
                    "cpu" => {
                        // Version 1 counts shares from 1024.
                        let shares = (weight * 1024 / 100).max(2);
                        settings.push(("cpu.shares", shares.to_string()));
                        if let Some(quota) = quota {
                            settings.push(("cpu.cfs_period_us", PERIOD_US.to_string()));
                            settings.push(("cpu.cfs_quota_us", quota.to_string()));
                        }
                    }
                    "memory" => settings.extend(
                        limits.memory_bytes.map(|n| ("memory.limit_in_bytes", n.to_string())),
                    ),
                    _ => settings.push(("pids.max", pids.clone())),
                }
                (path.join("lodge").join(name), settings)
            })
            .collect(),
        Hierarchy::None(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { cpu_percent: Some(150), cpu_weight: 50, memory_bytes: Some(1 << 30), threads: 64 };

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn version_1_gets_a_group_in_every_controller() {
        let root = tempfile::tempdir().unwrap();
        for name in CONTROLLERS {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("cgroup.procs"), "").unwrap();
        }
        let hierarchy = Hierarchy::detect(root.path());
        assert!(matches!(&hierarchy, Hierarchy::V1(list) if list.len() == 3));
        assert_eq!(create(&hierarchy, "a", &LIMITS).unwrap().len(), 3);
        let at = |path: &str| read(&root.path().join(path));
        assert_eq!(at("cpu/lodge/a/cpu.shares"), "512");
        assert_eq!(at("cpu/lodge/a/cpu.cfs_quota_us"), "150000");
        assert_eq!(at("memory/lodge/a/memory.limit_in_bytes"), "1073741824");
        assert_eq!(at("pids/lodge/a/pids.max"), "64");
        assert_eq!(list(&hierarchy), ["a"]);
    }

    #[test]
    fn version_2_gets_one_group() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        let hierarchy = Hierarchy::V2(root.path().to_owned());
        let joins = create(&hierarchy, "a", &LIMITS).unwrap();
        assert_eq!(joins, [root.path().join("lodge/a/cgroup.procs")]);
        assert_eq!(read(&root.path().join("lodge/a/cpu.max")), "150000 100000");
        assert_eq!(read(&root.path().join("lodge/a/cpu.weight")), "50");
        assert_eq!(read(&root.path().join("cgroup.subtree_control")), "+cpu +memory +pids");
    }

    #[test]
    fn limits_change_and_are_lifted() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::V2(root.path().to_owned());
        create(&hierarchy, "a", &LIMITS).unwrap();
        let none = Limits { cpu_percent: None, cpu_weight: 7, memory_bytes: Some(5), threads: 9 };
        change(&hierarchy, "a", &none).unwrap();
        let at = |file: &str| read(&root.path().join("lodge/a").join(file));
        assert_eq!([at("cpu.max"), at("cpu.weight")], ["max", "7"]);
        assert_eq!([at("memory.max"), at("pids.max")], ["5", "9"]);
    }

    #[test]
    fn a_host_without_controllers_says_so() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(Hierarchy::detect(root.path()), Hierarchy::None(_)));
        assert_eq!(create(&Hierarchy::None("why".into()), "a", &LIMITS).unwrap().len(), 0);
    }
}
