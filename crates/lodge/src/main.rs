//! Wiring: one program that is the command line, the daemon, the warden of a machine and the
//! keeper of a network, told apart by its first argument. Holds no policy.

mod answer;
mod client;
mod command;
mod console;
mod daemon;
mod doctor;
mod flist;
mod image;
mod otlp;
mod plan;
mod pull;
mod receive;
mod settings;
mod vmadm;
mod xcluster;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use lodge_host::image::convert;
use lodge_host::remote::zdb;
use lodge_host::trial;

fn main() -> ExitCode {
    // The helper processes are told apart before anything else is touched: they stay small.
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let text = |i: usize| args.get(i).and_then(|a| a.to_str());
    match (text(1), text(2), text(3)) {
        (Some(trial::INSIDE), Some(canary), None) => return trial::inside(canary),
        (Some("warden"), None, None) => return lodge_host::warden::main(),
        (Some(lodge_host::flist::server::WORD), Some(_), None) => {
            return lodge_host::flist::server::main();
        }
        (Some(zdb::WORD), None, None) => return zdb::main(),
        (Some(convert::WORD), Some(format), None) => return convert::main(format),
        (Some("netd"), Some(dir), Some(name)) => {
            return lodge_host::net::keeper::main(Path::new(dir), name);
        }
        (_, _, _) => {}
    }
    let words: Vec<String> =
        args.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let called = text(0).and_then(|name| name.rsplit('/').next());
    let done = match called {
        Some("vmadm") => vmadm::main("vmadm", &words),
        Some("xc") => xcluster::main(&words),
        Some("xcadmin") => xcluster::admin(&words),
        Some(_) | None => command::main(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            // A reader that went away (`lodge ls | head`) is no error.
            let broken = error.chain().any(|e| {
                let io = e.downcast_ref::<std::io::Error>();
                io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            });
            if broken {
                return ExitCode::SUCCESS;
            }
            let _ = writeln!(std::io::stderr(), "lodge: {error:#}");
            ExitCode::FAILURE
        }
    }
}
