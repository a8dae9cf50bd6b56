//! `lodge-jail`: reads a `JailPlan` from standard input, confines itself and becomes the program
//! that the plan names. Called as `lodge-jail script …`, its words are the plan of a script, and its
//! streams the script's. Its only words are an error on standard error and exit status 126.

use std::io::{Read, Write};
use std::process::ExitCode;

use lodge_jail::script::ScriptPlan;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let done = match args.next() {
        Some(word) if word == "script" => match ScriptPlan::from_args(args) {
            Some(plan) => match lodge_jail::script::run(&plan) {
                Ok(status) => return ExitCode::from(status),
                Err(error) => Err(error.to_string()),
            },
            None => Err("script [--network] [--write PATH]... PROGRAM [ARG]...".into()),
        },
        _ => enter(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "lodge-jail: {error}");
            ExitCode::from(126)
        }
    }
}

fn enter() -> Result<(), String> {
    let mut text = String::new();
    std::io::stdin().take(1 << 20).read_to_string(&mut text).map_err(|e| e.to_string())?;
    let plan = serde_json::from_str(&text);
    let plan = plan.map_err(|e| format!("the plan is not readable: {e}"))?;
    lodge_jail::run(&plan).map_err(|e| e.to_string())
}
