//! Builds an image out of Debian packages: `mmdebstrap` makes the tree, our own writer the file
//! system. No installer, no mount, no loop device, no root; the same packages give the same bytes.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;

use lodge_formats::ext4;
use lodge_machine::keeper::rfc3339;
use lodge_machine::store::now_us;
use lodge_spec::names::ImageName;
use lodge_spec::request::Refusal;
use sha2::{Digest as _, Sha256};

use super::debian::{self, Contents, Suite};
use super::store::{Images, hex};
use super::{Blob, Disk, Manifest, recipe};

/// Size of an image where nobody says.
pub const DEFAULT_SIZE: u64 = 2_000_000_000 / 4096 * 4096;

/// Steps of a build, told as they are reached.
pub type Tell = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// The images that can be built.
pub const RECIPES: &[&str] = &["debian-12"];

impl Images {
    /// Builds the image `name` (one of `RECIPES`) of `size` bytes with more packages.
    pub async fn build(
        &self,
        name: &ImageName,
        size: Option<u64>,
        packages: &[String],
        tell: Tell,
    ) -> Result<Manifest, Refusal> {
        if !RECIPES.contains(&name.as_str()) {
            let known = RECIPES.join(", ");
            let message = format!("there is no recipe for {name}; there is one for {known}");
            return Err(Refusal::invalid("name", message));
        }
        if let Some(odd) = packages.iter().find(|p| !debian::is_package(p)) {
            return Err(Refusal::invalid("packages", format!("{odd:?} is not a package name")));
        }
        let size = size.unwrap_or(DEFAULT_SIZE) / 4096 * 4096;
        let work = tempfile::Builder::new().prefix("build-").tempdir_in(self.paths.cache());
        let work = work.map_err(Refusal::failed)?;
        let tree = work.path().join("tree.tar");
        let suite = Suite { name: recipe::SUITE, ..Suite::default() };
        let list = recipe::packages(packages);
        let parts = |all: &[recipe::Overlay]| all.iter().map(debian::File::from).collect();
        let links = recipe::LINKS.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
        let contents = Contents {
            packages: list.iter().map(|p| (*p).to_owned()).collect(),
            early: parts(recipe::EARLY),
            late: parts(recipe::LATE),
            links: links.chain(recipe::IDLE.iter().map(debian::masked)).collect(),
            ..Contents::default()
        };
        let make = debian::Make { suite: &suite, contents: &contents, cache: None, log: None };
        make.tree(work.path(), &tree, &tell).await.map_err(Refusal::failed)?;
        let (own, name, blobs) = (self.clone(), name.clone(), tell.clone());
        let made_from = format!("Debian {} packages: {}", recipe::SUITE, list.join(" "));
        let made = move || own.assemble(&tree, size, &blobs);
        let made = tokio::task::spawn_blocking(made).await.map_err(Refusal::failed)?;
        let (kernel, initrd, disk) =
            made.map_err(|e| Refusal::failed(format!("building {name}: {e}")))?;
        let kernel_path = self.path(&kernel);
        let manifest = Manifest {
            name,
            kernel: Some(kernel),
            initrd: Some(initrd),
            disk: Some(disk),
            cmdline: recipe::CMDLINE.into(),
            virtio_mmio: true,
            takes_files: true,
            ready: Some(recipe::READY.into()),
            made_from,
            created_at: rfc3339(now_us()),
        };
        self.put(&manifest).await?;
        // The first start finds its kernel unpacked; one that cannot be boots as it is.
        let _ = super::kernel::unpack(&kernel_path, &self.paths.cache());
        Ok(manifest)
    }

    /// From the tree to the three blobs.
    fn assemble(&self, tree: &Path, size: u64, tell: &Tell) -> Result<(Blob, Blob, Disk), String> {
        let text = |e: io::Error| e.to_string();
        let identity = super::store::digest_of(tree).map_err(text)?;
        let total = tree.metadata().map_err(text)?.len();
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs());
        let part = part.map_err(text)?;
        part.as_file().set_len(size).map_err(text)?;
        let options = ext4::Options {
            size,
            label: "root".into(),
            uuid: super::store::identity(&identity),
            time: 1_700_000_000,
            style: ext4::Style::Ext4,
            boot: None,
        };
        let archive = BufReader::with_capacity(1 << 20, File::open(tree).map_err(text)?);
        ext4::write_tar(archive, part.as_file(), &options, |done| {
            tell("writing the file system", done, total);
        })
        .map_err(|e| e.to_string())?;
        let Boots { kernel, initrd } = pick(tree).map_err(text)?;
        tell("computing digests", 0, 0);
        let digest = super::store::digest_of(part.path()).map_err(text)?;
        let blob = self.settle(part, digest, size).map_err(text)?;
        let disk = Disk { blob, format: "raw".into(), virtual_bytes: size };
        let keep = |bytes: Option<Vec<u8>>, what: &str| {
            let bytes = bytes.ok_or_else(|| format!("the packages brought no {what}"))?;
            self.keep(&bytes).map_err(text)
        };
        Ok((keep(kernel, "kernel")?, keep(initrd, "initial RAM disk")?, disk))
    }

    fn keep(&self, bytes: &[u8]) -> io::Result<Blob> {
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs())?;
        part.as_file().write_all(bytes)?;
        self.settle(part, hex(&Sha256::digest(bytes)), bytes.len() as u64)
    }
}

/// What a tree boots with.
#[derive(Default)]
struct Boots {
    kernel: Option<Vec<u8>>,
    initrd: Option<Vec<u8>>,
}

/// Takes the kernel and its initial RAM disk out of the tree.
fn pick(tree: &Path) -> io::Result<Boots> {
    let mut found = Boots::default();
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, File::open(tree)?));
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let path = path.to_string_lossy();
        let path = path.trim_start_matches("./");
        let slot = if path.starts_with("boot/vmlinuz-") {
            &mut found.kernel
        } else if path.starts_with("boot/initrd.img-") {
            &mut found.initrd
        } else {
            continue;
        };
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        *slot = Some(bytes);
    }
    Ok(found)
}
