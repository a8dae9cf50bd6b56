//! Clusters and kernels in Lodge's own words: `lodge cluster` and `lodge kernel`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::native::grammar::{ClusterVerb, KernelVerb, Target};
use lodge_doors::xcluster::grammar::{COMMANDS, Line};
use lodge_doors::xcluster::settings::Settings;
use lodge_doors::xcluster::{document, grammar};
use lodge_host::backend::DiskFormat;
use lodge_host::kernel_build::Build;
use lodge_host::paths::Paths;
use lodge_host::rootfs::image;
use lodge_spec::Bytes;

use super::{Session, callback, print, say, shared, told};

/// Carries out one verb about a cluster.
pub(crate) fn cluster(verb: &ClusterVerb) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = match verb {
        ClusterVerb::Start { file } => {
            let (text, folder) = read(file)?;
            let value = lodge_spec::document::value(&text)
                .map_err(|problem| anyhow!("{}: {problem}", file.display()))?;
            let overlays: Vec<String> = value["overlays"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|o| o.as_str().map(str::to_owned))
                .collect();
            let mut options = told(document::settings(value, &folder))
                .with_context(|| file.display().to_string())?;
            // Clusters do not share what their machines unpack.
            let name = options.get("__cluster").cloned().unwrap_or_default();
            let cdrom = Paths::find().cache().join("clusters").join(format!("{name}.iso"));
            options.insert("__cdrom".into(), cdrom.display().to_string());
            session("mkcdrom", options.clone(), overlays)?.mkcdrom()?;
            let own = session("start", options, Vec::new())?;
            runtime.block_on(own.start(super::cluster::Consoles::Windows))?
        }
        ClusterVerb::Stop { name } => {
            let own = session("stop", named(name), Vec::new())?;
            runtime.block_on(own.stop())?
        }
        ClusterVerb::Status { name } => {
            let own = session("status", named(name), Vec::new())?;
            runtime.block_on(own.status())?;
            0
        }
    };
    Ok(ExitCode::from(code))
}

fn named(name: &str) -> BTreeMap<String, String> {
    [("__cluster".to_owned(), name.to_owned())].into()
}

fn read(file: &Path) -> Result<(String, PathBuf)> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let folder = std::path::absolute(file)?.parent().unwrap_or(Path::new("/")).to_owned();
    Ok((text, folder))
}

fn session(
    command: &str,
    options: BTreeMap<String, String>,
    words: Vec<String>,
) -> Result<Session> {
    let command = COMMANDS.iter().find(|c: &&grammar::Command| c.name == command);
    let line = Line { command: command.context("a command")?, options: options.clone(), words };
    let env = super::environment();
    Ok(Session { line, settings: Settings::new(env, options, &callback()?, &shared()?) })
}

/// Carries out one verb about kernels.
pub(crate) fn kernel(verb: &KernelVerb) -> Result<ExitCode> {
    let KernelVerb::Build { source: version, config, target, to, clean } = verb;
    let cache = Paths::find().cache();
    let work = cache.join("kernel-build");
    let archives = std::env::var_os("ARCHIVE").map(PathBuf::from).into_iter();
    let built = Build {
        version: version.clone(),
        archives: archives.collect(),
        sources: work.join("sources"),
        objects: work.join(format!("obj-{version}")),
        config: config.clone(),
        save_config: work.join("config"),
        patch: None,
        menuconfig: false,
        clean: *clean,
        out: work.join(format!("bzImage-{version}")),
        cache,
        record: work.join("archives.sha256"),
        base_url: std::env::var("__kurl").ok(),
    };
    let built = told(built.run(&say))?;
    let (from, name) = match target {
        Target::Qemu => (&built.kernel, "bzImage"),
        // These two take the kernel as it is when it is unpacked.
        Target::Firecracker | Target::CloudHypervisor => (&built.elf, "vmlinux"),
    };
    let to = to.clone().unwrap_or_else(|| name.into());
    std::fs::copy(from, &to).with_context(|| to.display().to_string())?;
    print(&format!("{}\n", to.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// What an image in a file says of what it was made.
pub(crate) fn layers(path: &str) -> Result<serde_json::Value> {
    let layers = told(image::layers(Path::new(path)))?;
    Ok(serde_json::json!({ "path": path, "layers": layers }))
}

/// Writes a folder as a disk.
pub(crate) fn folder(from: &Path, to: &Path, size: Option<&str>, format: &str) -> Result<ExitCode> {
    let size = size.map(str::parse::<Bytes>).transpose().map_err(|e| anyhow!("--size {e}"))?;
    let format = match format {
        "raw" => DiskFormat::Raw,
        "qcow2" => DiskFormat::Qcow2,
        other => bail!("--format: {other:?} is neither raw nor qcow2"),
    };
    let made = told(image::folder(to, from, size.map(|b| b.0), format))?;
    say(&format!("{}: {} files, {:.1} MB", to.display(), made.files, made.used_bytes as f64 / 1e6));
    Ok(ExitCode::SUCCESS)
}
