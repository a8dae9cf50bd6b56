//! Lodge spoken to as `xc`: kernels, images, overlays, and clusters of real nodes.

mod clusters;
mod images;
mod kernel;
mod overlays;
