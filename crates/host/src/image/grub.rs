//! What firmware loads: GRUB, made by its own tools out of its installed parts. Knows no images.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::paths::find_program;
use crate::proc::Tool;

/// Where Debian's packages put the parts.
const PARTS: &str = "/usr/lib/grub";
/// The partition is the third one of the disk that GRUB came from, whatever that is called.
const PREFIX: &str = "(,gpt3)/boot/grub";
/// The disk that GRUB came from is the file system.
const WHOLE_PREFIX: &str = "/boot/grub";
const COMMON: &[&str] =
    &["ext2", "normal", "linux", "configfile", "serial", "terminal", "test", "echo"];
const MISSING: &str = "`apt-get install grub-common grub-pc-bin grub-efi-amd64-bin` adds it";

/// How every menu begins: no waiting, and heard and seen on the screen and on the serial port.
pub(crate) const CONSOLES: &str = "set timeout=0\nserial --unit=0 --speed=115200\nterminal_input \
                                   console serial\nterminal_output console serial\n";

/// For a disk with partitions, of which the third one is the root.
pub(crate) struct Grub {
    pub(crate) boot: Vec<u8>,
    pub(crate) core: Vec<u8>,
    pub(crate) efi: Vec<u8>,
}

/// For a disk that is a file system from its first block on; firmware of the old kind only.
pub struct WholeDisk {
    pub boot: Vec<u8>,
    pub core: Vec<u8>,
}

impl Grub {
    pub(crate) async fn make() -> Result<Self, String> {
        let core = image("i386-pc", PREFIX, Some("part_gpt"), "biosdisk").await?;
        let efi = image("x86_64-efi", PREFIX, Some("part_gpt"), "fat").await?;
        Ok(Self { boot: first_sector()?, core, efi })
    }
}

impl WholeDisk {
    pub async fn make() -> Result<Self, String> {
        let core = image("i386-pc", WHOLE_PREFIX, None, "biosdisk").await?;
        Ok(Self { boot: first_sector()?, core })
    }
}

fn parts(platform: &str) -> Result<PathBuf, String> {
    let parts = Path::new(PARTS).join(platform);
    match parts.is_dir() {
        true => Ok(parts),
        false => Err(format!("{} is not there; {MISSING}", parts.display())),
    }
}

fn first_sector() -> Result<Vec<u8>, String> {
    let boot = parts("i386-pc")?.join("boot.img");
    std::fs::read(&boot).map_err(|e| format!("{}: {e}", boot.display()))
}

/// `table` reads partitions, `device` what the firmware shows.
async fn image(
    platform: &str,
    prefix: &str,
    table: Option<&str>,
    device: &str,
) -> Result<Vec<u8>, String> {
    let program = find_program("grub-mkimage")
        .ok_or_else(|| format!("grub-mkimage is not installed; {MISSING}"))?;
    let work = TempDir::new().map_err(|e| format!("a folder for GRUB: {e}"))?;
    let out = work.path().join(platform);
    let tool = Tool::new(&program).arg(format!("--directory={}", parts(platform)?.display()));
    let tool = tool.args(["-O", platform, "-p", prefix, "-o"]).arg(&out);
    tool.args(table).args(COMMON).arg(device).output().await.map_err(|e| e.to_string())?;
    std::fs::read(&out).map_err(|e| format!("{}: {e}", out.display()))
}
