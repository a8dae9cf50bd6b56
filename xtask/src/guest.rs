//! Builds what runs inside guests, and puts it where it is looked for: the runner of first boots,
//! static, so that any Linux can run it, beside `lodge`; and the probe, which is a guest itself.

use std::fs;
use std::path::Path;
use std::process::Command;

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
    install(&format!("target/{TARGET}/release/vm-bootstrap"), &folder, "vm-bootstrap")?;
    probe(&["build", "--release", "--locked"])?;
    install("target/probe/release/lodge-probe", &folder, "probe")
}

/// Runs cargo on the probe, with its flags. What the compiler says of them is heard on failure
/// only: it warns that others could not call code that does without some registers.
pub(crate) fn probe(args: &[&str]) -> Result<()> {
    let mut cargo: Command = command("cargo");
    cargo.args(args).current_dir("guest/probe").env_remove("RUSTFLAGS");
    let output = cargo.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "cargo {} for the probe: {said}", args.join(" "));
    Ok(())
}

fn install(from: &str, folder: &Path, name: &str) -> Result<()> {
    let part = folder.join(format!("{name}.part"));
    fs::copy(from, &part)?;
    fs::rename(part, folder.join(name))?;
    Ok(())
}
