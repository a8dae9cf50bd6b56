//! What the two small hypervisors have in common: how they are found and probed, raw disks in
//! place of layers, and that neither runs a guest without KVM.

use std::path::{Path, PathBuf};

use lodge_jail::{Bind, JailPlan};
use lodge_spec::machine::{Accel, BackendKind, Machine};
use serde::{Deserialize, Serialize};

use crate::backend::{
    BootFiles, BootstrapEnd, Cgroup, ConsoleEnd, DiskFormat, FIRST_FD, Forward, Listen, MEMORY,
    Step, Survey, Tap, Unsupported, WardenPlan, memory_folder,
};
use crate::elf;
use crate::facts::{self, Facts, Program};
use crate::paths::named_program;
use crate::proc::Tool;

/// What was probed of one binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmFacts {
    pub program: Program,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
}

/// How a hypervisor is looked for.
pub struct Search {
    pub backend: BackendKind,
    /// On PATH.
    pub program: &'static str,
    /// The variable that names it, where it is elsewhere.
    pub variable: &'static str,
    /// The oldest version that is driven.
    pub oldest: (u32, u32),
    pub home: &'static str,
}

impl VmmFacts {
    /// Finds and probes one; a binary is probed once for as long as the file is the same.
    pub async fn find(search: &Search, cache: &Path) -> Result<Self, String> {
        let Search { backend, program, variable, oldest, home } = search;
        let path = named_program(variable, program).ok_or_else(|| {
            format!(
                "{program} is not on PATH and {variable} does not name it; it is in no Debian \
                 package, take a release from {home}"
            )
        })?;
        let (path, key) = facts::identify(&path)?;
        let cached = cache.join(format!("{backend}.json"));
        if let Some(found) = facts::load::<Self>(&cached, &key)
            && found.program.is_whole()
        {
            return Ok(found);
        }
        let said = Tool::new(&path).arg("--version").output().await.map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&said).into_owned();
        let version = parse_version(&said)
            .ok_or_else(|| format!("{} does not tell its version: {said:?}", path.display()))?;
        if (version.0, version.1) < *oldest {
            let (major, minor) = oldest;
            return Err(format!(
                "{} has version {}.{}; {major}.{minor} is the oldest that is driven",
                path.display(),
                version.0,
                version.1
            ));
        }
        let files = elf::closure(std::slice::from_ref(&path))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let found = Self { program: Program { path, files }, version };
        facts::save(&cached, &key, &found);
        Ok(found)
    }

    pub fn version_text(&self) -> String {
        let (major, minor, micro) = self.version;
        format!("{major}.{minor}.{micro}")
    }

    pub fn is_at_least(&self, major: u32, minor: u32) -> bool {
        (self.version.0, self.version.1) >= (major, minor)
    }
}

/// The first word of the form `v1.2.3`, the `v` or the last number being absent at times.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split(['.', '-', '+']).map(str::parse);
        let (major, minor) = (parts.next()?.ok()?, parts.next()?.ok()?);
        Some((major, minor, parts.next().and_then(Result::ok).unwrap_or(0)))
    })
}

/// What a plan of either begins with.
pub(crate) struct Prepared {
    pub(crate) notes: Vec<String>,
    pub(crate) steps: Vec<Step>,
    /// How many disks there are: inside the jail `/disks/0` and so on.
    pub(crate) disks: usize,
    pub(crate) binds: Vec<Bind>,
}

/// Raw disks, the files inside the jail and why, unless something is in the way; `lacks` is what
/// the hypervisor has found itself.
pub(crate) fn prepare(
    machine: &Machine,
    survey: &Survey,
    facts: &Facts,
    (backend, vmm): (BackendKind, &VmmFacts),
    mut lacks: Vec<Unsupported>,
) -> Result<Prepared, Vec<Unsupported>> {
    let mut notes = Vec::new();
    lacks.extend(accel(machine, facts, backend, &mut notes).err());
    let (mut steps, files) = match raw_disks(machine, survey, backend) {
        Ok(raw) if lacks.is_empty() => raw,
        Ok(_) => return Err(lacks),
        Err(more) => {
            lacks.extend(more);
            return Err(lacks);
        }
    };
    notes.push(format!("{backend} {}: the least that can do it all", vmm.version_text()));
    let mut binds = code(&vmm.program);
    binds.push(device("/dev/kvm"));
    // Empty, but for the time when it is suspended.
    let memory = memory_folder(&survey.state);
    binds.push(file(&memory, MEMORY.into(), true));
    steps.push(Step::OwnFolder { path: memory, owner: survey.uid });
    if let BootFiles::Kernel { kernel, initrd, .. } = &survey.boot {
        binds.push(file(kernel, "/kernel".into(), false));
        binds.extend(initrd.as_ref().map(|path| file(path, "/initrd".into(), false)));
    }
    for (i, path) in files.iter().enumerate() {
        binds.push(file(path, format!("/disks/{i}"), is_writable(machine, i)));
    }
    Ok(Prepared { notes, steps, disks: files.len(), binds })
}

/// Whether the `i`th disk may be written to; the one with files, behind all, may not.
pub(crate) fn is_writable(machine: &Machine, i: usize) -> bool {
    machine.disks.get(i).is_some_and(|disk| !disk.read_only)
}

