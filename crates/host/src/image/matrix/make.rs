//! Building a family: the trees side by side as far as memory lets them, then every image of each.
//! What has not changed is not made again; what fails fails alone; an image is there whole or not
//! at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, Semaphore};

use super::disk::Plan;
use super::pack::{self, Sums};
use super::provenance::{self, Output, Package, Provenance};
use super::{Compress, Entry, GB, Matrix, contents};
use crate::image::build::Tell;
use crate::image::debian::Make;
use crate::image::grub::Grub;
use crate::image::store::{digest_of, hex, identity};
use crate::paths::{sibling_program, write_atomically};

/// A tree that is made takes about this much memory, in processes and in pages.
const TREE_MEMORY: u64 = 768 << 20;

/// Where a family is built.
pub struct Work {
    /// Where images and lists go.
    pub out: PathBuf,
    /// What can be made again.
    pub cache: PathBuf,
    /// Makes everything anew.
    pub afresh: bool,
}

/// What became of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Built { seconds: f64 },
    Unchanged,
    Failed(String),
}

/// An image of a family.
#[derive(Clone, Debug)]
pub struct Made {
    pub name: String,
    pub distro: String,
    /// Decimal gigabytes.
    pub size: u64,
    pub outcome: Outcome,
    /// Its files with their digests; none where it failed.
    pub files: Vec<(PathBuf, Sums)>,
}

/// Hears of steps: an image's or a distribution's name, then as `Tell`.
pub type Progress = Arc<dyn Fn(&str, &str, u64, u64) + Send + Sync>;

/// What the images of one distribution share.
struct Tree {
    archive: PathBuf,
    /// Decides about its bytes.
    inputs: String,
    packages: Vec<Package>,
    contents: u64,
    parts: Vec<provenance::Part>,
}

struct Build<'a> {
    matrix: &'a Matrix,
    work: &'a Work,
    runner: Vec<u8>,
    grub: Arc<Grub>,
    progress: Progress,
    room: Semaphore,
    /// One image is packed at a time: that takes all processors.
    packing: Mutex<()>,
}

