//! A machine's root where that is an flist: as asked for and as checked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problems;

/// A root whose files are fetched as the guest reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct FlistDraft {
    /// Host path or URL (`http`, `https`, `file`) of an flist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// URL of a store that is asked for blocks before those that the flist names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    /// How the guest reaches its root: `auto`, `9p`, `virtiofs` or `disk`, an ext4 disk that is made
    /// of it before the first start. `auto` when absent: a disk for Firecracker; otherwise 9p where
    /// the flist has a `boot/boot.yaml`, and virtio-fs where not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
}

crate::words!(
    /// How a guest reaches a root that is an flist.
    Transport { NineP = "9p", VirtioFs = "virtiofs", Disk = "disk" }
);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flist {
    pub source: Source,
    /// A URL; may hold a password.
    pub store: Option<String>,
    pub transport: Option<Transport>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An absolute path.
    Path(String),
    /// `http` or `https`.
    Url(String),
}

/// What the names of flists end with.
const ENDINGS: &[&str] = &["flist", "fl", "tgz", "gz", "tbz2", "bz2", "tar"];

impl Source {
    pub fn as_str(&self) -> &str {
        match self {
            Source::Path(text) | Source::Url(text) => text,
        }
    }

    /// Whether somebody who names this means an flist.
    pub fn names_flist(text: &str) -> bool {
        let path = text.split(['?', '#']).next().unwrap_or("");
        text.contains("://") || path.ends_with(".flist") || path.ends_with(".fl")
    }
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let source = match scheme {
            "" => Source::Path(text.to_owned()),
            "file" => Source::Path(rest.to_owned()),
            "http" | "https" => Source::Url(text.to_owned()),
            _ => return Err(format!("invalid flist url ({text})")),
        };
        if let Source::Path(path) = &source
            && (!path.starts_with('/') || path.contains(['\0', '\n']))
        {
            return Err(format!("invalid flist url ({text}): a path is absolute"));
        }
        let path = rest.split(['?', '#']).next().unwrap_or("");
        let name = path.rsplit('/').next().unwrap_or("");
        let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
        match ENDINGS.contains(&ending) {
            true => Ok(source),
            false => Err(format!("unknown flist format .{ending}")),
        }
    }
}

/// A path as if the root were all there is: `..` goes no higher.
pub fn within_root(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `small`: for a hypervisor that knows nothing but disks.
pub(crate) fn resolve(p: &mut Problems, draft: FlistDraft, small: bool) -> Option<Flist> {
    let FlistDraft { source, store, transport } = draft;
    let Some(source) = source else {
        p.add("flist.source", "where the flist is is missing: a path or a URL");
        return None;
    };
    if let Some(store) = store.as_deref().filter(|s| !s.contains("://")) {
        p.add("flist.store", format!("{store:?} is not the URL of a store"));
    }
    let transport = transport.filter(|word| word != "auto");
    let transport = transport.and_then(|word| p.take("flist.transport", word.parse()));
    let transport = transport.or(small.then_some(Transport::Disk));
    Some(Flist { source: p.take("flist.source", source.parse())?, store, transport })
}

impl Flist {
    pub fn to_draft(&self) -> FlistDraft {
        FlistDraft {
            source: Some(self.source.as_str().to_owned()),
            store: self.store.clone(),
            transport: self.transport.map(|transport| transport.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_go_no_higher_than_the_root() {
        for (path, cleaned) in [
            ("boot/vmlinuz", "/boot/vmlinuz"),
            ("../../../../etc/shadow", "/etc/shadow"),
            ("/a/./b//../c", "/a/c"),
            ("", "/"),
            ("/..", "/"),
        ] {
            assert_eq!(within_root(path), cleaned);
        }
    }

    #[test]
    fn flists_are_named_by_path_or_url() {
        for (text, source) in [
            ("/a/b.flist", Source::Path("/a/b.flist".into())),
            ("file:///a/b.fl", Source::Path("/a/b.fl".into())),
            ("http://h/a.tar?x=1.y", Source::Url("http://h/a.tar?x=1.y".into())),
        ] {
            assert_eq!(text.parse(), Ok(source));
        }
        for (text, why) in [
            ("ftp://x/y.flist", "invalid flist url (ftp://x/y.flist)"),
            ("http://x/y.zip", "unknown flist format .zip"),
            ("a.flist", "a path is absolute"),
            ("/a/flist", "unknown flist format"),
        ] {
            let error = text.parse::<Source>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
