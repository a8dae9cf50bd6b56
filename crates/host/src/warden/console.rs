//! The machine's serial console: a log on disk with rotation, any number of readers, history for
//! those who come late, and an eye for the lines that matter. Holds no more than one line.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use regex_lite::Regex;

/// A log larger than this is rotated.
const MAX_LOG: u64 = 8 << 20;
/// Older logs that are kept: `console.log.1`, the youngest, to this.
const KEPT: u32 = 3;
/// How much history a late reader sees.
const HISTORY: u64 = 64 << 10;
/// Lines are judged by this much of them.
const MAX_LINE: usize = 4096;

pub(super) struct Log {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Log {
    pub(super) fn new(path: PathBuf, file: File) -> Self {
        let size = file.metadata().map_or(0, |m| m.len());
        Self { path, file, size }
    }

    /// Appends; a full disk loses log, not the machine.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.size > MAX_LOG {
            self.rotate();
        }
        if self.file.write_all(bytes).is_ok() {
            self.size += bytes.len() as u64;
        }
    }

    fn rotate(&mut self) {
        for n in (1..KEPT).rev() {
            let _ = fs::rename(numbered(&self.path, n), numbered(&self.path, n + 1));
        }
        let _ = fs::rename(&self.path, numbered(&self.path, 1));
        if let Ok(file) = File::options().create(true).append(true).mode(0o600).open(&self.path) {
            (self.file, self.size) = (file, 0);
        }
    }

    /// The end of what was logged.
    pub(super) fn history(&self) -> Vec<u8> {
        tail(&self.path, HISTORY).unwrap_or_default()
    }
}

fn numbered(path: &Path, n: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// The last `most` bytes of a file.
pub fn tail(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Something that a line of the console says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Ready,
    Panic(String),
}

/// Looks at the console line by line, also at a last line that has no end yet.
pub(super) struct Watcher {
    ready: Option<Regex>,
    line: Vec<u8>,
    judged: bool,
}

impl Watcher {
    pub(super) fn new(ready: Option<Regex>) -> Self {
        Self { ready, line: Vec::new(), judged: false }
    }

    pub(super) fn look(&mut self, bytes: &[u8]) -> Vec<Sign> {
        let mut signs = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => {
                    self.judge(true, &mut signs);
                    self.line.clear();
                    self.judged = false;
                }
                b'\r' => {}
                byte if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {}
            }
        }
        // A prompt has no line end; a panic line does.
        self.judge(false, &mut signs);
        signs
    }

    fn judge(&mut self, complete: bool, signs: &mut Vec<Sign>) {
        let text = String::from_utf8_lossy(&self.line);
        if let Some(regex) = self.ready.as_ref().filter(|_| !self.judged)
            && regex.is_match(&text)
        {
            self.judged = true;
            signs.push(Sign::Ready);
        }
        if complete && let Some(line) = panic_line(&text) {
            signs.push(Sign::Panic(line.to_owned()));
        }
    }
}

/// `[    1.234567] Kernel panic - not syncing: …`, or the same without a time stamp. Only the
/// kernel starts a line like this; a program's output is not taken for one by chance.
fn panic_line(line: &str) -> Option<&str> {
    let rest = match line.strip_prefix('[') {
        Some(rest) => rest.split_once("] ")?.1,
        None => line,
    };
    rest.starts_with("Kernel panic - not syncing").then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_seen_across_chunks_and_without_line_ends() {
        let mut watcher = Watcher::new(Some(Regex::new("login: $").unwrap()));
        assert_eq!(watcher.look(b"Debian GNU/Linux\r\nhost lo"), []);
        assert_eq!(watcher.look(b"gin: "), [Sign::Ready]);
        assert_eq!(watcher.look(b"r"), []);
        assert_eq!(watcher.look(b"oot\r\n"), []);
    }

    #[test]
    fn panics_are_the_kernels_own() {
        let mut watcher = Watcher::new(None);
        let panic = b"[    0.51] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n";
        let line = "Kernel panic - not syncing: VFS: Unable to mount root fs".to_owned();
        assert_eq!(watcher.look(panic), [Sign::Panic(line)]);
        assert_eq!(watcher.look(b"grep 'Kernel panic - not syncing' log\n"), []);
        assert_eq!(watcher.look(b"echo [x] Kernel panic\n"), []);
    }

    #[test]
    fn logs_rotate_and_history_is_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let file = File::options().create(true).append(true).open(&path).unwrap();
        let mut log = Log::new(path.clone(), file);
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..40 {
            log.write(&chunk);
        }
        log.write(b"the end");
        assert!(log.history().ends_with(b"the end"));
        assert!(numbered(&path, 3).exists() && !numbered(&path, 4).exists());
        let whole: u64 =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(whole < 45 << 20, "{whole}");
    }
}
