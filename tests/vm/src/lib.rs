//! What the suite needs of the world: an instance of Lodge of its own for each test, a kernel and
//! small guests, all cached outside the tree. Everything that is missing is said aloud.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stderr, reason = "what is skipped is said aloud")]

pub mod assets;
pub mod bootstrap;
pub mod keys;
pub mod lab;
pub mod metald;
pub mod namespace;
pub mod python;
pub mod rfb;
pub mod ssh;
pub mod vmadm;
pub mod xcluster;
pub mod zero_os;

pub use lab::Lab;

/// Goes on only where the host has something; says what is missing otherwise.
#[macro_export]
macro_rules! need {
    ($condition:expr, $what:literal) => {
        if !$condition {
            eprintln!("SKIPPED {}: needs {}", module_path!(), $what);
            return;
        }
    };
}
