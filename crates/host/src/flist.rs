//! Machines whose root is an flist: where its blocks come from, the cache that all machines share,
//! the file system that the guest sees with a layer of its own above, and the process, confined,
//! in which all of that happens.

pub mod cache;
pub mod create;
mod disk;
pub mod fetch;
pub mod fuse;
mod layer;
pub mod prepare;
pub mod root;
pub mod router;
pub mod server;
pub mod store;
pub mod tools;
pub mod tree;
mod virtio;
mod walk;
pub mod whole;
