//! The image store: blobs by digest below one folder, manifests in the database. A blob appears
//! under its digest only when it is whole; a name points to it afterwards.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use lodge_formats::sniff;
use lodge_machine::Store;
use lodge_machine::keeper::rfc3339;
use lodge_machine::store::now_us;
use lodge_spec::names::{Digest, ImageName};
use lodge_spec::problem::nearest;
use lodge_spec::request::Refusal;
use sha2::{Digest as _, Sha256};

use super::{Blob, Disk, Manifest, layer};
use crate::paths::Paths;
use crate::rootfs::archive;

#[derive(Clone)]
pub struct Images {
    pub(super) paths: Paths,
    store: Store,
}

impl Images {
    pub fn new(paths: Paths, store: Store) -> Self {
        Self { paths, store }
    }

    pub async fn list(&self) -> Result<Vec<Manifest>, Refusal> {
        let rows = self.store.write(|c| {
            let mut all = c.prepare_cached("SELECT manifest FROM images ORDER BY name")?;
            let rows = all.query_map([], |r| r.get::<_, String>(0))?;
            rows.collect::<Result<Vec<_>, _>>()
        });
        let rows = rows.await.map_err(Refusal::failed)?;
        Ok(rows.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }

    pub async fn find(&self, name: &ImageName) -> Result<Manifest, Refusal> {
        let all = self.list().await?;
        let near = nearest(name.as_str(), all.iter().map(|m| m.name.as_str())).map(str::to_owned);
        let found = all.into_iter().find(|m| m.name == *name);
        found.ok_or(Refusal::NoImage { name: name.to_string(), near })
    }

    pub(super) async fn put(&self, manifest: &Manifest) -> Result<(), Refusal> {
        let name = manifest.name.to_string();
        let text = serde_json::to_string(manifest).map_err(Refusal::failed)?;
        let written = self.store.write(move |c| {
            c.prepare_cached(
                "INSERT INTO images (name, manifest) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET manifest = ?2",
            )?
            .execute([name, text])
            .map(drop)
        });
        written.await.map_err(Refusal::failed)
    }

    pub fn path(&self, blob: &Blob) -> PathBuf {
        self.paths.blob(&blob.sha256)
    }

    /// Takes a file into the store: what it is decides how it boots.
    pub async fn add(&self, path: &Path, name: Option<ImageName>) -> Result<Manifest, Refusal> {
        let named = name.map_or_else(|| name_of(path), Ok)?;
        let (own, source) = (self.clone(), path.to_owned());
        let work = move || own.take_disk(&source);
        let disk = tokio::task::spawn_blocking(work).await.map_err(Refusal::failed)??;
        let manifest = Manifest {
            name: named,
            kernel: None,
            initrd: None,
            disk: Some(disk),
            cmdline: String::new(),
            virtio_mmio: false,
            takes_files: false,
            ready: None,
            made_from: path.display().to_string(),
            created_at: rfc3339(now_us()),
        };
        self.put(&manifest).await?;
        Ok(manifest)
    }

    fn take_disk(&self, path: &Path) -> Result<Disk, Refusal> {
        let looked = layer::look(path).map_err(Refusal::failed)?;
        if is_packed(looked.kind) {
            return self.take_packed(path);
        }
        check_disk(path, looked.kind)?;
        let blob = self.take(path).map_err(|e| self.full(e))?;
        let format = looked.layer.format.as_str().to_owned();
        Ok(Disk { blob, format, virtual_bytes: looked.bytes })
    }

    /// Takes a disk out of what it was packed with, to the end: nothing of it counts before.
    fn take_packed(&self, path: &Path) -> Result<Disk, Refusal> {
        let error = |e: io::Error| Refusal::failed(format!("{}: {e}", path.display()));
        let input = archive::unpacked(path).map_err(Refusal::failed)?;
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs());
        let part = part.map_err(|e| self.full(e))?;
        let mut hash = Sha256::new();
        let bytes =
            copy_sparse(input, part.as_file(), |chunk| hash.update(chunk)).map_err(error)?;
        let looked = layer::look(part.path()).map_err(Refusal::failed)?;
        check_disk(path, looked.kind)?;
        let digest = hex(&hash.finalize());
        let blob = self.settle(part, digest, bytes).map_err(|e| self.full(e))?;
        let format = looked.layer.format.as_str().to_owned();
        Ok(Disk { blob, format, virtual_bytes: looked.bytes })
    }

