//! Disks as plain files: made empty, and turned from one format into another. What is in a disk is
//! a stranger's, so a process that can do nothing else reads it. Nothing that is there is replaced.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{ExitCode, Stdio};

use lodge_formats::qcow2::{self, volume};
use lodge_formats::sniff::{self, Kind};
use lodge_jail::worker::{self, WorkerPlan};
use tempfile::NamedTempFile;

use super::store::fill;
use crate::backend::DiskFormat;
use crate::flist::root::UID;
use crate::paths;
use crate::proc::Tool;

/// The word by which the program is called to turn standard input into standard output.
pub const WORD: &str = "convert-disk";
/// Larger disks are not made.
const MAX_BYTES: u64 = 1 << 46;
/// So much is looked at at once for holes.
const PIECE: usize = 1 << 16;

/// Makes an empty disk.
pub fn make(path: &Path, format: DiskFormat, bytes: u64) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    if bytes == 0 || bytes > MAX_BYTES {
        return Err(text(&format!("a disk has 1 to {MAX_BYTES} bytes")));
    }
    let mut part = part(path).map_err(|e| text(&e))?;
    match format {
        DiskFormat::Raw => part.as_file().set_len(bytes).map_err(|e| text(&e))?,
        DiskFormat::Qcow2 => {
            qcow2::write_empty(part.as_file_mut(), bytes, None).map_err(|e| text(&e))?;
        }
    }
    keep(part, path).map_err(|e| text(&e))
}

/// Writes what a disk holds into another file, in another format.
pub async fn convert(from: &Path, to: &Path, format: DiskFormat) -> Result<(), String> {
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| format!("{path}: {e}")
    };
    let input = File::open(from).map_err(at(from))?;
    if !input.metadata().map_err(at(from))?.is_file() {
        return Err(format!("{} is not a file", from.display()));
    }
    let part = part(to).map_err(at(to))?;
    let output = part.as_file().try_clone().map_err(at(to))?;
    let own = paths::own_program().map_err(|e| e.to_string())?;
    let mut child = Tool::new(own).args([WORD, format.as_str()]).command();
    child.stdin(input).stdout(output).stderr(Stdio::piped());
    let child = child.spawn().map_err(at(from))?;
    let done = child.wait_with_output().await.map_err(at(from))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let said = said.lines().last().unwrap_or("the process that reads it has ended").to_owned();
        return Err(format!("{}: {said}", from.display()));
    }
    keep(part, to).map_err(at(to))
}

/// A file beside the one that is to be, which is not there yet.
fn part(path: &Path) -> io::Result<NamedTempFile> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    tempfile::Builder::new().prefix(".part-").tempfile_in(folder)
}

fn keep(part: NamedTempFile, path: &Path) -> io::Result<()> {
    part.as_file().sync_all()?;
    part.persist_noclobber(path).map(drop).map_err(|e| e.error)
}

/// The process that reads: its input and its output are files, and there is nothing else for it.
pub fn main(format: &str) -> ExitCode {
    match run(format) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = writeln!(io::stderr(), "{why}");
            ExitCode::FAILURE
        }
    }
}

fn run(format: &str) -> Result<(), String> {
    let file = |fd: io::Result<OwnedFd>| fd.map(File::from).map_err(|e| e.to_string());
    let input = file(io::stdin().as_fd().try_clone_to_owned())?;
    let output = file(io::stdout().as_fd().try_clone_to_owned())?;
    let plan = WorkerPlan { uid: Some(UID), ..WorkerPlan::default() };
    worker::confine(&plan).map_err(|e| e.to_string())?;
    copy(input, &output, format).map_err(|e| e.to_string())
}

fn copy(mut input: File, output: &File, format: &str) -> io::Result<()> {
    let kind = sniff::read(&mut input)?;
    input.seek(SeekFrom::Start(0))?;
    if kind == Kind::Qcow2 {
        let reader = volume::Reader::open(input).map_err(io::Error::other)?;
        let size = reader.size();
        return write(reader, size, output, format);
    }
    let size = input.metadata()?.len();
    write(input, size, output, format)
}

fn write(input: impl Read, size: u64, output: &File, format: &str) -> io::Result<()> {
    if size > MAX_BYTES {
        return Err(io::Error::other(format!("the disk has more than {MAX_BYTES} bytes")));
    }
    match format {
        "qcow2" => {
            let mut writer = volume::Writer::new(output, size);
            pieces(input, &mut writer)?;
            writer.finish().map(drop)
        }
        _ => {
            pieces(input, output)?;
            output.set_len(size)
        }
    }
}

/// Copies what is not zero to where it belongs.
fn pieces(mut input: impl Read, mut output: impl Write + Seek) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let count = fill(&mut input, &mut piece)?;
        if count == 0 {
            return Ok(());
        }
        match piece[..count].iter().all(|byte| *byte == 0) {
            true => drop(output.seek(SeekFrom::Current(count as i64))?),
            false => output.write_all(&piece[..count])?,
        }
    }
}
