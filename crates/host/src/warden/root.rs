//! The process behind a root that is an flist: started before the hypervisor, so that it is there
//! when the jail gives it the file system; it ends when that is unmounted.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use super::start::{listen, place};
use crate::backend::RootServer;
use crate::flist::server::{Said, WORD};
use crate::proc::Tool;

/// Starts it and waits until it has read the flist.
pub(super) fn start(root: &RootServer, run: &Path) -> Result<Child, String> {
    let text = |e: std::io::Error| format!("the process that serves the root: {e}");
    match root.jail {
        Some(jail) if root.config.is_mounted() => {
            let (ours, theirs) = UnixStream::pair().map_err(text)?;
            place(ours, jail)?;
            place(theirs, root.own)?;
        }
        jail => {
            let path = RootServer::socket(run);
            place(listen(&path)?, root.own)?;
            match jail {
                // Its name is needed for a moment only.
                Some(jail) => {
                    let connected = UnixStream::connect(&path);
                    let _ = std::fs::remove_file(&path);
                    place(connected.map_err(text)?, jail)?;
                }
                // The hypervisor has a user of its own, and the folder is in nobody's reach.
                None => {
                    let all = std::fs::Permissions::from_mode(0o666);
                    std::fs::set_permissions(&path, all).map_err(text)?;
                }
            }
        }
    }
    let log =
        File::options().create(true).append(true).mode(0o600).open(&root.log).map_err(text)?;
    let own = crate::paths::own_program().map_err(text)?;
    let mut command = Tool::new(own).arg(WORD).arg(&root.config.flist).command().into_std();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(text)?;
    // SAFETY: the number was placed above for the process that has it now.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(root.own) });
    let order = serde_json::to_vec(&root.config).map_err(|e| e.to_string())?;
    child.stdin.take().expect("piped").write_all(&order).map_err(text)?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).map_err(text)?;
    match serde_json::from_str::<Said>(&line) {
        Ok(Ok(_)) => Ok(child),
        Ok(Err(why)) => Err(why),
        Err(_) => Err("the process that serves the root ended without a word".into()),
    }
}
