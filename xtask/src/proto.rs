//! Generates the message types of the Connect door from `crates/doors/proto`. Run by those who
//! change a definition: `cargo run -p xtask --features proto -- proto`; the result is committed.

use anyhow::{Context, Result};

pub(crate) fn generate() -> Result<()> {
    let base = "crates/doors/proto";
    let files = ["vmprovisioner/v1/vm.proto", "lodge/v1/watch.proto"];
    buffa_build::Config::new()
        .files(&files.map(|f| format!("{base}/{f}")))
        .includes(&[base])
        .out_dir("crates/doors/generated")
        .generate_views(false)
        .generate_json(true)
        .preserve_unknown_fields(false)
        .map_type(buffa_build::MapRepr::BTreeMap)
        .file_per_package(true)
        .compile()
        .ok()
        .context("generating; is `protoc` installed (protobuf-compiler)?")
}
