//! The rules of the house that no compiler checks: which room may know which, headers, sizes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run::{command, say};

/// Which rooms a room may know. Tests may know more.
const ARROWS: &[(&str, &[&str])] = &[
    ("lodge-spec", &[]),
    ("lodge-formats", &[]),
    ("lodge-jail", &[]),
    ("lodge-guest", &[]),
    ("lodge-machine", &["lodge-spec"]),
    ("lodge-host", &["lodge-machine", "lodge-jail", "lodge-formats", "lodge-guest", "lodge-spec"]),
    ("lodge-doors", &["lodge-spec"]),
    ("lodge", &["lodge-doors", "lodge-machine", "lodge-host", "lodge-spec"]),
];

const MAX_FILE: usize = 600;
const MAX_FUNCTION: usize = 80;
/// Longer than the rule, for a reason; this list must shrink.
const LONG_FUNCTIONS: &[&str] = &["resolve", "to_draft", "carry_out", "main"];

pub(crate) fn tidy() -> Result<()> {
    let mut faults = arrows()?;
    for path in sources(Path::new("."))? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        look(&path, &text, &mut faults);
    }
    for fault in &faults {
        say(&format!("tidy: {fault}"));
    }
    if faults.is_empty() { Ok(()) } else { bail!("{} faults", faults.len()) }
}

fn arrows() -> Result<Vec<String>> {
    let output = command("cargo").args(["metadata", "--no-deps", "--format-version=1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut faults = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or("");
        let Some(allowed) = allowed.get(name) else { continue };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let known = dependency["name"].as_str().unwrap_or("");
            let own = known == "lodge" || known.starts_with("lodge-");
            if own && dependency["kind"].is_null() && !allowed.contains(&known) {
                faults.push(format!("{name} must not know {known}"));
            }
        }
    }
    Ok(faults)
}

fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !matches!(name.as_str(), "target" | ".git" | "generated") {
            list.extend(sources(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            list.push(path);
        }
    }
    list.sort();
    Ok(list)
}

fn look(path: &Path, text: &str, faults: &mut Vec<String>) {
    let name = path.display();
    if !text.starts_with("//! ") {
        faults.push(format!("{name}: no header that says what it knows"));
    }
    if path.ends_with("mod.rs") {
        faults.push(format!("{name}: use name.rs beside name/"));
    }
    let code: Vec<&str> = text.lines().take_while(|l| *l != "#[cfg(test)]").collect();
    if code.len() > MAX_FILE {
        faults.push(format!("{name}: {} lines of code; {MAX_FILE} is the ceiling", code.len()));
    }
    let mut begun: Option<(usize, usize, String)> = None;
    for (number, line) in code.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        match &begun {
            Some((at, start, function)) if indent == *at && line.trim_start().starts_with('}') => {
                let length = number - start;
                if length > MAX_FUNCTION && !LONG_FUNCTIONS.contains(&function.as_str()) {
                    faults.push(format!("{name}: {function} has {length} lines"));
                }
                begun = None;
            }
            Some(_) => {}
            None => begun = function_name(line).map(|function| (indent, number, function)),
        }
    }
}

fn function_name(line: &str) -> Option<String> {
    let words = line.trim_start();
    let is_start = [
        "fn ",
        "pub fn ",
        "pub(crate) fn ",
        "pub(super) fn ",
        "async fn ",
        "pub async fn ",
        "pub(super) async fn ",
        "pub(crate) async fn ",
    ];
    let rest = is_start.iter().find_map(|start| words.strip_prefix(start))?;
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
    (!words.ends_with('}')).then(|| rest[..end].to_owned())
}