/// Builds what has changed, then writes the lists of digests. In the order of the document.
pub async fn build(matrix: &Matrix, work: &Work, progress: Progress) -> Result<Vec<Made>, String> {
    let runner = sibling_program("vm-bootstrap").ok().and_then(|path| fs::read(path).ok());
    let runner = runner.ok_or(
        "vm-bootstrap, the program that goes into the images, is not beside lodge; `make build` \
         puts it there",
    )?;
    for folder in [&work.out, &work.out.join("log"), &work.cache] {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    let grub = Arc::new(Grub::make().await?);
    let side_by_side = (available_memory() / TREE_MEMORY).clamp(1, 8) as usize;
    let room = Semaphore::new(
        side_by_side.min(std::thread::available_parallelism().map_or(1, usize::from)),
    );
    let build = Build { matrix, work, runner, grub, progress, room, packing: Mutex::default() };
    let entries = matrix.images.iter().map(|entry| build.entry(entry));
    let made: Vec<Made> = join_all(entries).await.into_iter().flatten().collect();
    write_sums(&work.out, &made)?;
    Ok(made)
}

fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

impl Build<'_> {
    async fn entry(&self, entry: &Entry) -> Vec<Made> {
        let tree = self.tree(entry).await;
        let mut made = Vec::new();
        for size in &entry.sizes {
            let name = self.matrix.image(entry, *size);
            let done = match &tree {
                Ok(tree) => self.image(entry, *size, &name, tree).await,
                Err(why) => Err(why.clone()),
            };
            let (outcome, files) = done.unwrap_or_else(|why| (Outcome::Failed(why), Vec::new()));
            made.push(Made { name, distro: entry.distro.clone(), size: *size, outcome, files });
        }
        made
    }

    /// The tree of a distribution: one that is kept, if nothing has changed.
    async fn tree(&self, entry: &Entry) -> Result<Tree, String> {
        let _room = self.room.acquire().await.map_err(|e| e.to_string())?;
        let shared = format!("{}-{}", entry.distro, self.matrix.name);
        let mut scripts = Vec::new();
        for script in &entry.scripts {
            scripts.push(fs::read(script).map_err(|e| format!("{}: {e}", script.display()))?);
        }
        let contents = contents::of(entry, &self.matrix.name, &self.runner, &scripts);
        let suite = entry.suite();
        let parts = provenance::parts(&contents);
        let log = self.work.out.join(format!("log/{shared}.log"));
        let log = File::options().create(true).append(true).open(&log);
        let debs = self.work.cache.join("packages").join(suite.name);
        let make = Make { suite: &suite, contents: &contents, cache: Some(&debs), log: log.ok() };
        let temporary = tempfile::Builder::new().prefix("build-").tempdir_in(&self.work.cache);
        let temporary = temporary.map_err(|e| format!("{}: {e}", self.work.cache.display()))?;
        let progress = self.progress.clone();
        let told = shared.clone();
        let tell: Tell = Arc::new(move |step, done, total| progress(&told, step, done, total));
        tell("asking for the versions of packages", 0, 0);
        let recipe =
            serde_json::to_string(&(&parts, suite.name, suite.mirrors, &contents.packages));
        let recipe = recipe.map_err(|e| e.to_string())?;
        let kept = self.work.cache.join("trees");
        fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
        let label = kept.join(format!("{shared}.recipe"));
        // Two who build the same wait for each other, and the second one finds it done.
        let _alone = alone(kept.join(format!("{shared}.lock"))).await?;
        let keyring = suite.keyring.map(digest_of).transpose();
        let keyring = keyring.map_err(|e| format!("the keyring: {e}"))?.unwrap_or_default();
        let labelled = provenance::digest(&[&recipe, &keyring]);
        let inputs = match make.resolve(temporary.path()).await {
            Ok(versions) => provenance::digest(&[&recipe, &keyring, &versions.join("\n")]),
            Err(why) => {
                // What is there is not made worse by a mirror that does not answer.
                let known = fs::read_to_string(&label).unwrap_or_default();
                let known = known.split_once('\n').filter(|(r, _)| *r == labelled);
                let Some((_, inputs)) = known.filter(|_| !self.work.afresh) else {
                    return Err(why);
                };
                tell("the mirror does not answer; what was made before is used", 0, 0);
                inputs.to_owned()
            }
        };
        let archive = kept.join(format!("{inputs}.tar"));
        if self.work.afresh || !archive.exists() {
            let part = temporary.path().join("tree.tar");
            make.tree(temporary.path(), &part, &tell).await?;
            let list = provenance::packages(&part, &debs).map_err(|e| e.to_string())?;
            let text = serde_json::to_vec(&list).map_err(|e| e.to_string())?;
            let done = write_atomically(&archive.with_extension("json"), &text);
            let done = done.and_then(|()| fs::rename(&part, &archive));
            done.map_err(|e| format!("{}: {e}", archive.display()))?;
            forget_older(&label, &kept, &inputs);
            let _ = write_atomically(&label, format!("{labelled}\n{inputs}").as_bytes());
        }
        let packages = fs::read(archive.with_extension("json")).ok();
        let packages = packages.and_then(|text| serde_json::from_slice(&text).ok());
        let sized = provenance::contents(&archive).map_err(|e| e.to_string())?;
        Ok(Tree { archive, inputs, packages: packages.unwrap_or_default(), contents: sized, parts })
    }

    async fn image(
        &self,
        entry: &Entry,
        size: u64,
        name: &str,
        tree: &Tree,
    ) -> Result<(Outcome, Vec<(PathBuf, Sums)>), String> {
        let folder = self.work.out.join(format!("output-{name}"));
        let base = format!("packer-{name}");
        let grub = &self.grub;
        let loaders =
            [("boot.img", &grub.boot), ("core.img", &grub.core), ("BOOTX64.EFI", &grub.efi)];
        let mut files = tree.parts.clone();
        files.extend(loaders.map(|(path, bytes)| provenance::Part {
            path: path.into(),
            sha256: hex(&Sha256::digest(bytes)),
        }));
        let loaders: String = files[files.len() - 3..].iter().map(|f| f.sha256.as_str()).collect();
        let form = format!("{:?}", self.matrix.compress);
        let inputs = provenance::digest(&[&tree.inputs, &loaders, name, &size.to_string(), &form]);
        let beside = folder.join(format!("{base}.provenance.json"));
        let outputs = match self.matrix.compress.as_slice() {
            [] => vec![folder.join(&base)],
            forms => forms.iter().map(|f| folder.join(format!("{base}.{}", f.suffix()))).collect(),
        };
        let known = Provenance::read(&beside);
        let same = known.is_some_and(|known| {
            let there = |o: &Output| {
                fs::metadata(folder.join(&o.file)).is_ok_and(|meta| meta.len() == o.sums.bytes)
            };
            known.inputs_sha256 == inputs && known.outputs.iter().all(there)
        });
        if same && !self.work.afresh {
            (self.progress)(name, "unchanged", 0, 0);
            // Taken from the files themselves: somebody may have changed them.
            let sums = outputs.into_iter().map(|path| match pack::sums(&path) {
                Ok(sums) => Ok((path, sums)),
                Err(e) => Err(format!("{}: {e}", path.display())),
            });
            return Ok((Outcome::Unchanged, sums.collect::<Result<_, _>>()?));
        }
        let begun = Instant::now();
        let _packing = self.packing.lock().await;
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let part = tempfile::Builder::new().prefix(".part-").tempdir_in(&folder);
        let part = part.map_err(|e| format!("{}: {e}", folder.display()))?;
        let raw = part.path().join(&base);
        self.disk(entry, size, name, tree, &raw).await?;
        let (mut written, mut made) = (Vec::new(), Vec::new());
        for (form, to) in self.forms(&outputs) {
            let sums = self.finish(name, form, &raw, to, part.path()).await?;
            let file = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
            written.push(Output { file, sums: sums.clone() });
            made.push((to.clone(), sums));
        }
        let provenance = Provenance {
            image: name.to_owned(),
            made_by: concat!("lodge ", env!("CARGO_PKG_VERSION")).into(),
            size_bytes: size * GB,
            inputs_sha256: inputs,
            suite: entry.suite().name.to_owned(),
            mirrors: entry.mirrors.clone(),
            packages: tree.packages.clone(),
            files,
            outputs: written,
        };
        provenance.write(&beside).map_err(|e| format!("{}: {e}", beside.display()))?;
        Ok((Outcome::Built { seconds: begun.elapsed().as_secs_f64() }, made))
    }

    fn forms<'a>(&self, outputs: &'a [PathBuf]) -> Vec<(Option<Compress>, &'a PathBuf)> {
        let forms = self.matrix.compress.iter().copied().map(Some).chain([None]);
        forms.zip(outputs).collect()
    }

    /// Writes the disk.
    async fn disk(
        &self,
        entry: &Entry,
        size: u64,
        name: &str,
        tree: &Tree,
        raw: &Path,
    ) -> Result<(), String> {
        let (own, tree_path, contents) = (name.to_owned(), tree.archive.clone(), tree.contents);
        let root = identity(&tree.inputs);
        let identities = contents::identities(&format!("{}-{}", entry.distro, self.matrix.name));
        let (grub, progress, raw) = (self.grub.clone(), self.progress.clone(), raw.to_owned());
        let work = move || {
            let plan = Plan { tree: &tree_path, contents, size: size * GB, identities, root };
            let out = File::options().write(true).create_new(true).open(&raw);
            let out = out.map_err(|e| format!("{}: {e}", raw.display()))?;
            plan.write(out, &grub, |done| progress(&own, "writing the disk", done, contents))
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
    }

    /// Puts an image in its place, packed or as it is.
    async fn finish(
        &self,
        name: &str,
        form: Option<Compress>,
        raw: &Path,
        to: &Path,
        part: &Path,
    ) -> Result<Sums, String> {
        let word = form.map_or("computing digests", |f| match f {
            Compress::Gzip => "packing with gzip",
            Compress::Zstd => "packing with zstd",
        });
        (self.progress)(name, word, 0, 0);
        let (raw, to) = (raw.to_owned(), to.to_owned());
        let part = part.join("packed");
        let work = move || {
            let from = match form {
                Some(form) => {
                    pack::pack(&raw, &part, form)?;
                    part
                }
                None => raw,
            };
            let sums = pack::sums(&from)?;
            fs::rename(from, &to)?;
            Ok(sums)
        };
        let done: io::Result<Sums> =
            tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?;
        done.map_err(|e| format!("{name}: {e}"))
    }
}

