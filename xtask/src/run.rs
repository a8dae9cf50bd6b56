//! Running steps and saying how they ended. The only place in here that starts processes.

use std::io::Write;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

pub(crate) fn say(text: &str) {
    // Nobody may be reading.
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[expect(clippy::disallowed_methods, reason = "automation has no daemon to go through")]
pub(crate) fn command(program: &str) -> Command {
    Command::new(program)
}

pub(crate) enum Work {
    Program { program: &'static str, args: Vec<String>, optional: bool },
    Call(fn() -> Result<()>),
}

pub(crate) struct Step {
    name: &'static str,
    work: Work,
}

impl Step {
    pub(crate) fn new(name: &'static str, program: &'static str, args: &[&str]) -> Self {
        let args = args.iter().map(|a| (*a).to_owned()).collect();
        Self { name, work: Work::Program { program, args, optional: false } }
    }

    /// Skipped aloud where its program is missing.
    pub(crate) fn optional(name: &'static str, program: &'static str, args: &[&str]) -> Self {
        let args = args.iter().map(|a| (*a).to_owned()).collect();
        Self { name, work: Work::Program { program, args, optional: true } }
    }

    pub(crate) fn call(name: &'static str, call: fn() -> Result<()>) -> Self {
        Self { name, work: Work::Call(call) }
    }

    fn run(&self) -> Result<String> {
        match &self.work {
            Work::Call(call) => call().map(|()| "ok".to_owned()),
            Work::Program { program, args, optional } => {
                if *optional && !installed(args) {
                    return Ok(format!("SKIPPED: cargo-{} is not installed", args[0]));
                }
                let status = command(program).args(args).status()?;
                match status.success() {
                    true => Ok("ok".to_owned()),
                    false => bail!("{program} {} ended with {status}", args.join(" ")),
                }
            }
        }
    }
}

fn installed(args: &[String]) -> bool {
    let found = command("cargo").args([args[0].as_str(), "--version"]).output();
    found.is_ok_and(|o| o.status.success())
}

/// Runs all steps, also after one has failed, and lists those that did.
pub(crate) fn all(steps: &[Step]) -> Result<()> {
    let mut failed = Vec::new();
    for step in steps {
        say(&format!("== {}", step.name));
        let begun = Instant::now();
        let text = match step.run() {
            Ok(text) => text,
            Err(error) => {
                failed.push(step.name);
                format!("FAILED: {error:#}")
            }
        };
        say(&format!("== {}: {text} ({:.1} s)", step.name, begun.elapsed().as_secs_f64()));
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}
