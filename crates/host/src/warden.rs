//! The warden: one small process per machine, parent of its hypervisor. Keeps the console, the
//! forwarded ports and the exit status whatever becomes of the daemon. Carries out one
//! `WardenPlan`; decides nothing.

mod bootstrap;
pub mod console;
mod forward;
mod mdata;
pub mod message;
mod root;
mod screen;
mod serve;
mod start;

use std::io::Write;

use message::Started;

/// The program `lodge warden`: reads its plan from standard input, says one line on standard
/// output, then serves until the hypervisor ends.
pub fn main() -> std::process::ExitCode {
    match start::start() {
        Ok(started) => {
            let mut stdout = std::io::stdout();
            let line = serde_json::to_string(&Started::Ok { pid: started.pid });
            let _ = writeln!(stdout, "{}", line.unwrap_or_default());
            let _ = stdout.flush();
            serve::serve(started);
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            let line = serde_json::to_string(&Started::Error { error });
            let _ = writeln!(std::io::stdout(), "{}", line.unwrap_or_default());
            std::process::ExitCode::FAILURE
        }
    }
}
