//! `lodge-jail`: reads a `JailPlan` from standard input, confines itself and becomes the program
//! that the plan names. Its only words are an error on standard error and exit status 126.

use std::io::{Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut text = String::new();
    let read = std::io::stdin().take(1 << 20).read_to_string(&mut text);
    let error = match read.map_err(|e| e.to_string()) {
        Ok(_) => match serde_json::from_str(&text) {
            Ok(plan) => match lodge_jail::run(&plan) {
                Ok(()) => return ExitCode::SUCCESS,
                Err(error) => error.to_string(),
            },
            Err(error) => format!("the plan is not readable: {error}"),
        },
        Err(error) => error,
    };
    let _ = writeln!(std::io::stderr(), "lodge-jail: {error}");
    ExitCode::from(126)
}
