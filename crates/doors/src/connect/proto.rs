//! The messages on the wire, generated from `proto/` (see `xtask proto`). Nothing else is here.

#![allow(clippy::all, unreachable_pub)]

pub mod vmprovisioner {
    pub mod v1 {
        include!("../../generated/vmprovisioner.v1.rs");
    }
}

pub mod lodge {
    pub mod v1 {
        include!("../../generated/lodge.v1.rs");
    }
}
