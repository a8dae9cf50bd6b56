//! The log: the runner's own lines, each with its moment, and what scripts write, byte for byte.
//! Kept from growing without end.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Beyond this a log is put aside before the next run; the one put aside before goes.
const CAP: u64 = 16 << 20;

pub(crate) struct Log {
    path: PathBuf,
    said: Option<String>,
}

impl Log {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), said: None }
    }

    pub(crate) fn say(&mut self, line: &str) {
        self.said = None;
        let moment = humantime::format_rfc3339_seconds(SystemTime::now());
        let written = self.open().and_then(|mut f| writeln!(f, "{moment} {line}"));
        if written.is_err() {
            // Where the log cannot be written, whoever started this may hear it.
            let _ = writeln!(io::stderr(), "vm-bootstrap: {line}");
        }
    }

    /// What is said again and again is said once.
    pub(crate) fn say_once(&mut self, line: &str) {
        if self.said.as_deref() != Some(line) {
            self.say(line);
            self.said = Some(line.to_owned());
        }
    }

    /// For the output of a script.
    pub(crate) fn open(&self) -> io::Result<File> {
        File::options().create(true).append(true).open(&self.path)
    }

    pub(crate) fn trim(&self) {
        if fs::metadata(&self.path).is_ok_and(|meta| meta.len() > CAP) {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            let _ = fs::rename(&self.path, old);
        }
    }

    pub(crate) fn tail(&self, bytes: usize) -> String {
        let read = || {
            let mut file = File::open(&self.path)?;
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(bytes as u64)))?;
            let mut tail = Vec::new();
            file.take(bytes as u64).read_to_end(&mut tail)?;
            Ok::<_, io::Error>(tail)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }
}
