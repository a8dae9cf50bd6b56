//! cpio archives in the "newc" form: what Linux takes as an initial RAM disk, and what people bring.

mod read;
mod write;

pub use read::to_tar;
pub use write::Writer;
