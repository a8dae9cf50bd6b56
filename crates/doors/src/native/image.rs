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
    },
}
