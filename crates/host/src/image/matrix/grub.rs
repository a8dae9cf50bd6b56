//! What firmware loads: GRUB, made by its own tools out of its installed parts. Knows no images.

use std::path::Path;

use tempfile::TempDir;

use crate::paths::find_program;
use crate::proc::Tool;

/// Where Debian's packages put the parts.
const PARTS: &str = "/usr/lib/grub";
/// The partition is the third one of the disk that GRUB came from, whatever that is called.
const PREFIX: &str = "(,gpt3)/boot/grub";
const COMMON: &[&str] =
    &["part_gpt", "ext2", "normal", "linux", "configfile", "serial", "terminal", "test", "echo"];

pub(super) struct Grub {
    pub(super) boot: Vec<u8>,
    pub(super) core: Vec<u8>,
    pub(super) efi: Vec<u8>,
}

impl Grub {
    pub(super) async fn make() -> Result<Self, String> {
        let missing = "`apt-get install grub-common grub-pc-bin grub-efi-amd64-bin` adds it";
        let program = find_program("grub-mkimage")
            .ok_or_else(|| format!("grub-mkimage is not installed; {missing}"))?;
        let work = TempDir::new().map_err(|e| format!("a folder for GRUB: {e}"))?;
        let image = async |platform: &str, more: &[&str]| {
            let parts = Path::new(PARTS).join(platform);
            if !parts.is_dir() {
                return Err(format!("{} is not there; {missing}", parts.display()));
            }
            let out = work.path().join(platform);
            let tool = Tool::new(&program).arg(format!("--directory={}", parts.display()));
            let tool = tool.args(["-O", platform, "-p", PREFIX, "-o"]).arg(&out);
            tool.args(COMMON).args(more).output().await.map_err(|e| e.to_string())?;
            std::fs::read(&out).map_err(|e| format!("{}: {e}", out.display()))
        };
        let core = image("i386-pc", &["biosdisk"]).await?;
        let efi = image("x86_64-efi", &["fat"]).await?;
        let boot = Path::new(PARTS).join("i386-pc/boot.img");
        let boot = std::fs::read(&boot).map_err(|e| format!("{}: {e}", boot.display()))?;
        Ok(Self { boot, core, efi })
    }
}
