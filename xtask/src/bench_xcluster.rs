//! Figures of xcluster: images in the time that a shell takes to start, a disk from a large folder
//! against `mke2fs`, and a cluster from nothing. Nothing is
//! asserted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::bench::{Row, median, memory};
use crate::run::command;

const ROUNDS: usize = 11;
/// Folders of the size of a distribution are written so often.
const LARGE: usize = 3;
const NODES: usize = 6;

struct Place<'a> {
    lodge: &'a Path,
    home: &'a Path,
    kernels: PathBuf,
}

pub(crate) fn measure(lodge: &Path, home: &Path, cache: &Path) -> Result<Vec<Row>> {
    let place = Place { lodge, home, kernels: cache.join("kernels") };
    let mut rows = place.images()?;
    rows.push(place.folder()?);
    rows.extend(place.cluster()?);
    Ok(rows)
}

fn milliseconds(mut command: Command) -> Result<f64> {
    let begun = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(took)
}

impl Place<'_> {
    fn xc(&self, words: &[&str]) -> Command {
        let mut command = command(&self.lodge.to_string_lossy());
        let built = self.kernels.join("ws/xcluster");
        command.arg("xc").args(words).env("LODGE_HOME", self.home);
        command.env("XCLUSTER_WORKSPACE", self.home.join("ws"));
        command.env("__kbin", built.join("bzImage-linux-6.1"));
        command.env("__kobj", built.join("obj-linux-6.1"));
        command
    }

    fn images(&self) -> Result<Vec<Row>> {
        // Programs that have to be fetched are fetched once.
        milliseconds(self.xc(&["mkimage"]))?;
        let image = self.home.join("ws/xcluster/hd.img");
        let mut made = Vec::new();
        for _ in 0..ROUNDS {
            fs::remove_file(&image)?;
            made.push(milliseconds(self.xc(&["mkimage"]))?);
        }
        let mut extended = Vec::new();
        for _ in 0..ROUNDS {
            extended.push(milliseconds(self.xc(&["ximage", "env", "template", "xnet"]))?);
        }
        Ok(vec![
            Row {
                figure: "xc mkimage of the base, p50",
                measured: format!("{:.0} ms", median(made)),
                target: "300 ms",
            },
            Row {
                figure: "xc ximage with three overlays, p50",
                measured: format!("{:.0} ms", median(extended)),
                target: "500 ms",
            },
        ])
    }

    /// The kernel's source: many small files, more than a gigabyte.
    fn folder(&self) -> Result<Row> {
        let tree = self.kernels.join("ws/linux/linux-6.1");
        let (ours, theirs) = (self.home.join("ours.img"), self.home.join("theirs.img"));
        let (mut own, mut reference) = (Vec::new(), Vec::new());
        let mut digests = Vec::new();
        for round in 0..=LARGE {
            let _ = fs::remove_file(&ours);
            let mut make = command(&self.lodge.to_string_lossy());
            make.args(["image", "make", "--size", "3GiB"]).arg(&tree).arg(&ours);
            let took = milliseconds(make)?;
            let digest = command("sha256sum").arg(&ours).output()?.stdout;
            digests.push(digest);
            fs::File::create(&theirs)?.set_len(3 << 30)?;
            let mut make = command("mke2fs");
            make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&theirs);
            let reference_took = milliseconds(make)?;
            fs::remove_file(&theirs)?;
            // The first round fills the page cache.
            if round > 0 {
                own.push(took);
                reference.push(reference_took);
            }
        }
        let clean = command("e2fsck").arg("-fn").arg(&ours).output()?.status.success();
        fs::remove_file(&ours)?;
        let same = digests.windows(2).all(|pair| pair[0] == pair[1]);
        let (own, reference) = (median(own), median(reference));
        Ok(Row {
            figure: "disk from a folder of 1.4 GB, against mke2fs -d",
            measured: format!(
                "{:.1}x faster ({own:.0} / {reference:.0} ms), {}, {}",
                reference / own,
                if same { "same bytes" } else { "bytes differ" },
                if clean { "clean" } else { "damaged" }
            ),
            target: "3x, same bytes",
        })
    }

    fn cluster(&self) -> Result<Vec<Row>> {
        let mut list = Vec::new();
        let mut resident = 0.0;
        let mut disk = 0;
        for _ in 0..3 {
            list.push(milliseconds(self.xc(&["start", "--nvm=4", "--nrouters=2"]))?);
            let mut all = Vec::new();
            for line in fs::read_dir("/proc")?.flatten() {
                let Ok(pid) = line.file_name().to_string_lossy().parse::<u32>() else { continue };
                let words = fs::read(line.path().join("cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&words).into_owned();
                if words.starts_with("qemu") && words.contains("guest=xc-vm-") {
                    all.push(memory(pid, "RssAnon:", "status"));
                }
            }
            anyhow::ensure!(all.len() == NODES, "{} nodes of {NODES} are found", all.len());
            resident = median(all);
            let mut layers = command("du");
            layers.args(["-s", "--block-size=1K"]).arg(self.home.join("machines"));
            let text = layers.output()?.stdout;
            let total = String::from_utf8_lossy(&text).into_owned();
            disk = total.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            milliseconds(self.xc(&["stop", "--now"]))?;
        }
        Ok(vec![
            Row {
                figure: "six nodes from nothing to ssh, TCG",
                measured: format!("{:.1} s", median(list) / 1000.0),
                target: "12 s",
            },
            Row {
                figure: "an idle node's memory beside its 128 MiB; its disk",
                measured: format!(
                    "{:.0} MiB in all; {:.1} MiB",
                    resident,
                    disk as f64 / 1024.0 / NODES as f64
                ),
                target: "reported",
            },
        ])
    }
}