/// Held by one at a time, of all processes.
async fn alone(path: PathBuf) -> Result<File, String> {
    let lock = move || {
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|e| format!("{}: {e}", path.display()))?;
        let held = rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive);
        held.map(|()| file).map_err(|e| format!("{}: {e}", path.display()))
    };
    tokio::task::spawn_blocking(lock).await.map_err(|e| e.to_string())?
}

/// Takes away what an earlier tree of the same name left.
fn forget_older(label: &Path, kept: &Path, inputs: &str) {
    let known = fs::read_to_string(label).unwrap_or_default();
    if let Some((_, old)) = known.split_once('\n').filter(|(_, old)| *old != inputs) {
        for suffix in ["tar", "json"] {
            let _ = fs::remove_file(kept.join(format!("{old}.{suffix}")));
        }
    }
}

/// The lists of digests, as `sha512sum` and `md5sum` write them: gzip first, as ever.
fn write_sums(out: &Path, made: &[Made]) -> Result<(), String> {
    let (mut sha512, mut md5) = (String::new(), String::new());
    let longest = made.iter().map(|m| m.files.len()).max().unwrap_or(0);
    for nth in 0..longest {
        for (file, sums) in made.iter().filter_map(|m| m.files.get(nth)) {
            let shown = file.strip_prefix(out).unwrap_or(file).display();
            sha512 += &format!("{}  {shown}\n", sums.sha512);
            md5 += &format!("{}  {shown}\n", sums.md5);
        }
    }
    for (name, text) in [("SHA512SUM.txt", sha512), ("MD5SUM.txt", md5)] {
        let path = out.join(name);
        write_atomically(&path, text.as_bytes()).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
