//! Formats checked by the programs that everyone else uses for them.

mod ext4;
