//! What a machine does: the pure step function, one task per machine, the store, and the keeper of
//! them all. Sees the world only through the trait `Host`; knows no door and no hypervisor.

// A new variant of our own is to be decided about wherever it is matched.
#![deny(clippy::wildcard_enum_match_arm)]

mod change;
pub mod fake;
pub mod host;
pub mod keeper;
pub mod life;
pub mod record;
pub mod store;

mod migration;
mod roster;
mod task;
mod wait;

pub use host::Host;
pub use keeper::Keeper;
pub use life::{Action, Ending, Life, Seen, Verb};
pub use store::Store;
