//! `lodge receive`: the near end of another host's `lodge migrate`, which runs it over SSH. On
//! standard input come a line that says who comes, and its memory; on standard output go the
//! daemon's replies, a line each. Keeps nothing.

use std::io::ErrorKind;
use std::process::ExitCode;

use anyhow::{Context, Result};
use lodge_doors::native::wire::Client;
use lodge_host::frames;
use lodge_spec::migration::Migration;
use lodge_spec::request::{Refusal, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;

/// A longer description is none.
const LONGEST: u64 = 8 << 20;

pub(crate) async fn receive(client: &mut Client) -> Result<ExitCode> {
    let mut input = BufReader::with_capacity(frames::LONGEST, tokio::io::stdin());
    let mut line = Vec::new();
    (&mut input).take(LONGEST).read_until(b'\n', &mut line).await?;
    let reply = match serde_json::from_slice::<Migration>(&line) {
        Ok(migration) => bring(client, migration, &mut input).await?,
        Err(error) => {
            let refusal = Refusal::failed(format!("this is no machine on its way: {error}"));
            Reply::Refused { refusal }
        }
    };
    say(&reply).await?;
    Ok(if matches!(reply, Reply::Refused { .. }) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The daemon's last word.
async fn bring(
    client: &mut Client,
    migration: Migration,
    input: &mut (impl tokio::io::AsyncRead + Unpin),
) -> Result<Reply> {
    client.send(&Request::Arrive(Box::new(migration))).await?;
    let first = client.next().await?.context("the daemon did not answer")?;
    let Reply::Document { value } = &first else { return Ok(first) };
    let path = value["memory"].as_str().context("the daemon named no pipe")?.to_owned();
    let mut pipe = pipe::OpenOptions::new().open_sender(&path).context(path)?;
    say(&first).await?;
    let copied = frames::copy(input, &mut pipe).await;
    // The hypervisor takes this for the end, be it whole or not.
    drop(pipe);
    if let Err(error) = copied
        && error.kind() != ErrorKind::BrokenPipe
    {
        // Not heard where the other host is gone; the daemon is told by what is missing.
        let refusal = Refusal::failed(format!("its memory did not come: {error}"));
        return Ok(Reply::Refused { refusal });
    }
    let mut last = Reply::Refused { refusal: Refusal::failed("the daemon gave no answer") };
    while let Some(reply) = client.next().await? {
        last = reply;
    }
    Ok(last)
}

async fn say(reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut output = tokio::io::stdout();
    output.write_all(&line).await?;
    Ok(output.flush().await?)
}
