//! Builds what runs inside guests: static, so that any Linux can run it, and put where `lodge`
//! looks for it, beside itself.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::run::command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Into `target/PROFILE`.
pub(crate) fn guest(profile: &str) -> Result<()> {
    let args = ["build", "--quiet", "--release", "-p", "lodge-guest", "--target", TARGET];
    let mut cargo = command("cargo");
    let built = cargo.args(args).env("RUSTFLAGS", "-C target-feature=+crt-static").status()?;
    ensure!(built.success(), "cargo {} ended with {built}", args.join(" "));
    let folder = Path::new("target").join(profile);
    fs::create_dir_all(&folder)?;
    let (from, part) =
        (format!("target/{TARGET}/release/vm-bootstrap"), folder.join("vm-bootstrap.part"));
    fs::copy(from, &part)?;
    fs::rename(part, folder.join("vm-bootstrap"))?;
    Ok(())
}
