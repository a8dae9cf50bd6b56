//! Families of images: one tree for each distribution, one image for each of its sizes. Here: the
//! document that describes a family, checked as a whole; `make` builds it.

mod contents;
mod disk;
mod make;
mod pack;
mod provenance;

use std::path::{Path, PathBuf};

use lodge_spec::problem::{Problems, nearest};
use serde::Deserialize;

use super::debian::{Suite, is_package};

pub use make::{Made, Outcome, Progress, Work, build};
pub use pack::Sums;

/// Bytes of what a size is called: decimal gigabytes.
const GB: u64 = 1_000_000_000;
/// A disk that is larger is a mistake.
const MAX_SIZE: u64 = 64_000;

/// A family of images.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// The last part of every image's name.
    #[serde(default = "usual_name")]
    pub name: String,
    /// Forms in which images are kept; none: as they are, qcow2.
    #[serde(default = "both")]
    pub compress: Vec<Compress>,
    pub images: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    Gzip,
    Zstd,
}

impl Compress {
    pub fn suffix(self) -> &'static str {
        match self {
            Compress::Gzip => "gz",
            Compress::Zstd => "zst",
        }
    }
}

/// What starts everything else in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    #[default]
    Systemd,
    Sysvinit,
}

/// One distribution and its sizes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub distro: String,
    /// Decimal gigabytes.
    pub sizes: Vec<u64>,
    /// Added to the usual ones.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Where Lodge does not know it by the distribution's name.
    pub suite: Option<String>,
    /// URLs or lines of a sources list.
    #[serde(default)]
    pub mirrors: Vec<String>,
    #[serde(default)]
    pub components: Vec<String>,
    pub keyring: Option<PathBuf>,
    /// The kernel's package, where it is not the usual one.
    pub kernel: Option<String>,
    #[serde(default)]
    pub init: Init,
    /// Programs run in the tree at the end, in this order; paths beside the document.
    #[serde(default)]
    pub scripts: Vec<PathBuf>,
    #[serde(default)]
    pub users: Vec<User>,
    /// Runs without a script count.
    #[serde(default)]
    pub require_script: bool,
    /// Words for the kernel besides the usual ones.
    #[serde(default)]
    pub cmdline: String,
}

/// Somebody who is let in with a key; nobody has a password.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub name: String,
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// May become root without a password.
    #[serde(default)]
    pub sudo: bool,
}

fn usual_name() -> String {
    "vm-bootstrap".into()
}

fn both() -> Vec<Compress> {
    vec![Compress::Gzip, Compress::Zstd]
}

/// A distribution as Lodge knows it.
struct Distro {
    token: &'static str,
    suite: &'static str,
    kernel: &'static str,
    /// Has no mirror that everybody's host knows.
    foreign: bool,
}

const fn debian(token: &'static str, suite: &'static str) -> Distro {
    Distro { token, suite, kernel: "linux-image-cloud-amd64", foreign: false }
}

const fn ubuntu(token: &'static str, suite: &'static str) -> Distro {
    Distro { token, suite, kernel: "linux-image-virtual", foreign: true }
}

const DISTROS: &[Distro] = &[
    debian("debian11", "bullseye"),
    debian("debian12", "bookworm"),
    debian("debian13", "trixie"),
    ubuntu("ubuntu-20.04-server", "focal"),
    ubuntu("ubuntu-22.04-server", "jammy"),
    ubuntu("ubuntu-24.04-server", "noble"),
];

/// A document is a family; or a playbook, a list of plays, one of whose variables is the family.
#[derive(Deserialize)]
struct Play {
    vars: Option<Vars>,
}

#[derive(Deserialize)]
struct Vars {
    matrix: Option<Matrix>,
}

impl Matrix {
    /// Reads a document. Errors are whole sentences, one for each fault.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| format!("{shown}: {e}"))?;
        let mut matrix = Self::parse(&text).map_err(|e| format!("{shown}: {e}"))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for entry in &mut matrix.images {
            entry.scripts = entry.scripts.iter().map(|script| folder.join(script)).collect();
            entry.keyring = entry.keyring.take().map(|keyring| folder.join(keyring));
        }
        Ok(matrix)
    }

    fn parse(text: &str) -> Result<Self, String> {
        // A list is a playbook; what is wrong is said of what it was meant to be.
        let first = text.lines().find(|l| !l.trim().is_empty() && !l.starts_with(['#', '-', '%']));
        let listed = text.lines().any(|l| l.starts_with("- "));
        let matrix = match listed && first.is_none_or(|l| l.starts_with(' ')) {
            true => {
                let plays: Vec<Play> = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
                let found = plays.into_iter().find_map(|play| play.vars?.matrix);
                found.ok_or("no play has a variable `matrix`, which would say what to build")?
            }
            false => serde_saphyr::from_str(text).map_err(|e| e.to_string())?,
        };
        matrix.check().map_err(|problems| problems.to_string())?;
        Ok(matrix)
    }

    fn check(&self) -> Result<(), Problems> {
        let mut problems = Problems::default();
        if !is_token(&self.name) {
            problems.add("name", format!("{:?} cannot be part of a file's name", self.name));
        }
        if self.images.is_empty() {
            problems.add("images", "there is nothing to build");
        }
        let mut names = Vec::new();
        for (i, entry) in self.images.iter().enumerate() {
            entry.check(&format!("images[{i}]"), &mut problems);
            for size in &entry.sizes {
                let name = self.image(entry, *size);
                if names.contains(&name) {
                    problems.add(format!("images[{i}]"), format!("{name} is there twice"));
                }
                names.push(name);
            }
        }
        problems.or(())
    }

    /// What an image is called.
    pub fn image(&self, entry: &Entry, size: u64) -> String {
        format!("{}-{size}G-{}", entry.distro, self.name)
    }
}

