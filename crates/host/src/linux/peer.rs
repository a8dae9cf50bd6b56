//! The daemon of another host, over SSH: `lodge receive` there, which says lines and takes memory.
//! Asks nobody for a password, and trusts no host that is not known.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use lodge_spec::migration::{Destination, Migration};
use lodge_spec::request::Reply;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use crate::frames;
use crate::proc::Tool;

/// What runs there.
const PROGRAM: &str = "lodge receive";
/// It looks at what the machine needs, and says so.
const GREETING: Duration = Duration::from_secs(60);
/// Of what went wrong, so much is kept.
const WORDS: u64 = 4 << 10;

pub(super) struct Peer {
    host: String,
    child: Child,
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    complaints: JoinHandle<String>,
}

fn command(to: &Destination) -> Tool {
    let mut tool = Tool::new("ssh").args(["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]);
    // A host that is gone is found to be, and the guest goes on here.
    tool = tool.args(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]);
    if let Some(port) = to.port {
        tool = tool.arg("-p").arg(port.to_string());
    }
    if let Some(key) = &to.key {
        tool = tool.arg("-i").arg(key).args(["-o", "IdentitiesOnly=yes"]);
    }
    if let Some(file) = &to.known_hosts {
        tool = tool.arg("-o").arg(format!("UserKnownHostsFile={}", file.display()));
    }
    if let Some(user) = &to.user {
        tool = tool.arg("-l").arg(user);
    }
    tool.arg("--").arg(&to.host).arg(PROGRAM)
}

impl Peer {
    pub(super) fn dial(to: &Destination) -> Result<Self, String> {
        let tool = command(to);
        let mut command = tool.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let spawned = command.kill_on_drop(true).spawn();
        let mut child = spawned.map_err(|e| tool.start_error(e).to_string())?;
        let stdin = child.stdin.take().expect("piped");
        let said = BufReader::new(child.stdout.take().expect("piped")).lines();
        let stderr = child.stderr.take().expect("piped");
        let complaints = tokio::spawn(async move {
            let mut text = Vec::new();
            let mut stderr = stderr.take(WORDS);
            // What it says before it goes is what counts.
            let _ = stderr.read_to_end(&mut text).await;
            String::from_utf8_lossy(&text).trim().replace('\n', "; ")
        });
        Ok(Self { host: to.host.clone(), child, stdin, said, complaints })
    }

    /// Tells who comes. Afterwards memory may be sent.
    pub(super) async fn greet(&mut self, migration: &Migration) -> Result<(), String> {
        let mut line = serde_json::to_vec(migration).map_err(|e| e.to_string())?;
        line.push(b'\n');
        if self.stdin.write_all(&line).await.is_err() {
            return Err(self.why_gone().await);
        }
        match tokio::time::timeout(GREETING, self.next()).await {
            Ok(Some(Reply::Document { .. })) => Ok(()),
            Ok(Some(Reply::Refused { refusal })) => Err(format!("{}: {refusal}", self.host)),
            Ok(Some(other)) => Err(format!("{}: not an answer: {other:?}", self.host)),
            Ok(None) => Err(self.why_gone().await),
            Err(_) => Err(format!("{} did not answer in {} s", self.host, GREETING.as_secs())),
        }
    }

    /// Sends a piece of memory; an empty one is the end.
    pub(super) async fn send(&mut self, piece: &[u8]) -> io::Result<()> {
        frames::send(&mut self.stdin, piece).await
    }

    /// What it says next. `None`: nothing any more.
    pub(super) async fn next(&mut self) -> Option<Reply> {
        let line = self.said.next_line().await.ok().flatten()?;
        serde_json::from_str(&line).ok()
    }

    /// Why the connection ended.
    pub(super) async fn why_gone(&mut self) -> String {
        // What refused may have been said before it went.
        if let Ok(Some(Reply::Refused { refusal })) =
            tokio::time::timeout(Duration::from_secs(1), self.next()).await
        {
            return format!("{}: {refusal}", self.host);
        }
        let _ = self.child.start_kill();
        let said = (&mut self.complaints).await.unwrap_or_default();
        let said = if said.is_empty() { "the connection was lost".to_owned() } else { said };
        format!("{}: {said}", self.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_one_argument_among_others() {
        let to = "ssh://me@far:2222?keyfile=/k&known_hosts=/h".parse().unwrap();
        let told = format!("{:?}", command(&to).command().as_std());
        let wanted = r#""-p" "2222" "-i" "/k" "-o" "IdentitiesOnly=yes" "-o" "UserKnownHostsFile=/h" "-l" "me" "--" "far" "lodge receive""#;
        assert!(told.ends_with(wanted), "{told}");
    }
}
