//! QEMU: what the installed one is and can do. `plan` says how to start it, `qmp` speaks to it,
//! `control` drives a running one.

pub mod control;
mod memory;
pub mod plan;
pub mod qmp;
mod throttle;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lodge_spec::machine::Board;
use serde::{Deserialize, Serialize};

use crate::elf;
use crate::facts::{self, Program};
use crate::paths::named_program;
use crate::proc::Tool;

const PROGRAM: &str = "qemu-system-x86_64";
/// Where distributions put the loadable parts.
pub(crate) const MODULES: &str = "/usr/lib/x86_64-linux-gnu/qemu";

/// What was probed of one QEMU binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    pub program: Program,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    pub boards: BTreeSet<String>,
    pub devices: BTreeSet<String>,
    pub accels: BTreeSet<String>,
    /// Folders of firmware that exist.
    pub data: Vec<PathBuf>,
    /// Code and variable store of UEFI firmware.
    pub uefi: Option<(PathBuf, PathBuf)>,
}

impl QemuFacts {
    /// Finds and probes QEMU; a binary is probed once for as long as the file is the same.
    pub async fn find(cache: &Path) -> Result<Self, String> {
        let path = named_program("LODGE_QEMU", PROGRAM).ok_or_else(|| {
            format!("{PROGRAM} is not installed; `apt-get install qemu-system-x86` adds it")
        })?;
        let (path, key) = facts::identify(&path)?;
        let cached = cache.join("qemu.json");
        if let Some(found) = facts::load::<Self>(&cached, &key)
            && found.program.is_whole()
        {
            return Ok(Self { uefi: find_uefi(), ..found });
        }
        let found = Self::probe(&path).await?;
        facts::save(&cached, &key, &found);
        Ok(found)
    }

    async fn probe(path: &Path) -> Result<Self, String> {
        let ask = async |args: &[&str]| {
            let output = Tool::new(path).args(args).output().await.map_err(|e| e.to_string())?;
            Ok::<_, String>(String::from_utf8_lossy(&output).into_owned())
        };
        let version = parse_version(&ask(&["--version"]).await?)
            .ok_or_else(|| format!("{} does not tell its version", path.display()))?;
        let boards = first_words(&ask(&["-machine", "help"]).await?);
        let accels = first_words(&ask(&["-accel", "help"]).await?);
        let devices = device_names(&ask(&["-machine", "none", "-device", "help"]).await?);
        let modules = modules();
        let mut programs = vec![path.to_owned()];
        programs.extend(modules.iter().cloned());
        let mut files = elf::closure(&programs).map_err(|e| format!("{}: {e}", path.display()))?;
        files.extend(modules);
        let data = ["/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"];
        let data = data.map(PathBuf::from).into_iter().filter(|p| p.is_dir()).collect();
        let program = Program { path: path.to_owned(), files };
        Ok(Self { program, version, boards, devices, accels, data, uefi: find_uefi() })
    }

    pub fn version_text(&self) -> String {
        let (major, minor, micro) = self.version;
        format!("{major}.{minor}.{micro}")
    }

    pub fn has_board(&self, board: Board) -> bool {
        self.boards.contains(board.as_str())
    }

    /// Removing a vCPU under TCG corrupts the heap of QEMU before 8.0 (seen with 7.2).
    pub fn can_unplug_cpus_under_tcg(&self) -> bool {
        self.version >= (8, 0, 0)
    }

    /// Before 8.1, a processor that is emulated beside others may run what it translated before
    /// another one changed the code: Linux, which changes its own, panics at one boot of some two
    /// hundred ("int3").
    pub fn emulates_in_turns(&self) -> bool {
        self.version < (8, 1, 0)
    }

    /// From version 10 on, an interrupt of the old controller reaches a microvm guest under TCG as
    /// a fault; the guest does without that controller.
    pub fn microvm_needs_pic_off(&self) -> bool {
        self.version >= (10, 0, 0)
    }
}

/// The accelerators, where they are loadable modules.
fn modules() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(MODULES).into_iter().flatten();
    let mut list: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("accel-") && name.ends_with("x86_64.so")
        })
        .collect();
    list.sort();
    list
}

fn find_uefi() -> Option<(PathBuf, PathBuf)> {
    let pairs = [
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ];
    let pairs = pairs.map(|(code, vars)| (PathBuf::from(code), PathBuf::from(vars)));
    pairs.into_iter().find(|(code, vars)| code.exists() && vars.exists())
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let number = text.split("version ").nth(1)?.split([' ', '(', '\n']).next()?;
    let mut parts = number.split('.').map(|p| p.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn first_words(text: &str) -> BTreeSet<String> {
    text.lines().skip(1).filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect()
}

/// Lines such as `name "virtio-blk-pci", bus PCI, alias "virtio-blk"`.
fn device_names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|l| l.strip_prefix("name \"")?.split('"').next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_distributions_print_them() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright\n";
        assert_eq!(parse_version(debian), Some((7, 2, 22)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2\n"), Some((10, 0, 2)));
        assert_eq!(parse_version("QEMU emulator version 11.1\n"), Some((11, 1, 0)));
        assert_eq!(parse_version("qemu: not found"), None);
    }
}