/// Names of distributions and families become names of files and of hosts.
fn is_token(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    !name.is_empty() && name.len() < 48 && !name.starts_with(['-', '.']) && name.bytes().all(letter)
}

impl Entry {
    fn known(&self) -> Option<&'static Distro> {
        DISTROS.iter().find(|known| known.token == self.distro)
    }

    fn suite(&self) -> Suite<'_> {
        let known = self.known().map(|known| known.suite);
        Suite {
            name: self.suite.as_deref().or(known).unwrap_or_default(),
            mirrors: &self.mirrors,
            keyring: self.keyring.as_deref(),
            components: &self.components,
        }
    }

    fn kernel(&self) -> &str {
        let known = self.known().map(|known| known.kernel);
        self.kernel.as_deref().or(known).unwrap_or("linux-image-cloud-amd64")
    }

    fn check(&self, path: &str, problems: &mut Problems) {
        let at = |field: &str| format!("{path}.{field}");
        let distro = &self.distro;
        let tokens = || DISTROS.iter().map(|known| known.token);
        if !is_token(distro) {
            problems.add(at("distro"), format!("{distro:?} cannot be part of a file's name"));
        }
        match self.known() {
            None if self.suite.is_none() || self.mirrors.is_empty() => {
                let near = nearest(distro, tokens());
                let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                let known = tokens().collect::<Vec<_>>().join(", ");
                let what = "others need a suite and mirrors";
                problems.add(at("distro"), format!("{distro} is not one of {known}{hint}; {what}"));
            }
            Some(known) if known.foreign && self.mirrors.is_empty() => {
                let what = "has no mirror here; give `mirrors`, and a `keyring` for its signatures";
                problems.add(at("mirrors"), format!("{distro} {what}"));
            }
            Some(_) | None => {}
        }
        if self.sizes.is_empty() {
            problems.add(at("sizes"), "there is nothing to build");
        }
        for size in self.sizes.iter().filter(|size| !(1..=MAX_SIZE).contains(*size)) {
            problems.add(at("sizes"), format!("{size} is not a size from 1 to {MAX_SIZE} GB"));
        }
        for odd in self.packages.iter().chain(&self.kernel).filter(|name| !is_package(name)) {
            problems.add(at("packages"), format!("{odd:?} is not a package name"));
        }
        let odd = |text: &&String| text.starts_with('-') || text.contains(['\n', '\'']);
        for mirror in self.mirrors.iter().filter(odd) {
            problems.add(at("mirrors"), format!("{mirror:?} is neither a URL nor a line"));
        }
        if self.suite.as_ref().is_some_and(|suite| !is_token(suite)) {
            problems.add(at("suite"), "it is no suite's name");
        }
        for odd in self.components.iter().filter(|name| !is_token(name)) {
            problems.add(at("components"), format!("{odd:?} is no component"));
        }
        if self.cmdline.contains(['\n', '\'', '"', '\\', '$', ';', '{', '}']) {
            problems.add(at("cmdline"), "quotes, braces and the like cannot be passed on");
        }
        for user in &self.users {
            let name = &user.name;
            let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
            let start = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
            if !start || name.len() > 31 || !name.bytes().all(letter) {
                problems.add(at("users"), format!("{name:?} cannot be a user's name"));
            }
            if user.ssh_keys.iter().any(|key| key.contains('\n')) {
                problems.add(at("users"), format!("a key of {name} is more than one line"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_a_document_or_a_playbooks_variable() {
        let plain = "images: [{distro: debian12, sizes: [50, 25]}]\n";
        let play = "# one\n---\n- hosts: targets\n  vars:\n    matrix:\n      images:\n        - \
                    {distro: debian12, sizes: [50, 25]}\n  tasks: [{command: x}]\n";
        for text in [plain, play] {
            let matrix = Matrix::parse(text).unwrap();
            assert_eq!(matrix.image(&matrix.images[0], 50), "debian12-50G-vm-bootstrap");
            assert_eq!(matrix.compress, [Compress::Gzip, Compress::Zstd]);
            assert_eq!(matrix.images[0].suite().name, "bookworm");
        }
    }

    #[test]
    fn case_b4_what_cannot_be_built_is_told_before_anything_is_made() {
        let image = |entry: &str| Matrix::parse(&format!("images: [{{{entry}}}]\n")).unwrap_err();
        for (entry, words) in [
            ("distro: debian12, sizes: [0]", "images[0].sizes: 0 is not a size"),
            ("distro: debian12, sizes: []", "nothing to build"),
            ("distro: debain12, sizes: [1]", "did you mean debian12?"),
            ("distro: ../x, sizes: [1]", "cannot be part of a file's name"),
            ("distro: ubuntu-24.04-server, sizes: [1]", "has no mirror here"),
            ("distro: debian12, sizes: [5, 5]", "is there twice"),
            ("distro: debian12, sizes: [5], packages: [\"a b\"]", "is not a package name"),
            ("distro: debian12, sizes: [5], colour: red", "colour"),
            ("distro: debian12, sizes: [5], users: [{name: \"x;y\"}]", "cannot be a user's name"),
            ("distro: debian12, sizes: [5], cmdline: \"a';b\"", "cannot be passed on"),
        ] {
            let error = image(entry);
            assert!(error.contains(words), "{entry}: {error}");
        }
        assert!(Matrix::parse("- hosts: all\n").unwrap_err().contains("`matrix`"));
        assert!(Matrix::parse("images: [").is_err());
    }
}
