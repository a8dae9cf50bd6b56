//! The configuration file that shacache's own tools read: INI, one section.

use std::path::Path;

use super::Tls;
use super::sign::{Certificates, Key};

const SECTION: &str = "networkcache";
const KEYS: &[&str] = &[
    "download-cache-url",
    "download-dir-url",
    "upload-cache-url",
    "upload-dir-url",
    "shacache-ca-file",
    "shacache-cert-file",
    "shacache-key-file",
    "shadir-ca-file",
    "shadir-cert-file",
    "shadir-key-file",
    "signature-private-key-file",
    "signature-certificate-list",
];

/// Where files and records are, and whose signatures count.
#[derive(Debug, Default)]
pub struct Config {
    pub download_cache: Option<String>,
    pub download_dir: Option<String>,
    pub upload_cache: Option<String>,
    pub upload_dir: Option<String>,
    pub cache_tls: Option<Tls>,
    pub dir_tls: Option<Tls>,
    pub(super) key: Option<Key>,
    pub(super) certificates: Certificates,
    /// What in the file has no effect, or has one that may not be meant.
    pub warnings: Vec<String>,
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut values = section(text)?;
        let mut config = Self::default();
        values.retain(|(key, _)| {
            let known = KEYS.contains(&key.as_str());
            if !known {
                let near = lodge_spec::problem::nearest(key, KEYS.iter().copied());
                let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                config.warnings.push(format!("{key} has no effect{hint}"));
            }
            known
        });
        let get = |name: &str| values.iter().find(|(key, _)| key == name).map(|(_, v)| v.clone());
        let url = |name: &str| get(name).map(|url| url.trim_end_matches('/').to_owned());
        config.download_cache = url("download-cache-url");
        config.download_dir = url("download-dir-url");
        config.upload_cache = url("upload-cache-url");
        config.upload_dir = url("upload-dir-url");
        let tls = |server: &str, urls: [&Option<String>; 2]| {
            let parts = ["ca", "cert", "key"].map(|part| get(&format!("{server}-{part}-file")));
            let [authority, certificate, key] = parts;
            match (authority, certificate, key) {
                (Some(authority), Some(certificate), Some(key)) => {
                    Ok(Some(Tls { authority, certificate, key }))
                }
                (None, None, None) => Ok(None),
                _ if urls.iter().any(|u| u.as_ref().is_some_and(|u| u.starts_with("https:"))) => {
                    Err(format!("{server}-ca-file, -cert-file and -key-file belong together"))
                }
                _ => Ok(None),
            }
        };
        config.cache_tls = tls("shacache", [&config.download_cache, &config.upload_cache])?;
        config.dir_tls = tls("shadir", [&config.download_dir, &config.upload_dir])?;
        config.key = get("signature-private-key-file").map(|path| Key::read(&path)).transpose()?;
        let list = get("signature-certificate-list").unwrap_or_default();
        config.certificates = Certificates::parse(&list, &mut config.warnings);
        if let Some(key) = &config.key
            && config.download_dir.is_some()
            && !config.certificates.know(key)
        {
            return Err(
                "signature-private-key-file: no certificate in signature-certificate-list \
                        belongs to it, so nobody who reads this file would believe it"
                    .into(),
            );
        }
        Ok(config)
    }

    /// With which keys a file is asked for: those of the server of files, at that server only.
    pub fn tls_for(&self, url: &str) -> Option<&Tls> {
        let base = self.download_cache.as_deref()?;
        let there = url.strip_prefix(base).is_some_and(|rest| rest.starts_with('/'));
        self.cache_tls.as_ref().filter(|_| there)
    }

    /// Whether anybody's signature counts.
    pub fn trusts_somebody(&self) -> bool {
        !self.certificates.is_empty()
    }
}

/// Keys and values of the section; lines that begin with space go on with the value before.
fn section(text: &str) -> Result<Vec<(String, String)>, String> {
    let (mut values, mut inside): (Vec<(String, String)>, bool) = (Vec::new(), false);
    let mut found = false;
    for line in text.lines() {
        let plain = line.trim();
        if plain.is_empty() || plain.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = plain.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = name.trim() == SECTION;
            found |= inside;
        } else if line.starts_with([' ', '\t']) && inside {
            if let Some((_, value)) = values.last_mut() {
                value.push('\n');
                value.push_str(plain);
            }
        } else if inside {
            let Some((key, value)) = plain.split_once(['=', ':']) else {
                return Err(format!("{plain:?} is no line of the form KEY = VALUE"));
            };
            values.push((key.trim().to_lowercase(), value.trim().to_owned()));
        }
    }
    if found { Ok(values) } else { Err(format!("there is no section [{SECTION}]")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_and_what_has_no_effect_is_told() {
        let text = "[networkcache]\ndownload-cache-url = http://a/shacache/\n# x\n\
                    upload-dir-url: http://b\nsignature_private_key_file = /k\n\
                    signature-certificate-list =\n  one\n  two\n[other]\nx = 1\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.download_cache.as_deref(), Some("http://a/shacache"));
        assert_eq!(config.upload_dir.as_deref(), Some("http://b"));
        assert!(config.warnings[0].contains("did you mean signature-private-key-file?"));
        assert!(!config.trusts_somebody());
        assert!(Config::parse("[x]\n").is_err());
        let half = "[networkcache]\nupload-cache-url = https://a\nshacache-ca-file = /x\n";
        assert!(Config::parse(half).unwrap_err().contains("belong together"));
    }
}
