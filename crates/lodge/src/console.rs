//! A terminal on a guest's console: raw mode, `~.` leaves, history first. The terminal is given
//! back as it was, however this ends.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Self(None);
        }
        let saved = tcgetattr(stdin.as_fd()).ok();
        if let Some(mut raw) = saved.clone() {
            raw.make_raw();
            let _ = tcsetattr(stdin.as_fd(), OptionalActions::Flush, &raw);
        }
        Self(saved)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Flush, saved);
        }
    }
}

/// Finds `~.` at the start of a line in what is typed.
#[derive(Default)]
struct Escape {
    tilde: bool,
    inside_line: bool,
}

impl Escape {
    /// What goes to the guest, and whether to leave.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        for byte in typed {
            if std::mem::take(&mut self.tilde) {
                match byte {
                    b'.' => return (out, true),
                    // Two of them mean one.
                    b'~' => {}
                    _ => out.push(b'~'),
                }
            } else if *byte == b'~' && !self.inside_line {
                self.tilde = true;
                continue;
            }
            self.inside_line = !matches!(byte, b'\r' | b'\n');
            out.push(*byte);
        }
        (out, false)
    }
}

pub(crate) async fn attach(socket: &Path, name: &str) -> Result<()> {
    connect(socket, name, Leave::Tilde(Escape::default())).await
}

/// The same, left by one key.
pub(crate) async fn attach_until(socket: &Path, name: &str, key: u8) -> Result<()> {
    connect(socket, name, Leave::Key(key)).await
}

/// How a terminal is taken back.
enum Leave {
    Tilde(Escape),
    Key(u8),
}

impl Leave {
    fn describe(&self) -> String {
        match self {
            Leave::Tilde(_) => "~.".into(),
            Leave::Key(key) => format!("Ctrl-{}", char::from(key | 0x40)),
        }
    }

    /// What goes to the guest, and whether to leave.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        match self {
            Leave::Tilde(escape) => escape.pass(typed),
            Leave::Key(key) => match typed.iter().position(|byte| byte == key) {
                Some(at) => (typed[..at].to_vec(), true),
                None => (typed.to_vec(), false),
            },
        }
    }
}

async fn connect(socket: &Path, name: &str, mut leave: Leave) -> Result<()> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!("{name} has no console; is it running? `lodge logs {name}` shows the past")
    })?;
    let terminal = std::io::stdin().is_terminal();
    let (mut from_guest, mut to_guest) = stream.into_split();
    let mut stderr = tokio::io::stderr();
    if terminal {
        let how = leave.describe();
        stderr.write_all(format!("Connected to {name}; {how} leaves.\r\n").as_bytes()).await?;
    }
    let _raw = Raw::enter();
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    let (mut typed, mut shown) = ([0; 1024], [0; 8192]);
    let mut typing = true;
    loop {
        tokio::select! {
            count = from_guest.read(&mut shown) => match count? {
                0 => {
                    if terminal {
                        stderr.write_all(b"\r\nThe machine has ended.\r\n").await?;
                    }
                    break;
                }
                count => {
                    stdout.write_all(&shown[..count]).await?;
                    stdout.flush().await?;
                }
            },
            count = stdin.read(&mut typed), if typing => match count? {
                // The end of a script is not the end of the console.
                0 => typing = false,
                count => {
                    let (out, done) = leave.pass(&typed[..count]);
                    to_guest.write_all(&out).await?;
                    if done {
                        break;
                    }
                }
            },
        }
    }
    drop(_raw);
    if terminal {
        stderr.write_all(b"\n").await?;
    }
    // A read of the terminal may still be waiting in its thread; leaving does not wait for it.
    std::process::exit(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tilde_dot_leaves_only_at_the_start_of_a_line() {
        assert_eq!(Escape::default().pass(b"ls\r~."), (b"ls\r".to_vec(), true));
        assert_eq!(Escape::default().pass(b"a~.\r"), (b"a~.\r".to_vec(), false));
        assert_eq!(Escape::default().pass(b"~~.\r"), (b"~.\r".to_vec(), false));
        assert_eq!(Escape::default().pass(b"~x"), (b"~x".to_vec(), false));
        let mut split = Escape::default();
        assert_eq!(split.pass(b"~"), (b"".to_vec(), false));
        assert_eq!(split.pass(b"."), (b"".to_vec(), true));
    }
}
