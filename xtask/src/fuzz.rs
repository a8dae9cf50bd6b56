//! Fuzzes the parsers of strangers' bytes for a while, from seeds that are committed. Compiled as
//! `cargo fuzz` does, without its sanitizers, which take another compiler.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::run::{command, say};

const TARGETS: &[&str] = &["disk", "file", "flist_file", "flist_message", "request"];
/// Each is fuzzed for so long.
const SECONDS: u32 = 15;
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Coverflow-checks=on -Cdebug-assertions=on";
const TARGET: &str = "x86_64-unknown-linux-gnu";

pub(crate) fn fuzz() -> Result<()> {
    // A target of its own keeps the flags from build scripts.
    let built = command("cargo")
        .args(["build", "--quiet", "--release", "--target", TARGET])
        .args(["--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target/fuzz"])
        .env("RUSTFLAGS", FLAGS)
        .status()?;
    ensure!(built.success(), "building the fuzz targets");
    for target in TARGETS {
        let program = Path::new("target/fuzz").join(TARGET).join("release").join(target);
        let corpus = Path::new("target/fuzz/corpus").join(target);
        let found = Path::new("target/fuzz/found");
        std::fs::create_dir_all(&corpus)?;
        std::fs::create_dir_all(found)?;
        let output = command(&program.to_string_lossy())
            .args([&corpus, &Path::new("fuzz/seeds").join(target)])
            .arg(format!("-max_total_time={SECONDS}"))
            .args(["-rss_limit_mb=2048", "-timeout=10", "-max_len=65536"])
            .arg(format!("-artifact_prefix={}/", found.display()))
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().rev().find(|line| line.starts_with("Done")).unwrap_or("");
        say(&format!("fuzz {target}: {last}"));
        ensure!(output.status.success(), "{target} was brought down:\n{said}");
    }
    Ok(())
}
