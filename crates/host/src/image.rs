//! Images: names for content. Blobs are stored by their SHA-256; a manifest says how they boot.

pub mod build;
pub mod convert;
mod debian;
pub mod grub;
pub mod kernel;
pub mod layer;
pub mod matrix;
pub mod packer;
pub mod recipe;
pub mod store;

use lodge_spec::names::{Digest, ImageName};
use serde::{Deserialize, Serialize};

/// What an image is made of; the stable JSON shape of `lodge image inspect -o json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub name: ImageName,
    /// A kernel to boot directly; without one the disk boots through firmware.
    pub kernel: Option<Blob>,
    pub initrd: Option<Blob>,
    pub disk: Option<Disk>,
    /// Kernel command line.
    pub cmdline: String,
    /// Its kernel finds devices on a board without PCI.
    pub virtio_mmio: bool,
    /// It takes files from a disk with the serial `lodge-files`.
    pub takes_files: bool,
    /// When a guest of it is ready, where its machine does not say.
    pub ready: Option<String>,
    /// What it was made from.
    pub made_from: String,
    /// RFC 3339, UTC.
    pub created_at: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    pub sha256: Digest,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    #[serde(flatten)]
    pub blob: Blob,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The guest's view.
    pub virtual_bytes: u64,
}

impl Manifest {
    /// By which systems that name images so know it: its name where that is one, else made from
    /// the content, so that the same image has the same everywhere.
    pub fn uuid(&self) -> uuid::Uuid {
        let own = uuid::Uuid::try_parse(self.name.as_str()).ok();
        let content = self.disk.as_ref().map(|d| &d.blob).or(self.kernel.as_ref());
        let digest = content.map_or("", |blob| blob.sha256.as_str());
        own.unwrap_or_else(|| uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, digest.as_bytes()))
    }

    pub fn blobs(&self) -> Vec<&Blob> {
        let disk = self.disk.iter().map(|d| &d.blob);
        self.kernel.iter().chain(&self.initrd).chain(disk).collect()
    }
}

/// How far long work has come; `total` zero: unknown.
pub type Progress<'a> = &'a (dyn Fn(&str, u64, u64) + Send + Sync);
