//! Python environments with packages of PyPI, made once and cached outside the tree.

use std::path::PathBuf;
use std::process::Output;
use std::sync::Mutex;

use crate::assets::cache;
use crate::lab::command;

/// What a program that must succeed has printed.
pub fn must(output: std::io::Result<Output>) -> String {
    let output = output.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    out
}

/// A Python environment with these packages, made once. `alone`: without what they ask for.
pub fn environment(packages: &[&str], alone: bool) -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let key = packages.join("-").replace(['=', '.', '[', ']'], "_");
    let dir = cache().join(format!("python-{key}"));
    if !dir.join("done").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        must(command("python3").args(["-m", "venv"]).arg(&dir).output());
        let mut pip = command(dir.join("bin/pip"));
        pip.args(["install", "-q"]).args(alone.then_some("--no-deps")).args(packages);
        must(pip.output());
        std::fs::write(dir.join("done"), "").unwrap();
    }
    dir
}
