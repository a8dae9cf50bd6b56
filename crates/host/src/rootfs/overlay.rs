//! Overlays: folders with a program named `tar` that writes an archive of files for a guest. Finds
//! them, runs them confined, and takes what they write for what it is: foreign bytes.

use std::ffi::OsString;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use lodge_jail::script::ScriptPlan;

use super::archive::Layer;
use crate::paths::sibling_program;
use crate::proc::Tool;

/// Where overlays are looked for.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Folders of overlays, the first that has one wins.
    pub path: Vec<PathBuf>,
    /// Folder of archives made before, by variant.
    pub cache: PathBuf,
    /// Variants, the first that is cached wins; `default` is looked at last.
    pub setup: Vec<String>,
}

/// What a name turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Cached(PathBuf),
    Archive(PathBuf),
    /// A folder whose files are the overlay.
    Folder(PathBuf),
    /// A folder with the program `tar`.
    Program(PathBuf),
}

/// For what an overlay is wanted: the two have always looked in different places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Cdrom,
    Image,
}

impl Search {
    /// The archive that was kept of an overlay.
    pub fn cached(&self, name: &str) -> Option<PathBuf> {
        let variants = self.setup.iter().map(String::as_str).chain(["default"]);
        let mut places = variants.map(|v| self.cache.join(v).join(format!("{name}.tar.xz")));
        places.find(|p| p.is_file())
    }

    /// The folder of an overlay on the path.
    pub fn folder(&self, name: &str) -> Result<PathBuf, String> {
        let mut odd = None;
        for dir in self.path.iter().map(|dir| dir.join(name)) {
            match executable(&dir.join("tar")) {
                Some(true) => return Ok(dir),
                Some(false) => odd = odd.or(Some(dir.join("tar"))),
                None => {}
            }
        }
        Err(match odd {
            Some(tar) => format!("Not executable [{}]", tar.display()),
            None => format!("Ovl not found [{name}]"),
        })
    }

    /// What a word on the command line means.
    pub fn resolve(&self, word: &str, purpose: Purpose) -> Result<Found, String> {
        if let Some(path) = self.cached(word) {
            return Ok(Found::Cached(path));
        }
        let here = Path::new(word);
        if here.is_file() {
            return Ok(Found::Archive(here.to_owned()));
        }
        if here.is_dir() {
            match (executable(&here.join("tar")), purpose) {
                (Some(true), _) => return Ok(Found::Program(here.to_owned())),
                (Some(false), _) => {
                    return Err(format!("Not executable [{}]", here.join("tar").display()));
                }
                (None, Purpose::Image) => return Ok(Found::Folder(here.to_owned())),
                (None, Purpose::Cdrom) => {}
            }
        }
        self.folder(word).map(Found::Program)
    }
}

