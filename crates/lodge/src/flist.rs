//! `lodge flist`: flists made, looked at and taken apart, in this process and as its user. Only
//! what a stored image is comes from the daemon.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::native::flist::FlistVerb;
use lodge_host::flist::{create, tools};
use lodge_host::image::Manifest;
use lodge_host::paths::Paths;
use lodge_spec::request::{Reply, Request};
use serde_json::json;

use crate::client;
use crate::command::print;
use crate::xcluster::told;

/// What a root needs to know that is no disk.
const FSTAB: &[u8] = b"# The root is an flist and is mounted before this is read.\n";

pub(crate) fn carry_out(verb: &FlistVerb) -> Result<ExitCode> {
    match verb {
        FlistVerb::Create { source, out, store, route, file, tag } => {
            let format = tools::format_of(out);
            let mut tree = tree_of(source)?;
            for text in file {
                let (path, host) = pair(text, "--file", "PATH=HOSTFILE")?;
                let bytes = std::fs::read(host).with_context(|| host.to_owned())?;
                told(create::add(&mut tree, path, 0o644, bytes))?;
            }
            let tags = tag.iter().map(|text| {
                let (key, value) = pair(text, "--tag", "KEY=VALUE")?;
                Ok((key.to_owned(), value.to_owned()))
            });
            let tags = tags.collect::<Result<Vec<_>>>()?;
            let route = route.as_deref().unwrap_or(store);
            let made = told(create::create(tree, out, format, store, Some(route), &tags))?;
            print(&format!("{}\n", serde_json::to_string_pretty(&made)?))
        }
        FlistVerb::Inspect { file } => {
            let flist = told(tools::open(file, &[]))?;
            print(&format!("{}\n", serde_json::to_string_pretty(&tools::inspect(&flist))?))
        }
        FlistVerb::Ls { file, path } => {
            let flist = told(tools::open(file, &[]))?;
            print(&told(tools::list(&flist.index, path))?)
        }
        FlistVerb::Cat { file, path, store } => {
            let flist = told(tools::open(file, &[]))?;
            let fetcher = told(tools::fetcher(&flist, store.as_deref()))?;
            told(tools::cat(&flist, &fetcher, path, &mut std::io::stdout()))?;
            Ok(ExitCode::SUCCESS)
        }
        FlistVerb::Extract { file, folder, store } => {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            let flist = told(tools::open(file, std::slice::from_ref(folder)))?;
            let fetcher = told(tools::fetcher(&flist, store.as_deref()))?;
            let left = told(tools::extract(&flist, &fetcher, folder))?;
            if left > 0 {
                let what = "devices and sockets were left out; only root makes devices";
                writeln!(std::io::stderr(), "lodge: {left} {what}")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        FlistVerb::Verify { file, store } => {
            let flist = told(tools::open(file, &[]))?;
            let fetcher = told(tools::fetcher(&flist, store.as_deref()))?;
            let (all, wrong) = tools::verify(&flist, &fetcher);
            for (path, why) in &wrong {
                print(&format!("{path}: {why}\n"))?;
            }
            print(&format!("{} of {all} blocks are right\n", all - wrong.len()))?;
            Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        FlistVerb::Merge { files, out, route } => {
            let folder = out.parent().map(Path::to_owned).unwrap_or_default();
            let folder = std::path::absolute(folder.join("."))?;
            let read = |path: &PathBuf| tools::open(path, std::slice::from_ref(&folder));
            let flists = told(files.iter().map(read).collect::<Result<Vec<_>, _>>())?;
            told(tools::merge_into(&flists, out, route.as_deref()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn pair<'a>(text: &'a str, option: &str, shape: &str) -> Result<(&'a str, &'a str)> {
    text.split_once('=').ok_or_else(|| anyhow!("{option} {text:?} is not {shape}"))
}

/// The files of a source: something on this host, or a stored image with what it boots.
fn tree_of(source: &str) -> Result<create::Source> {
    let path = Path::new(source);
    if path.exists() || source.contains('/') {
        return told(create::source(path));
    }
    let manifest = image(source).with_context(|| {
        format!("{source} is neither a file or a folder here nor the name of a stored image")
    })?;
    let Some(disk) = &manifest.disk else { bail!("image {source} has no disk") };
    let paths = Paths::find();
    let mut tree = told(create::source(&paths.blob(&disk.blob.sha256)))?;
    let mut put = |path: &str, bytes: Vec<u8>| told(create::add(&mut tree, path, 0o644, bytes));
    put("etc/fstab", FSTAB.to_vec())?;
    let (Some(kernel), Some(initrd)) = (&manifest.kernel, &manifest.initrd) else {
        return Ok(tree);
    };
    let read = |blob: &lodge_host::image::Blob| {
        let path = paths.blob(&blob.sha256);
        std::fs::read(&path).with_context(|| path.display().to_string())
    };
    put("boot/vmlinuz", read(kernel)?)?;
    put("boot/initrd.img", read(initrd)?)?;
    // Without 9p in its kernel it boots by the newer convention, from virtio-fs.
    if !create::has_9p(&tree) {
        return Ok(tree);
    }
    let mut put = |path: &str, bytes: Vec<u8>| told(create::add(&mut tree, path, 0o644, bytes));
    // What is about the image's own root is not about this one's.
    let words = manifest.cmdline.split_whitespace();
    let kept: Vec<&str> =
        words.filter(|w| !w.starts_with("root=") && !matches!(*w, "rw" | "ro")).collect();
    let cmdline = serde_json::to_string(&kept.join(" "))?;
    let yaml = format!("kernel: /boot/vmlinuz\ninitrd: /boot/initrd.img\ncmdline: {cmdline}\n");
    put("boot/boot.yaml", yaml.into_bytes())?;
    Ok(tree)
}

fn image(name: &str) -> Result<Manifest> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let name = name.parse().map_err(|e| anyhow!("{e}"))?;
    runtime.block_on(async {
        let mut client = client::connect(&Paths::find()).await?;
        match client.ask(&Request::ImageInspect { name }).await?? {
            Reply::Document { mut value } => {
                value.as_object_mut().map(|o| o.remove("uuid"));
                Ok(serde_json::from_value(json!(value))?)
            }
            other => bail!("the daemon answered {other:?}"),
        }
    })
}
