//! The folder of control files, which people and scripts read and write by hand. What is in them
//! is text, never evaluated. A file that is written is the old one or the new one, whatever happens.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a script runs where nobody says.
pub(crate) const LIMIT: u32 = 10;
/// A run that fails is followed by a pause: the first one, twice as long after each, the last one.
const PAUSES: (u64, u64) = (1, 60);

pub(crate) struct Folder(PathBuf);

/// A control file and what was wrong with it.
pub(crate) struct Read<T> {
    pub(crate) value: T,
    pub(crate) warning: Option<String>,
}

impl Folder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn script(&self) -> PathBuf {
        self.0.join("bootstrap-script")
    }

    /// Whether the script may run.
    pub(crate) fn armed(&self) -> bool {
        self.0.join("start-bootstrap").is_file()
    }

    /// A run without a script counts.
    pub(crate) fn requires_script(&self) -> bool {
        self.0.join("require-script").exists()
    }

    /// How often the script may run in all.
    pub(crate) fn limit(&self) -> Read<u32> {
        let file = "bootstrap-max-retry";
        let wrong = |what: String| Read {
            value: LIMIT,
            warning: Some(format!("{file} {what}; {LIMIT} runs are allowed")),
        };
        match fs::read_to_string(self.0.join(file)) {
            Ok(text) => match decimal(&text) {
                Some(value) => Read { value, warning: None },
                None => wrong(format!("holds {}, which is no number of runs", shown(&text))),
            },
            Err(error) => wrong(format!("cannot be read ({error})")),
        }
    }

    /// How often the script has been started.
    pub(crate) fn runs(&self) -> u32 {
        let text = fs::read_to_string(self.0.join("retry-amount")).unwrap_or_default();
        decimal(&text).unwrap_or(0)
    }

    pub(crate) fn set_runs(&self, runs: u32) -> io::Result<()> {
        self.write("retry-amount", format!("{runs}\n").as_bytes(), 0o644)
    }

    pub(crate) fn set_script(&self, body: &[u8]) -> io::Result<()> {
        self.write("bootstrap-script", body, 0o700)
    }

    /// How it ended: `succeeded`, `given-up` or `disarmed`.
    pub(crate) fn outcome(&self) -> Option<String> {
        fs::read_to_string(self.0.join("outcome")).ok().map(|text| text.trim().to_owned())
    }

    pub(crate) fn conclude(&self, outcome: &str) -> io::Result<()> {
        self.write("outcome", format!("{outcome}\n").as_bytes(), 0o644)
    }

    pub(crate) fn rearm(&self) -> io::Result<()> {
        self.set_runs(0)?;
        self.write("start-bootstrap", b"", 0o644)?;
        match fs::remove_file(self.0.join("outcome")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// How long to wait after so many runs that failed.
    pub(crate) fn pause(&self, failed: u32) -> Duration {
        let fixed = fs::read_to_string(self.0.join("bootstrap-pause")).ok();
        let (first, last) = PAUSES;
        let growing = || first.checked_shl(failed.saturating_sub(1)).unwrap_or(last).min(last);
        let seconds = fixed.and_then(|text| decimal(&text)).map_or_else(growing, u64::from);
        Duration::from_secs(seconds)
    }

    /// How long a run may take.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let text = fs::read_to_string(self.0.join("bootstrap-timeout")).ok()?;
        decimal(&text).filter(|s| *s > 0).map(|s| Duration::from_secs(s.into()))
    }

    /// Lines `NAME=value` for the script's environment.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.0.join("bootstrap-env")).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let named = lines.filter(|(name, _)| {
            let mut letters = name.bytes();
            letters.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
                && letters.all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        named.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    pub(crate) fn status(&self) -> String {
        let (runs, limit) = (self.runs(), self.limit().value);
        let state = match self.outcome() {
            Some(outcome) => outcome,
            None if !self.armed() => "held: start-bootstrap is not there".into(),
            None if runs == 0 => "armed".into(),
            None => "under way".into(),
        };
        format!("{state}, {runs} of {limit} runs")
    }

    /// Replaces a file as a whole.
    fn write(&self, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let part = self.0.join(format!(".{name}.part"));
        let written = (|| {
            let _ = fs::remove_file(&part);
            let mut file = File::options().write(true).create_new(true).mode(mode).open(&part)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&part, self.0.join(name))?;
            File::open(&self.0)?.sync_all()
        })();
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written
    }
}

/// Decimal digits and nothing else but space around them.
fn decimal(text: &str) -> Option<u32> {
    let digits = text.trim();
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

fn shown(text: &str) -> String {
    let start: String = text.trim().chars().take(40).collect();
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path());
        (dir, folder)
    }

    #[test]
    fn case_g6_limits_are_decimal_numbers_or_the_usual_one() {
        let (dir, folder) = folder();
        let file = dir.path().join("bootstrap-max-retry");
        assert!(folder.limit().warning.is_some_and(|w| w.contains("cannot be read")));
        let digits = "1".repeat(40);
        for odd in ["abc", "", "-1", "1.5", "5 6", "0x10", &digits, "a[$(touch /tmp/g6)]"] {
            fs::write(&file, odd).unwrap();
            let limit = folder.limit();
            assert_eq!(limit.value, 10, "{odd}");
            assert!(limit.warning.is_some(), "{odd}");
        }
        for (text, value) in [("08\n", 8), ("010", 10), (" 3 \n", 3), ("0", 0)] {
            fs::write(&file, text).unwrap();
            assert_eq!(folder.limit().value, value, "{text}");
            assert!(folder.limit().warning.is_none());
        }
    }

    #[test]
    fn case_g15_a_file_is_the_old_one_or_the_new_one() {
        let (dir, folder) = folder();
        folder.set_runs(3).unwrap();
        // What a cut in the middle of the next write would have left.
        fs::write(dir.path().join(".retry-amount.part"), "").unwrap();
        assert_eq!(folder.runs(), 3);
        folder.set_runs(4).unwrap();
        assert_eq!(folder.runs(), 4);
        assert!(!dir.path().join(".retry-amount.part").exists());
    }

    #[test]
    fn pauses_grow_and_stay_within_bounds() {
        let (dir, folder) = folder();
        let seconds: Vec<u64> = (1..9).map(|n| folder.pause(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(folder.pause(200).as_secs(), 60);
        fs::write(dir.path().join("bootstrap-pause"), "0").unwrap();
        assert_eq!(folder.pause(5).as_secs(), 0);
    }

    #[test]
    fn what_was_concluded_can_begin_anew() {
        let (_dir, folder) = folder();
        folder.set_runs(10).unwrap();
        folder.conclude("given-up").unwrap();
        assert_eq!(folder.status(), "given-up, 10 of 10 runs");
        folder.rearm().unwrap();
        assert_eq!(folder.status(), "armed, 0 of 10 runs");
    }
}