/// What a jail of either has; the rest is for its backend to say.
pub(crate) fn jail(
    survey: &Survey,
    vmm: &VmmFacts,
    argv: Vec<String>,
    binds: Vec<Bind>,
) -> JailPlan {
    JailPlan {
        program: vmm.program.path.clone(),
        argv,
        env: Vec::new(),
        binds,
        keep_fds: Vec::new(),
        uid: survey.uid,
        gid: survey.uid,
        stage: survey.run.clone(),
        cgroups: Vec::new(),
        status_fd: STATUS,
        writes_files: false,
        binds_sockets: false,
        network: None,
        fuse: None,
        terminal: Some(TERMINAL),
    }
}

/// Numbers of the descriptors that both are given.
pub(crate) const TERMINAL: i32 = FIRST_FD;
const STATUS: i32 = FIRST_FD + 1;
pub(crate) const API: i32 = FIRST_FD + 2;
pub(crate) const ROOT: i32 = FIRST_FD + 3;
pub(crate) const FIRST_TAP: i32 = FIRST_FD + 10;

pub(crate) fn warden(
    machine: &Machine,
    survey: &Survey,
    facts: &Facts,
    (sockets, taps): (Vec<Listen>, Vec<Tap>),
    jail: JailPlan,
) -> WardenPlan {
    WardenPlan {
        id: machine.id.to_string(),
        name: machine.name.to_string(),
        run: survey.run.clone(),
        console_log: survey.state.join("console.log"),
        console: ConsoleEnd::Terminal(TERMINAL),
        files: Vec::new(),
        sockets,
        taps,
        ports: Forward::all(machine),
        screen: None,
        mdata: None,
        root: None,
        bootstrap: BootstrapEnd::of(machine, &survey.run, &survey.state),
        ready: survey.ready.clone(),
        cgroup: Cgroup::of(machine, facts),
        jail,
    }
}

/// KVM, where it was proven or somebody insists; there is nothing else.
fn accel(
    machine: &Machine,
    facts: &Facts,
    backend: BackendKind,
    notes: &mut Vec<String>,
) -> Result<(), Unsupported> {
    let refuse = |why: String| Err(Unsupported::new("accel", backend, why));
    match machine.accel {
        Some(Accel::Tcg) => refuse(format!("{backend} has only KVM")),
        Some(Accel::Kvm) if facts.kvm.opens() => {
            notes.push(format!("kvm because it was asked for; {}", facts.kvm.describe()));
            Ok(())
        }
        None if facts.kvm.runs_linux() => {
            notes.push(format!("kvm: {}", facts.kvm.describe()));
            Ok(())
        }
        Some(Accel::Kvm) | None => refuse(format!("{backend} needs KVM: {}", facts.kvm.describe())),
    }
}

/// The survey's steps with raw disks in place of layers, and a file for each disk.
pub(crate) fn raw_disks(
    machine: &Machine,
    survey: &Survey,
    backend: BackendKind,
) -> Result<(Vec<Step>, Vec<PathBuf>), Vec<Unsupported>> {
    let mut faults = Vec::new();
    let mut steps: Vec<Step> =
        survey.steps.iter().filter(|s| !matches!(s, Step::Layer { .. })).cloned().collect();
    let mut files = Vec::new();
    for (i, (disk, found)) in machine.disks.iter().zip(&survey.disks).enumerate() {
        let mut refuse = |why: &str| {
            faults.push(Unsupported::new(&format!("disks[{i}].source"), backend, why));
        };
        let Some(top) = found.layers.first() else { continue };
        if top.remote.is_some() {
            refuse("it knows no disks of servers");
            continue;
        }
        let layer = survey.steps.iter().find_map(|step| match step {
            Step::Layer { path, bytes, above, owner } if *path == top.path => {
                Some((*bytes, above.clone(), *owner))
            }
            _ => None,
        });
        match (layer, top.format) {
            (None, DiskFormat::Raw) => files.push(top.path.clone()),
            (None, DiskFormat::Qcow2) => refuse("only raw disks are read, this one is qcow2"),
            (Some(_), _) if found.kept => {
                refuse("the disk was written as qcow2 by an earlier start under qemu");
            }
            (Some((_, Some((_, DiskFormat::Qcow2)), _)), _) => {
                refuse("only raw disks are read, what lies below is qcow2");
            }
            (Some((bytes, above, owner)), _) => {
                let path = survey.state.join(format!("{}.raw", disk.name));
                let from = above.map(|(path, _)| path);
                steps.push(Step::Raw { path: path.clone(), bytes, from, owner });
                files.push(path);
            }
        }
    }
    files.extend(survey.files_disk.clone());
    if faults.is_empty() { Ok((steps, files)) } else { Err(faults) }
}

/// A file of the host inside the jail, under a name of its own.
pub(crate) fn file(source: &Path, target: String, writable: bool) -> Bind {
    Bind {
        source: source.to_owned(),
        target: target.into(),
        writable,
        device: false,
        executable: false,
    }
}

pub(crate) fn device(path: &str) -> Bind {
    let path = PathBuf::from(path);
    Bind { source: path.clone(), target: path, writable: true, device: true, executable: false }
}

/// The program's own parts.
fn code(program: &Program) -> Vec<Bind> {
    let code = |path: &PathBuf| Bind {
        source: path.clone(),
        target: path.clone(),
        writable: false,
        device: false,
        executable: true,
    };
    program.files.iter().map(code).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_they_are_printed() {
        assert_eq!(parse_version("Firecracker v1.16.1\n\n2026 ...\n"), Some((1, 16, 1)));
        assert_eq!(parse_version("cloud-hypervisor v53.0\n"), Some((53, 0, 0)));
        assert_eq!(parse_version("cloud-hypervisor v38.0.0-dirty"), Some((38, 0, 0)));
        assert_eq!(parse_version("nothing"), None);
    }
}
