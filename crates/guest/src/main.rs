//! `vm-bootstrap`: runs inside a guest. Grows the root into its disk, fetches the script that its
//! host serves and runs it until it succeeds or has failed as often as it may. Knows nothing of
//! machines or of who serves.

mod fetch;
mod folder;
mod grow;
mod log;
mod runner;
mod script;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use folder::Folder;

const USAGE: &str = "\
usage: vm-bootstrap [--dir DIR] [--log FILE] [--url URL] [COMMAND]

commands:
  status   say how far it has come (the default)
  run      fetch the script and run it until it succeeds or has failed as often as
           bootstrap-max-retry says
  boot     grow the root into its disk, then run; what a system does when it starts
  rearm    begin anew: no runs so far, and nothing in the way
  disarm   never run it again
  grow     only grow the root into its disk
";

/// Where everything is; other places are for tests and for those who build images.
pub(crate) struct Places {
    pub(crate) dir: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) lock: PathBuf,
    pub(crate) url: String,
}

fn main() -> ExitCode {
    let mut places = Places {
        dir: "/root/bootstrap".into(),
        log: "/var/log/vm-bootstrap.log".into(),
        lock: "/run/vm-bootstrap.lock".into(),
        url: "http://10.0.2.100/vm-bootstrap".into(),
    };
    let mut command = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = |into: &mut PathBuf| args.next().map(|v| *into = v.into()).is_some();
        let known = match arg.as_str() {
            "--dir" => value(&mut places.dir),
            "--log" => value(&mut places.log),
            "--lock" => value(&mut places.lock),
            "--url" => args.next().map(|v| places.url = v).is_some(),
            word if command.is_none() && !word.starts_with('-') => {
                command = Some(word.to_owned());
                true
            }
            _ => false,
        };
        if !known {
            return usage();
        }
    }
    let folder = Folder::new(&places.dir);
    let done = match command.as_deref().unwrap_or("status") {
        "run" => return runner::run(&places, false),
        "boot" => return runner::run(&places, true),
        "grow" => grow::root().map(|grown| grown.unwrap_or_else(|| "nothing to grow".into())),
        "status" => Ok(folder.status()),
        "rearm" => folder.rearm().map(|()| "armed".into()).map_err(|e| e.to_string()),
        "disarm" => {
            folder.conclude("disarmed").map(|()| "disarmed".into()).map_err(|e| e.to_string())
        }
        _ => return usage(),
    };
    match done {
        Ok(text) => {
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "vm-bootstrap: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    let _ = write!(std::io::stderr(), "{USAGE}");
    ExitCode::from(2)
}
