//! Trees of files that guests boot from: archives and overlays laid over each other, disks read
//! and written, programs of the host with the libraries that they need. Nothing here runs as
//! root, mounts anything, or starts a machine; errors are whole sentences.

mod ahead;
pub mod archive;
pub mod base;
pub mod cdrom;
pub mod content;
pub mod disk;
pub mod image;
pub mod overlay;
pub mod programs;
pub mod provenance;

/// The time of every file: what a build script made a moment ago is no different from what it made
/// yesterday. 1 January 2020, or what `SOURCE_DATE_EPOCH` says.
pub fn epoch() -> u32 {
    let said = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    said.unwrap_or(1_577_836_800)
}
