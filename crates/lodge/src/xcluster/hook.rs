//! A user's own commands: a shell file, `$XCLUSTER_HOOK`, whose functions `cmd_NAME` are commands
//! beside those of `xc`, or in their place. It is the user's program, run by the user's shell; what
//! is typed reaches it as arguments and variables, never as text to be read.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use lodge_doors::xcluster::grammar::{self, Command};
use lodge_doors::xcluster::settings::Settings;

/// What such files are used to find. A command of `xc` itself is called without the file, so that
/// one in its place can call it.
const PRELUDE: &str = r#"
die() { echo "ERROR: $*" >&2; exit 1; }
log() { echo "$*" >&2; }
dbg() { test -z "$__verbose" || echo "$*" >&2; }
own=$1 name=$2
shift 2
for command in $own; do
    eval "cmd_$command() { XCLUSTER_HOOK= \"\$XCLUSTER\" $command \"\$@\"; }"
done
. "$XCLUSTER_HOOK" || die "Cannot read [$XCLUSTER_HOOK]"
"cmd_$name" "$@"
"#;

pub(super) struct Hook {
    path: PathBuf,
    text: String,
}

impl Hook {
    /// The one that the environment names.
    pub(super) fn find() -> Result<Option<Self>> {
        let Some(path) = std::env::var_os("XCLUSTER_HOOK").filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        let path = PathBuf::from(path);
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("XCLUSTER_HOOK={}", path.display()))?;
        Ok(Some(Self { path, text }))
    }

    /// Whether the file has such a command.
    pub(super) fn has(&self, name: &str) -> bool {
        let begins = |line: &str| {
            let rest = line.trim_start().strip_prefix("cmd_")?.strip_prefix(name)?;
            rest.trim_start().starts_with("()").then_some(())
        };
        !name.is_empty() && self.text.lines().any(|line| begins(line).is_some())
    }

    /// What the file says of itself, in lines that begin with two hashes.
    pub(super) fn help(&self) -> String {
        let lines = self.text.lines().filter_map(|line| line.strip_prefix("##"));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        if text.is_empty() { text } else { format!("\nOf {}:\n\n{text}", self.path.display()) }
    }

    /// Runs one of its commands; the exit status.
    pub(super) fn run(
        &self,
        commands: &[Command],
        words: &[String],
        settings: impl FnOnce(BTreeMap<String, String>) -> Result<Settings>,
    ) -> Result<u8> {
        let (name, rest) = words.split_first().ok_or_else(|| anyhow!("no command"))?;
        let (options, words) = grammar::loose(rest).map_err(|why| anyhow!(why))?;
        let settings = settings(options)?;
        super::link_callback(&settings.path("XCLUSTER"))?;
        let hook = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let own: Vec<&str> = commands.iter().map(|command| command.name).collect();
        let mut shell = super::foreign("sh")?;
        for (name, value) in settings.environment() {
            shell = shell.env(name, value);
        }
        let own = own.join(" ");
        let shell = shell.env("XCLUSTER_HOOK", hook).args(["-c", PRELUDE, "xc", &own, name]);
        let status = shell.args(words).command().as_std_mut().status()?;
        Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
    }
}
