//! `lodge flist` as grammar, and flists as the roots of machines.

use std::path::PathBuf;

use clap::{Subcommand, ValueHint};
use lodge_spec::flist::{FlistDraft, Source};

#[derive(Debug, Subcommand)]
pub enum FlistVerb {
    /// Make an flist of a folder, an archive, a disk (ext4, qcow2) or a stored image; its contents
    /// go to a store. A stored image with a kernel of its own boots from the flist.
    #[command(
        after_help = "Example:\n  lodge flist create ./root web.flist --store dir:///srv/blocks --route http://10.0.0.1/blocks\n  lodge flist create debian-12 debian.fl --store zdb://127.0.0.1:9900"
    )]
    Create {
        /// A folder, an archive, a disk, or the name of a stored image.
        source: String,
        /// `.fl` is written as rfs does, everything else as 0-flist does.
        #[arg(value_hint = ValueHint::FilePath)]
        out: PathBuf,
        /// Where the contents go: dir://, zdb://, redis://, s3://, s3s:// or server://.
        #[arg(long, value_name = "URL")]
        store: String,
        /// Where readers find them, written into the flist; the store itself when absent, without
        /// its password.
        #[arg(long, value_name = "URL")]
        route: Option<String>,
        /// Put a host file into it.
        #[arg(long, value_name = "PATH=HOSTFILE")]
        file: Vec<String>,
        /// Say something about it.
        #[arg(long, value_name = "KEY=VALUE")]
        tag: Vec<String>,
    },
    /// What an flist holds, as JSON.
    #[command(after_help = "Example:\n  lodge flist inspect web.flist")]
    Inspect {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// List a directory of an flist.
    #[command(after_help = "Example:\n  lodge flist ls web.flist /etc")]
    Ls {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[arg(default_value = "/")]
        path: String,
    },
    /// Print a file of an flist.
    #[command(after_help = "Example:\n  lodge flist cat web.flist /boot/boot.yaml")]
    Cat {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        path: String,
        /// A store to ask before those that it names.
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// Take everything out of an flist.
    #[command(after_help = "Example:\n  lodge flist extract web.flist ./root")]
    Extract {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// A folder that is made, or is empty.
        #[arg(value_hint = ValueHint::DirPath)]
        folder: PathBuf,
        /// A store to ask before those that it names.
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// See that all blocks of an flist are in their stores and are what they should be.
    #[command(after_help = "Example:\n  lodge flist verify web.flist")]
    Verify {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// A store to ask before those that it names.
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// Lay flists of one format over each other, later ones on top. Contents stay in their stores.
    #[command(
        after_help = "Example:\n  lodge flist merge base.flist app.flist --out both.flist --route http://10.0.0.1/blocks"
    )]
    Merge {
        #[arg(required = true, value_hint = ValueHint::FilePath)]
        files: Vec<PathBuf>,
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
        /// Where readers find the blocks of all; the first one's stores when absent.
        #[arg(long, value_name = "URL")]
        route: Option<String>,
    },
}

/// What `lodge run` is given: the name of an image, or where an flist is.
pub(super) fn root(
    text: Option<String>,
    store: Option<String>,
) -> Result<(Option<String>, Option<FlistDraft>), String> {
    Ok(match text {
        Some(text) if Source::names_flist(&text) => {
            let source = match text.contains("://") {
                true => text,
                false => super::grammar::absolute(text.as_ref()),
            };
            (None, Some(FlistDraft { source: Some(source), store, ..FlistDraft::default() }))
        }
        _ if store.is_some() => return Err("--store is about flists, and there is none".into()),
        image => (image, None),
    })
}
