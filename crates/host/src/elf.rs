//! Which files a program needs to start, found through ELF headers, never by running it.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use goblin::elf::Elf;

/// The interpreter and all libraries of `programs`, as the dynamic loader will look for them,
/// sorted. Libraries that are nowhere are left out: the loader will name them.
pub fn closure(programs: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let folders = library_folders();
    let mut found = BTreeSet::new();
    let mut queue: VecDeque<PathBuf> = programs.iter().cloned().collect();
    while let Some(path) = queue.pop_front() {
        let bytes = fs::read(&path)?;
        let Ok(elf) = Elf::parse(&bytes) else { continue };
        if let Some(interpreter) = elf.interpreter {
            found.insert(PathBuf::from(interpreter));
        }
        let own = path.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
        let run = elf.runpaths.iter().chain(&elf.rpaths).flat_map(|list| list.split(':'));
        let run: Vec<PathBuf> = run.map(|p| p.replace("$ORIGIN", &own).into()).collect();
        for library in &elf.libraries {
            let places = run.iter().chain(&folders).map(|dir| dir.join(library));
            if let Some(path) = places.into_iter().find(|p| p.exists())
                && found.insert(path.clone())
            {
                queue.push_back(path);
            }
        }
    }
    Ok(found.into_iter().collect())
}

/// Whether a program brings everything with it. One that cannot be read does not.
pub fn is_static(program: &Path) -> bool {
    let bytes = fs::read(program).unwrap_or_default();
    Elf::parse(&bytes).is_ok_and(|elf| elf.interpreter.is_none())
}

/// The loader's folders: those of `/etc/ld.so.conf`, then the fixed ones.
fn library_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    read_conf(Path::new("/etc/ld.so.conf"), &mut folders, 0);
    folders.extend(["/lib", "/usr/lib", "/lib64", "/usr/lib64"].map(PathBuf::from));
    folders
}

fn read_conf(path: &Path, folders: &mut Vec<PathBuf>, depth: u8) {
    let Ok(text) = fs::read_to_string(path) else { return };
    for line in text.lines().map(|l| l.split('#').next().unwrap_or("").trim()) {
        if let Some(pattern) = line.strip_prefix("include ") {
            // Distributions include one folder's `*.conf`; nothing else is seen in practice.
            let Some(dir) = Path::new(pattern.trim()).parent().filter(|_| depth < 2) else {
                continue;
            };
            let mut files: Vec<PathBuf> =
                fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
            files.sort();
            for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "conf")) {
                read_conf(file, folders, depth + 1);
            }
        } else if line.starts_with('/') {
            folders.push(line.into());
        }
    }
}
