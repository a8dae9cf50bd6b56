//! The interface of SmartOS's `vmadm` for machines of the brands kvm and bhyve: its words, its
//! documents, its messages and exit statuses. Translates; the daemon decides.

mod build;
mod bundle;
mod changes;
mod disks;
mod draft;
mod events;
mod grammar;
mod info;
mod nics;
mod nocloud;
mod one;
mod properties;
mod run;
mod signals;
mod snapshots;
mod table;
mod update;
mod validate;
mod values;
mod view;

pub use draft::Settings;
pub use run::{End, Place, Store, run};
