//! `lodge image …` where no daemon is needed: files made out of files, in this process and as its
//! user.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use lodge_doors::native::image::Here;
use lodge_host::image::matrix::{self, Made, Matrix, Outcome, Progress, Work};
use lodge_host::image::packer;
use lodge_host::paths::{Paths, make_dir};
use lodge_host::shacache::Config;

use crate::command::print;
use crate::pull;
use crate::xcluster::{native, told};

pub(crate) fn carry_out(verb: &Here) -> Result<ExitCode> {
    match verb {
        Here::Make { folder, file, size, format } => {
            native::folder(folder, file, size.as_deref(), format)
        }
        Here::Matrix { file, out, afresh, upload, shacache } => {
            let uploads = pull::uploads(*upload, &shacache.shacache)?;
            family(file, out.as_deref(), *afresh, uploads.as_ref())
        }
        Here::ImportPacker { file, vars } => {
            let imported = told(packer::import(file, vars))?;
            for left in &imported.left {
                writeln!(std::io::stderr(), "not taken over: {left}")?;
            }
            print(&imported.document)
        }
    }
}

/// Builds a family and says what became of each image.
fn family(
    file: &Path,
    out: Option<&Path>,
    afresh: bool,
    uploads: Option<&Config>,
) -> Result<ExitCode> {
    let matrix = told(Matrix::read(file))?;
    let beside = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let out = out.or(beside).unwrap_or(Path::new("."));
    let paths = Paths::find();
    let cache = paths.cache().join("matrix");
    make_dir(&cache)?;
    let work = Work { out: out.to_owned(), cache, afresh };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let building = matrix::build(&matrix, &work, progress());
    let made = runtime.block_on(async {
        tokio::select! {
            made = building => told(made),
            // What is under way goes with the work that holds it.
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; a rerun goes on")),
        }
    })?;
    print(&table(&made))?;
    let uploaded = match uploads {
        Some(config) => pull::upload(config, &matrix, &made, &work.out)?,
        None => true,
    };
    let failed = made.iter().any(|m| matches!(m.outcome, Outcome::Failed(_))) || !uploaded;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn table(made: &[Made]) -> String {
    let mut text = String::new();
    for Made { name, outcome, .. } in made {
        text += &match outcome {
            Outcome::Built { seconds } => format!("{name}: built in {seconds:.1} s\n"),
            Outcome::Unchanged => format!("{name}: unchanged\n"),
            Outcome::Failed(why) => format!("{name}: FAILED: {why}\n"),
        };
    }
    text
}

/// Each step of each image is a line; how far a step has come is one that is written over.
fn progress() -> Progress {
    let last = Mutex::new((String::new(), 0));
    let live = std::io::stderr().is_terminal();
    Arc::new(move |image, step, done, total| {
        let Ok(mut last) = last.lock() else { return };
        let line = format!("{image}: {step}");
        let percent = (done * 100).checked_div(total).unwrap_or(0);
        let mut err = std::io::stderr();
        let _ = match last.0 == line {
            false => writeln!(err, "{line}"),
            true if live && percent > last.1 => write!(err, "  {percent} %\r"),
            true => Ok(()),
        };
        *last = (line, percent);
    })
}
