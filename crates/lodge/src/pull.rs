//! Images that come from elsewhere and go elsewhere: fetched and verified in this process, as its
//! user, before the store hears of them.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lodge_host::image::matrix::{Compress, Entry, Made, Matrix};
use lodge_host::paths::{Paths, make_dir, write_atomically};
use lodge_host::shacache::{self, Config, Digest, Filter};
use serde_json::{Map, Value, json};

use crate::xcluster::told;

/// The key under which all of them are.
const KEY: &str = "packer-images";

/// A file that was verified, and what it may be called.
pub(crate) struct Fetched {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
}

pub(crate) fn fetch(
    source: &str,
    filters: &[String],
    insecure: bool,
    config: &Path,
) -> Result<Fetched> {
    let folder = Paths::find().cache().join("downloads");
    make_dir(&folder)?;
    let Some(key) = source.strip_prefix("shacache:") else {
        if !filters.is_empty() {
            bail!("{} says which record is meant; a URL has none", filters[0]);
        }
        if !source.starts_with("http://") && !source.starts_with("https://") {
            bail!("{source} is neither http://…, https://… nor shacache:KEY");
        }
        let (url, digests) = told(Digest::split(source))?;
        // What is said of the server of images counts for all that comes from it.
        let config = if config.exists() { Some(read(config)?) } else { None };
        let tls = config.as_ref().and_then(|config| config.tls_for(url));
        let fetched = told(shacache::fetch(url, &digests, tls, &folder, progress(url)))?;
        let name = url.rsplit('/').next().unwrap_or_default();
        return Ok(Fetched { path: fetched.path, name: stem(name) });
    };
    let config = read(config)?;
    let filters = told(filters.iter().map(|f| f.parse()).collect::<Result<Vec<Filter>, String>>())?;
    let pick = told(shacache::pick(&config, key, &filters, insecure))?;
    warn(&pick.warnings)?;
    let Some(base) = &config.download_cache else { bail!("download-cache-url is not set") };
    let url = format!("{base}/{}", pick.sha512);
    let digests = [Digest::Sha512(pick.sha512.to_ascii_lowercase())];
    let tls = config.tls_for(&url);
    let fetched = told(shacache::fetch(&url, &digests, tls, &folder, progress(&url)))?;
    let title = pick.metadata.get("title").and_then(Value::as_str).unwrap_or(key);
    Ok(Fetched { path: fetched.path, name: stem(title.trim_start_matches("packerimage-")) })
}

/// A name for an image out of that of a file.
fn stem(name: &str) -> String {
    let packed = [".gz", ".zst", ".xz", ".bz2"];
    let name = packed.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    let disk = [".qcow2", ".raw", ".img"];
    disk.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_lowercase()
}

fn read(path: &Path) -> Result<Config> {
    let config = told(Config::read(path))?;
    warn(&config.warnings)?;
    Ok(config)
}

fn warn(warnings: &[String]) -> Result<()> {
    for warning in warnings {
        writeln!(std::io::stderr(), "lodge: {warning}")?;
    }
    Ok(())
}

/// On a terminal, how far it has come, a few times a second.
fn progress(url: &str) -> impl FnMut(u64, u64) {
    let name = url.rsplit('/').next().unwrap_or_default().chars().take(16).collect::<String>();
    let live = std::io::stderr().is_terminal();
    let mut next = Instant::now();
    move |done, total| {
        if live && Instant::now() >= next {
            next = Instant::now() + Duration::from_millis(200);
            let _ = write!(std::io::stderr(), "  {name}… {} of {} MB\r", done >> 20, total >> 20);
        }
    }
}

/// Whether what was built is to be uploaded, and with which configuration.
pub(crate) fn uploads(flag: bool, config: &Path) -> Result<Option<Config>> {
    let asked = std::env::var_os("UPLOAD").is_some_and(|value| value == "yes");
    if !flag && !asked {
        return Ok(None);
    }
    if !flag && !config.exists() {
        let shown = config.display();
        writeln!(std::io::stderr(), "lodge: nothing is uploaded: there is no {shown}")?;
        return Ok(None);
    }
    let config = read(config)?;
    if config.upload_cache.is_none() {
        bail!("upload-cache-url is not set");
    }
    Ok(Some(config))
}

/// Uploads a family, each image in its first form, and writes down where it can be found. An image
/// that cannot be uploaded keeps no other from it.
pub(crate) fn upload(config: &Config, matrix: &Matrix, made: &[Made], out: &Path) -> Result<bool> {
    let (mut lines, mut fine) = (String::new(), true);
    for image in made {
        let Some((file, sums)) = image.files.first() else { continue };
        let entry = matrix.images.iter().find(|entry| entry.distro == image.distro);
        let metadata = describe(image, entry, matrix.compress.first().copied());
        match shacache::upload(config, file, KEY, metadata) {
            Ok(done) => {
                let how = if done.known { "is there already" } else { "uploaded" };
                writeln!(std::io::stderr(), "{}: {how}", image.name)?;
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                lines += &format!("{name}  {}   {}\n", done.url, sums.md5);
                let text = format!("{}\n", Value::Object(done.metadata));
                write_atomically(&out.join("metadata.json"), text.as_bytes())?;
                write_atomically(&out.join("URL.txt"), lines.as_bytes())?;
            }
            Err(why) => {
                writeln!(std::io::stderr(), "{}: not uploaded: {why}", image.name)?;
                fine = false;
            }
        }
    }
    Ok(fine)
}

/// What a record says of an image: letters and number of its distribution, its size.
fn describe(image: &Made, entry: Option<&Entry>, form: Option<Compress>) -> Map<String, Value> {
    let distro = entry.map_or(image.distro.as_str(), |entry| entry.distro.as_str());
    let digits = distro.find(|c: char| c.is_ascii_digit()).unwrap_or(distro.len());
    let version: String =
        distro[digits..].chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let suffix = form.map(|form| format!(".{}", form.suffix())).unwrap_or_default();
    let value = json!({
        "title": format!("packerimage-{}{suffix}", image.name),
        "distribution": distro[..digits].trim_end_matches('-'),
        "version": version,
        "disk-size": image.size,
        "compressed": form.is_some(),
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
