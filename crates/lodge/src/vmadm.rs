//! The program called as `vmadm`: brings to that interface what it needs of this host, and
//! connects terminals to consoles.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use lodge_doors::vmadm::{self, End, Place};
use lodge_host::paths::Paths;
use lodge_spec::request::{Reply, Request};

use crate::{client, console, settings};

/// Ctrl-], as on the system that this comes from.
const LEAVE: u8 = 0x1d;

/// Carries out one command line, the program's name left out.
pub(crate) fn main(program: &str, words: &[String]) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let paths = Paths::find();
        let (tags, settings) = settings::vmadm(&paths)?;
        let mut client = client::connect(&paths).await?;
        let place = Place {
            program: program.to_owned(),
            settings,
            tags,
            zones: paths.zones().display().to_string(),
            pool_mib: lodge_host::paths::capacity(&paths.state) >> 20,
            stdin_is_terminal: io::stdin().is_terminal(),
            stdout_is_terminal: io::stdout().is_terminal(),
            stdout: &mut io::stdout(),
            stderr: &mut io::stderr(),
            read: &read,
            open: &open,
            store: &store,
            archive: &|uuid, text| archive(&paths, uuid, text),
        };
        match vmadm::run(words, &mut client, place).await? {
            End::Status(code) => Ok(ExitCode::from(code)),
            End::Console(target) => {
                let reply = client.ask(&Request::Console { target: target.clone() }).await??;
                if let Reply::Console { socket, .. } = reply {
                    console::attach_until(Path::new(&socket), &target, LEAVE).await?;
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

/// Keeps a machine's description and its console's logs under `archive` beside the machines'
/// folders, if somebody has made that folder.
fn archive(paths: &Paths, uuid: &str, text: &str) -> io::Result<()> {
    let archive = paths.zones().join("archive");
    let Ok(id) = uuid.parse() else { return Ok(()) };
    if !archive.is_dir() {
        return Ok(());
    }
    let folder = archive.join(uuid);
    lodge_host::paths::make_dir(&folder)?;
    lodge_host::paths::write_private(&folder.join("vm.json"), text.as_bytes())?;
    for entry in std::fs::read_dir(paths.machine(id))?.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("console.log") {
            std::fs::copy(entry.path(), folder.join(name))?;
        }
    }
    Ok(())
}

fn read(file: Option<&str>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(file.unwrap_or("-"))?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn open(path: &str) -> io::Result<Box<dyn Read>> {
    Ok(match path {
        "-" => Box::new(io::stdin()),
        path => Box::new(File::open(path)?),
    })
}

/// Makes a disk's file, whole or not at all.
fn store(path: &str, owner: u32, from: &mut dyn Read, bytes: u64) -> io::Result<()> {
    let part = format!("{path}.part");
    let _ = std::fs::remove_file(&part);
    let mut file = File::options().create_new(true).write(true).mode(0o600).open(&part)?;
    if io::copy(from, &mut file)? != bytes {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream is cut off"));
    }
    file.flush()?;
    file.sync_all()?;
    if std::fs::metadata("/proc/self").is_ok_and(|own| {
        use std::os::unix::fs::MetadataExt;
        own.uid() == 0
    }) {
        chown(&part, Some(owner), Some(owner))?;
    }
    std::fs::rename(&part, path)
}
