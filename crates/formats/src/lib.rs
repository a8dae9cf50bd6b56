//! Bytes to values and back: kernels, disk images, file systems and archives. Pure over readers
//! and writers; this crate opens no file by name and trusts no length that it reads.

pub mod cpio;
pub mod ext4;
pub mod fat;
pub mod flist;
pub mod gpt;
pub mod grub;
pub mod iso9660;
pub mod kernel;
pub mod mdata;
pub mod nbd;
pub mod qcow2;
pub mod sniff;
pub mod tree;

/// The entries of an flist, generated from `schema/flist.capnp`, which says how.
#[allow(clippy::all, clippy::unwrap_used, unreachable_pub, unused)]
mod flist_capnp {
    include!("../generated/flist_capnp.rs");
}