    fn full(&self, error: io::Error) -> Refusal {
        Refusal::Failed { message: format!("{}: {error}", self.paths.blobs().display()) }
    }

    /// Copies a file into the store, holes kept, and returns its digest.
    pub(super) fn take(&self, path: &Path) -> io::Result<Blob> {
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs())?;
        let mut hash = Sha256::new();
        let bytes = copy_sparse(File::open(path)?, part.as_file(), |chunk| hash.update(chunk))?;
        self.settle(part, hex(&hash.finalize()), bytes)
    }

    /// Puts what an image boots from into a folder, as plain files: the kernel as an ELF file
    /// (`vmlinux`), its initial RAM disk beside it, the disk (`rootfs.ext4`). Each appears whole.
    pub fn export(&self, manifest: &Manifest, folder: &Path) -> Result<Vec<PathBuf>, Refusal> {
        let (Some(kernel), Some(disk)) = (&manifest.kernel, &manifest.disk) else {
            let message = format!("image {} has no kernel of its own", manifest.name);
            return Err(Refusal::Failed { message });
        };
        let kernel = self.path(kernel);
        super::kernel::unpack(&kernel, &self.paths.cache()).map_err(Refusal::failed)?;
        let kernel = super::kernel::look(&kernel, &self.paths.cache()).map_err(Refusal::failed)?;
        let initrd = manifest.initrd.as_ref().map(|b| (self.path(b), "vmlinux.initrd"));
        let files = [(kernel.path, "vmlinux"), (self.path(&disk.blob), "rootfs.ext4")];
        fs::create_dir_all(folder).map_err(|e| failed(folder, e))?;
        let mut made = Vec::new();
        for (from, name) in files.into_iter().chain(initrd) {
            let to = folder.join(name);
            let write = || {
                use std::os::unix::fs::PermissionsExt;
                let part = tempfile::Builder::new().prefix("part-").tempfile_in(folder)?;
                copy_sparse(File::open(&from)?, part.as_file(), |_| {})?;
                part.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
                part.persist(&to).map(drop).map_err(|e| e.error)
            };
            write().map_err(|e| failed(&to, e))?;
            made.push(to);
        }
        Ok(made)
    }

    /// Puts a finished file where its digest says.
    pub(super) fn settle(
        &self,
        part: tempfile::NamedTempFile,
        digest: String,
        bytes: u64,
    ) -> io::Result<Blob> {
        use std::os::unix::fs::PermissionsExt;
        let sha256: Digest = digest.parse().expect("hexadecimal");
        part.as_file().sync_all()?;
        // Read by every machine's own user, written by nobody.
        part.as_file().set_permissions(fs::Permissions::from_mode(0o444))?;
        part.persist(self.paths.blob(&sha256)).map_err(|e| e.error)?;
        Ok(Blob { sha256, bytes })
    }

    /// Forgets a name, and blobs that no name points to any more. `in_use`: the images that
    /// machines lie upon, with the name of one such machine.
    pub async fn remove(
        &self,
        name: &ImageName,
        in_use: &[(ImageName, String)],
    ) -> Result<(), Refusal> {
        let manifest = self.find(name).await?;
        if let Some((_, machine)) = in_use.iter().find(|(image, _)| image == name) {
            let holder = format!("machine {machine}");
            return Err(Refusal::Taken { what: "image".into(), value: name.to_string(), holder });
        }
        let key = name.to_string();
        let deleted = self
            .store
            .write(move |c| c.execute("DELETE FROM images WHERE name = ?1", [key]).map(drop));
        deleted.await.map_err(Refusal::failed)?;
        let rest = self.list().await?;
        let kept: Vec<&Blob> = rest.iter().flat_map(Manifest::blobs).collect();
        for blob in manifest.blobs().into_iter().filter(|b| !kept.contains(b)) {
            let _ = fs::remove_file(self.path(blob));
        }
        Ok(())
    }

    /// Reads an image's blobs again and compares their digests.
    pub async fn verify(&self, manifest: &Manifest) -> Result<(), Refusal> {
        let blobs: Vec<Blob> = manifest.blobs().into_iter().cloned().collect();
        let (own, name) = (self.clone(), manifest.name.clone());
        let work = move || {
            for blob in blobs {
                let path = own.path(&blob);
                let found = digest_of(&path);
                let found =
                    found.map_err(|e| Refusal::failed(format!("{}: {e}", path.display())))?;
                if found != blob.sha256.as_str() {
                    let message = format!(
                        "image {name}: {} has the digest {found}; it was changed or damaged, build \
                         or add the image again",
                        path.display()
                    );
                    return Err(Refusal::Failed { message });
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(work).await.map_err(Refusal::failed)?
    }

    /// Files in the store that no image names.
    pub async fn strays(&self) -> Result<Vec<PathBuf>, Refusal> {
        let all = self.list().await?;
        let known: Vec<PathBuf> =
            all.iter().flat_map(Manifest::blobs).map(|b| self.path(b)).collect();
        let entries = fs::read_dir(self.paths.blobs()).into_iter().flatten().flatten();
        Ok(entries.map(|e| e.path()).filter(|p| !known.contains(p)).collect())
    }
}

fn is_packed(kind: sniff::Kind) -> bool {
    use sniff::Kind::{Bzip2, Gzip, Xz, Zstd};
    matches!(kind, Gzip | Bzip2 | Xz | Zstd)
}

/// Refuses what is no disk, or packed twice.
fn check_disk(path: &Path, kind: sniff::Kind) -> Result<(), Refusal> {
    match kind {
        sniff::Kind::Qcow2
        | sniff::Kind::Partitioned
        | sniff::Kind::Ext4
        | sniff::Kind::Iso9660
        | sniff::Kind::Unknown => Ok(()),
        other @ (sniff::Kind::BzImage
        | sniff::Kind::Elf
        | sniff::Kind::Cpio
        | sniff::Kind::Tar
        | sniff::Kind::Gzip
        | sniff::Kind::Bzip2
        | sniff::Kind::Xz
        | sniff::Kind::Zstd
        | sniff::Kind::Sqlite) => {
            let message = format!("{} is {other}; an image is a disk", path.display());
            Err(Refusal::Failed { message })
        }
    }
}

fn failed(path: &Path, error: io::Error) -> Refusal {
    Refusal::Failed { message: format!("{}: {error}", path.display()) }
}

/// Fills a buffer as far as the input goes, so that holes are found whatever pieces come in.
pub(super) fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match input.read(&mut buffer[count..])? {
            0 => break,
            more => count += more,
        }
    }
    Ok(count)
}

/// Copies, holes kept, and shows every chunk to `see`. Returns how many bytes it has.
pub(super) fn copy_sparse(
    mut input: impl Read,
    mut out: &File,
    mut see: impl FnMut(&[u8]),
) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0u64;
    loop {
        let count = fill(&mut input, &mut buffer)?;
        if count == 0 {
            break;
        }
        let chunk = &buffer[..count];
        see(chunk);
        bytes += count as u64;
        if chunk.iter().any(|b| *b != 0) {
            out.write_all(chunk)?;
        } else {
            io::Seek::seek_relative(&mut out, count as i64)?;
        }
    }
    out.set_len(bytes)?;
    Ok(bytes)
}

fn name_of(path: &Path) -> Result<ImageName, Refusal> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.parse().map_err(|e| Refusal::invalid("name", format!("{e}; give one with --name")))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The identity of what has a digest: the digest's first half.
pub(super) fn identity(digest: &str) -> [u8; 16] {
    let mut identity = [0; 16];
    for (byte, pair) in identity.iter_mut().zip(digest.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("00");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    identity
}

/// The SHA-256 of a file.
pub fn digest_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}
