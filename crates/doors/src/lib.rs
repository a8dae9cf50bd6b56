//! How people ask. Doors translate what they hear into `Request` and render `Reply`; they hold no
//! policy and know neither the host nor the machines, only `Control`.

pub mod connect;
pub mod control;
pub mod native;
pub mod vmadm;
pub mod xcluster;
pub mod zero_os;
