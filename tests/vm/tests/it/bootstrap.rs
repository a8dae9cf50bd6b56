//! Machines that set themselves up: the runner in its guests, images and their families, the
//! host's side, and where images come from and go to.

mod distribution;
mod families;
mod host;
mod runner;
