//! `lodge image …` as clap knows it.

use std::path::PathBuf;

use clap::{Subcommand, ValueHint};

#[derive(Debug, Subcommand)]
pub enum Image {
    #[command(flatten)]
    Here(Here),
    /// Build an image out of distribution packages.
    #[command(
        after_help = "Example:\n  lodge image build debian-12 --size 4GB --packages curl,git"
    )]
    Build {
        name: String,
        /// Size of its disk; 2 GB when absent.
        #[arg(long)]
        size: Option<String>,
        /// More packages.
        #[arg(long, value_delimiter = ',')]
        packages: Vec<String>,
    },
    /// Take a disk image (raw or qcow2) into the store.
    #[command(after_help = "Example:\n  lodge image add disk.qcow2 --name mine")]
    Add {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[arg(long)]
        name: Option<String>,
    },
    /// Fetch an image into the store: from a URL that says what the file must be, or the one that
    /// a signed record of shadir describes. Nothing is used before it is verified.
    #[command(
        after_help = "Examples:\n  lodge image pull https://example.org/disk.qcow2.gz#MD5 --name \
                      mine\n  lodge image pull shacache:packer-images distribution==debian \
                      disk-size==50"
    )]
    Pull {
        /// `URL#MD5`, `URL#SHA512`, or `shacache:KEY`.
        #[arg(value_name = "URL#DIGEST|shacache:KEY")]
        source: String,
        /// Which record is meant: KEY==VALUE; also <=, >=, <, >, << (lowest), >> (highest).
        filters: Vec<String>,
        #[arg(long)]
        name: Option<String>,
        /// Believe records that nobody who is trusted has signed.
        #[arg(long)]
        insecure: bool,
        #[command(flatten)]
        shacache: Shacache,
    },
    /// List images.
    #[command(after_help = "Example:\n  lodge image ls")]
    Ls,
    /// Everything about an image, as JSON: a stored one by its name, or the layers of a cluster's
    /// image by its path.
    #[command(
        after_help = "Example:\n  lodge image inspect debian-12\n  lodge image inspect ./hd.img"
    )]
    Inspect { name: String },
    /// Remove an image that no machine uses.
    #[command(after_help = "Example:\n  lodge image rm debian-12")]
    Rm { name: String },
    /// Compare images with their digests.
    #[command(after_help = "Example:\n  lodge image verify debian-12")]
    Verify { name: Option<String> },
}

#[derive(Debug, clap::Args)]
pub struct Shacache {
    /// Configuration of shacache and shadir, as their own tools read it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(default_value = "/etc/opt/shacache/shacache.cfg")]
    pub shacache: PathBuf,
}

/// What is done in this process, by its user, with files that it names.
#[derive(Debug, Subcommand)]
pub enum Here {
    /// Write a folder as a disk with an ext4 file system: no root, no mount, the same bytes for
    /// the same files.
    #[command(after_help = "Example:\n  lodge image make ./rootfs disk.img --size 4GB")]
    Make {
        #[arg(value_hint = ValueHint::DirPath)]
        folder: PathBuf,
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Size of the disk; made to measure when absent.
        #[arg(long)]
        size: Option<String>,
        /// `raw` or `qcow2`.
        #[arg(long, default_value = "raw")]
        format: String,
    },
    /// Build a family of images, each distribution in each of its sizes, out of one document. What
    /// has not changed is not built again.
    #[command(
        after_help = "Example:\n  lodge image matrix build-vm-bootstrap.yml\n  UPLOAD=yes lodge \
                      image matrix build-vm-bootstrap.yml"
    )]
    Matrix {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Where images and lists of digests go; beside the document when absent.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        out: Option<PathBuf>,
        /// Build everything anew.
        #[arg(long)]
        afresh: bool,
        /// Upload what was built to shacache and shadir; UPLOAD=yes means the same.
        #[arg(long)]
        upload: bool,
        #[command(flatten)]
        shacache: Shacache,
    },
    /// Read a Packer template as the document of a family of images: what maps is printed, what
    /// does not is listed. Nothing in it is carried out.
    #[command(
        after_help = "Example:\n  lodge image import-packer debian12.json > build-vm-bootstrap.yml"
    )]
    ImportPacker {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Values of variables, where the template has none or others are meant.
        #[arg(long = "var", value_name = "NAME=VALUE")]
        vars: Vec<String>,
    },
}