/// Whether a file can be run; nothing where there is none.
fn executable(path: &Path) -> Option<bool> {
    path.is_file().then(|| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

/// What an overlay is called in numbered lists: its folder's name, a file's up to the first dot.
pub fn label(found: &Found) -> String {
    let (path, cut) = match found {
        Found::Cached(path) | Found::Archive(path) => (path.clone(), true),
        Found::Folder(path) | Found::Program(path) => {
            (std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()), false)
        }
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match cut {
        true => name.split('.').next().unwrap_or_default().to_owned(),
        false => name,
    }
}

/// How overlays' programs are run.
#[derive(Clone, Debug)]
pub struct Runner {
    pub env: Vec<(OsString, OsString)>,
    /// Where they may write.
    pub writable: Vec<PathBuf>,
    /// They reach the network.
    pub network: bool,
}

impl Runner {
    /// The layer that an overlay is.
    pub fn take(&self, found: &Found) -> Result<Layer, String> {
        let name = label(found);
        let layer = match found {
            Found::Cached(path) | Found::Archive(path) => Layer::open(&name, path),
            Found::Folder(path) => folder(&name, path),
            Found::Program(path) => self.run(&name, path),
        }?;
        self.mend(layer)
    }

    fn run(&self, name: &str, dir: &Path) -> Result<Layer, String> {
        let text = |e: std::io::Error| format!("{name}: {e}");
        let program = std::path::absolute(dir.join("tar")).map_err(text)?;
        let jail = sibling_program("lodge-jail").map_err(text)?;
        let plan = ScriptPlan {
            program,
            args: vec!["-".into()],
            writable: self.writable.clone(),
            network: self.network,
        };
        let mut command = Tool::new(jail).arg("script").args(plan.to_args()).command().into_std();
        command.env_clear().envs(self.env.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(text)?;
        let layer = Layer::take(name, child.stdout.take().expect("piped"));
        let status = child.wait().map_err(text)?;
        match status.success() {
            true => layer,
            false => Err(format!("{name}: its tar ended with {status}")),
        }
    }

    /// Variables for the guest are written by a program that cannot quote them; what a shell in
    /// the guest would stumble over is written anew.
    fn mend(&self, layer: Layer) -> Result<Layer, String> {
        match layer.file(ENV_FILE) {
            Some(bytes) if !env_file_is_sound(&bytes) => {
                layer.replace(ENV_FILE, env_file(&self.env).as_bytes())
            }
            Some(_) | None => Ok(layer),
        }
    }
}

const ENV_FILE: &str = "etc/xcluster_env";

/// The variables that guests are told: `NAME='value'` for each `xcluster_NAME`, and the counts.
pub fn env_file(env: &[(OsString, OsString)]) -> String {
    let mut lines = Vec::new();
    for (name, value) in env {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        let counted = ["__nvm", "__nrouters", "__ntesters"].contains(&name);
        let Some(name) = name.strip_prefix("xcluster_").or(counted.then_some(name)) else {
            continue;
        };
        let sound = |b: u8| b == b'_' || b.is_ascii_alphanumeric();
        if !name.is_empty() && name.bytes().all(sound) {
            lines.push(format!("{name}='{}'\n", value.replace('\'', "'\\''")));
        }
    }
    lines.sort();
    lines.concat()
}

/// Every line is an assignment of one quoted word.
fn env_file_is_sound(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    text.lines().all(|line| {
        let Some((name, value)) = line.split_once('=') else { return line.is_empty() };
        let name = name.strip_prefix("export ").unwrap_or(name);
        let value = value.replace("'\\''", "");
        let plain = value.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./:,@%+".contains(&b));
        let quoted = value
            .strip_prefix('\'')
            .and_then(|v| v.strip_suffix('\''))
            .is_some_and(|v| !v.contains('\''));
        name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()) && (plain || quoted)
    })
}

/// The files of a folder, but for hidden ones at its top, as overlays' own programs take them.
fn folder(name: &str, dir: &Path) -> Result<Layer, String> {
    let text = |e: std::io::Error| format!("{name}: {e}");
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(dir).map_err(text)?.flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        let Some(file_name) = path.file_name().filter(|n| !n.as_encoded_bytes().starts_with(b"."))
        else {
            continue;
        };
        match path.is_dir() && !path.is_symlink() {
            true => tar.append_dir_all(file_name, &path).map_err(text)?,
            false => tar.append_path_with_name(&path, file_name).map_err(text)?,
        }
    }
    Layer::take(name, Cursor::new(tar.into_inner().map_err(text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        pairs.iter().map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn case_35_values_arrive_as_they_are() {
        let text = env_file(&env(&[
            ("xcluster_Q", "it's"),
            ("xcluster_TWO", "a\nb"),
            ("__nvm", "3"),
            ("__mem", "128"),
            ("HOME", "/root"),
        ]));
        assert_eq!(text, "Q='it'\\''s'\nTWO='a\nb'\n__nvm='3'\n");
        assert!(env_file_is_sound(b"FOO='a b'\n__nvm='3'\n"));
        assert!(env_file_is_sound(b"Q='it'\\''s'\n"));
        for odd in ["Q='it's'\n", "A='a\nb'\n", "A=$(reboot)\n", "A='a';reboot\n", "reboot\n"] {
            assert!(!env_file_is_sound(odd.as_bytes()), "{odd}");
        }
    }

    #[test]
    fn case_25_26_the_cache_then_here_then_the_first_on_the_path() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str, mode: u32| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make("one/a/tar", 0o755);
        make("two/a/tar", 0o755);
        make("two/b/tar", 0o755);
        make("one/odd/tar", 0o644);
        make("cache/default/b.tar.xz", 0o644);
        make("cache/x/b.tar.xz", 0o644);
        let at = |path: &str| dir.path().join(path);
        let mut search =
            Search { path: vec![at("one"), at("two")], cache: at("cache"), setup: Vec::new() };
        let resolve = |s: &Search, w: &str| s.resolve(w, Purpose::Cdrom);
        assert_eq!(resolve(&search, "a"), Ok(Found::Program(at("one/a"))));
        assert_eq!(resolve(&search, "b"), Ok(Found::Cached(at("cache/default/b.tar.xz"))));
        search.setup = vec!["y".into(), "x".into()];
        assert_eq!(resolve(&search, "b"), Ok(Found::Cached(at("cache/x/b.tar.xz"))));
        assert_eq!(resolve(&search, "nosuch"), Err("Ovl not found [nosuch]".into()));
        let odd = format!("Not executable [{}]", at("one/odd/tar").display());
        assert_eq!(resolve(&search, "odd"), Err(odd));
        let here = at("two/a").display().to_string();
        assert_eq!(resolve(&search, &here), Ok(Found::Program(at("two/a"))));
        assert_eq!(
            search.resolve(&at("cache").display().to_string(), Purpose::Image),
            Ok(Found::Folder(at("cache")))
        );
        assert_eq!(label(&Found::Cached(at("cache/x/b.tar.xz"))), "b");
    }
}
