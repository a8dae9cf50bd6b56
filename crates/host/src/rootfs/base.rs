//! The root file system that all cluster nodes share: a few scripts of our own around busybox,
//! dropbear and iproute2. Programs come from where the caller says; libraries are found.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lodge_formats::tree::{Kind, Node, Tree};

use super::content::Content;
use super::programs;

/// Path in the guest, permissions, content.
type File = (&'static str, u16, &'static str);

macro_rules! files {
    ($($mode:literal $path:literal),+ $(,)?) => {
        &[$(($path, $mode, include_str!(concat!("guest/", $path)))),+]
    };
}

const FILES: &[File] = files![
    0o755 "init",
    0o755 "bin/auto_login",
    0o644 "etc/TZ",
    0o644 "etc/busybox.conf",
    0o644 "etc/fstab",
    0o644 "etc/group",
    0o644 "etc/hosts",
    0o644 "etc/inetd.conf",
    0o755 "etc/init.d/10net.rc",
    0o755 "etc/init.d/15power.rc",
    0o755 "etc/init.d/20sshd.rc",
    0o755 "etc/init.d/rcS",
    0o644 "etc/inittab",
    0o644 "etc/issue",
    0o644 "etc/ld.so.conf",
    0o644 "etc/nsswitch.conf",
    0o644 "etc/os-release",
    0o644 "etc/passwd",
    0o644 "etc/profile",
    0o644 "etc/protocols",
    0o644 "etc/resolv.conf",
    0o644 "etc/services",
    0o644 "etc/shells",
    0o644 "etc/sysctl.conf",
    0o755 "root/www/cgi-bin/info",
];

/// Stands for the version in the files that tell it.
const VERSION: &str = "0.0.0";

/// A program of the base: where it goes, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub target: &'static str,
    pub source: PathBuf,
}

/// What a base is made of.
#[derive(Clone, Debug)]
pub struct Base {
    pub programs: Vec<Program>,
    /// A folder with `lib/modules` of the kernel.
    pub modules: Option<PathBuf>,
    pub version: String,
}

impl Base {
    pub fn tree(&self, time: u32) -> Result<Tree<Content>, String> {
        let mut tree = Tree::new(time);
        let mut lay = |node| tree.lay(node).map_err(|e| e.to_string());
        for (path, mode, text) in FILES {
            let bytes = text.replace(VERSION, &self.version).into_bytes();
            let kind = Kind::File { size: bytes.len() as u64, contents: Content::of(bytes) };
            lay(Node::new(path, kind, *mode, time))?;
        }
        lay(Node::new("bin/sh", Kind::Symlink(b"busybox".to_vec()), 0o777, time))?;
        for Program { target, source } in &self.programs {
            lay(Node { mode: 0o755, ..programs::file(target, source, time)? })?;
        }
        let sources: Vec<PathBuf> = self.programs.iter().map(|p| p.source.clone()).collect();
        let mut libraries = programs::libraries(&sources, &BTreeSet::new(), None)?;
        libraries.extend(programs::by_name(&libraries));
        programs::lay_libraries(&mut tree, &libraries, time)?;
        let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
        if loader.exists() {
            programs::lay_libraries(&mut tree, &[loader.to_owned()], time)?;
        }
        if let Some(modules) = &self.modules {
            lay_folder(&mut tree, &modules.join("lib/modules"), "lib/modules", time)?;
        }
        Ok(tree)
    }
}

/// Lays a folder of the host over a tree; links stay links.
pub fn lay_folder(
    tree: &mut Tree<Content>,
    from: &Path,
    to: &str,
    time: u32,
) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let text = |e: std::io::Error| format!("{}: {e}", from.display());
    let mut entries: Vec<_> = std::fs::read_dir(from).map_err(text)?.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name();
        let target = match to {
            "" => name.to_string_lossy().into_owned(),
            to => format!("{to}/{}", name.to_string_lossy()),
        };
        let meta = entry.metadata().map_err(text)?;
        let kind = if meta.is_dir() {
            Kind::Directory
        } else if meta.is_symlink() {
            let link = std::fs::read_link(&path).map_err(text)?;
            Kind::Symlink(link.into_os_string().into_encoded_bytes())
        } else if meta.is_file() {
            Kind::File { size: meta.len(), contents: Content::Path(path.clone()) }
        } else {
            continue;
        };
        let mode = meta.permissions().mode() as u16 & 0o7777;
        tree.lay(Node::new(&target, kind, mode, time)).map_err(|e| e.to_string())?;
        if meta.is_dir() {
            lay_folder(tree, &path, &target, time)?;
        }
    }
    Ok(())
}
