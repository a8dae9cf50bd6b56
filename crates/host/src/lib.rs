//! How Linux does it: processes, disks, networks, hypervisors. With the jail the only room that
//! changes the system. Implements the machine room's `Host`; knows no door.

pub mod backend;
pub mod elf;
pub mod escape;
pub mod facts;
mod fdpass;
pub mod flist;
pub mod frames;
pub mod image;
pub mod kernel_build;
pub mod kvm;
pub mod linux;
mod mdata;
pub mod net;
pub mod paths;
pub mod proc;
pub mod remote;
pub mod rootfs;
pub mod shacache;
pub mod survey;
pub mod trial;
pub mod warden;
