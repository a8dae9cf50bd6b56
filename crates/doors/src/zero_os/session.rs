//! Connections: who comes, which version of the protocol they speak, and their commands.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::Door;
use super::resp::{self, Value};
use crate::control::Control;

const MAX_CONNECTIONS: usize = 1024;
/// A client has this long to agree on encryption.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Where clients hand in their jobs.
const JOBS: &[u8] = b"core:default";
const DENIED: &str = "permission denied, please call AUTH first with a valid JWT";

/// Serves until the listener fails.
pub async fn serve<C: Control>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    door: Arc<Door<C>>,
) -> io::Result<()> {
    tokio::spawn(door.clone().tell_events());
    tokio::spawn(door.clone().watch_usage());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Beyond the limit, connections wait in the kernel's queue.
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely; connections that end give some back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (tls, door) = (tls.clone(), door.clone());
        tokio::spawn(async move {
            // A client that breaks off is no fault of ours.
            match tls {
                None => drop(attend(stream, &door).await),
                Some(tls) => {
                    if let Ok(Ok(stream)) =
                        tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await
                    {
                        drop(attend(stream, &door).await);
                    }
                }
            }
            drop(place);
        });
    }
}

/// One client's state.
struct Client {
    admitted: bool,
    version: u8,
}

async fn attend<C: Control>(
    stream: impl AsyncRead + AsyncWrite,
    door: &Arc<Door<C>>,
) -> io::Result<()> {
    let (reading, mut writing) = tokio::io::split(stream);
    let mut reading = BufReader::new(Box::pin(reading));
    let mut client = Client { admitted: door.settings.organization.is_none(), version: 2 };
    let mut out = Vec::new();
    loop {
        let words = match resp::read(&mut reading).await {
            Ok(Some(words)) if words.is_empty() => continue,
            Ok(Some(words)) => words,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Value::error(error.to_string()).write(client.version, &mut out);
                return writing.write_all(&out).await;
            }
            Err(error) => return Err(error),
        };
        let name = String::from_utf8_lossy(&words[0]).to_ascii_uppercase();
        let value = client.command(door, &name, &words[1..]).await;
        value.write(client.version, &mut out);
        writing.write_all(&out).await?;
        writing.flush().await?;
        out.clear();
        if name == "QUIT" {
            return Ok(());
        }
    }
}

fn wrong_number(name: &str) -> Value {
    Value::error(format!("wrong number of arguments for '{}' command", name.to_lowercase()))
}

/// Seconds, perhaps with a fraction.
fn seconds(text: &[u8]) -> Option<Duration> {
    let seconds: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

impl Client {
    async fn command<C: Control>(
        &mut self,
        door: &Arc<Door<C>>,
        name: &str,
        args: &[Vec<u8>],
    ) -> Value {
        match name {
            "AUTH" => return self.auth(door, args),
            "HELLO" => return self.hello(door, args),
            "QUIT" => return Value::Ok,
            _ if !self.admitted => return Value::error(DENIED),
            _ => {}
        }
        let keys = &door.keys;
        match (name, args) {
            ("PING", []) => Value::Simple("PONG".into()),
            ("PING", [text]) => Value::Bulk(text.clone()),
            ("ECHO", [text]) => Value::Bulk(text.clone()),
            // There is one database, and what clients say about themselves is for nobody.
            ("SELECT", [number]) if number == b"0" => Value::Ok,
            ("SELECT", [_]) => Value::error("DB index is out of range"),
            ("CLIENT", [verb, ..]) => match verb.to_ascii_uppercase().as_slice() {
                b"SETINFO" | b"SETNAME" => Value::Ok,
                b"ID" => Value::Integer(1),
                _ => Value::error("unknown subcommand"),
            },
            ("RPUSH", [key, items @ ..]) if !items.is_empty() => {
                if key == JOBS {
                    let known = items.iter().map(|job| door.hand_in(job)).count();
                    return Value::Integer(known as i64);
                }
                push(items.iter().map(|item| keys.push(key, item.clone(), false)))
            }
            ("LPUSH", [key, items @ ..]) if !items.is_empty() => {
                push(items.iter().map(|item| keys.push(key, item.clone(), true)))
            }
            ("BRPOPLPUSH", [from, to, time]) => match seconds(time) {
                Some(time) => match keys.wait_rotate(from, to, time).await {
                    Some(item) => Value::Bulk(item),
                    None => Value::Nothing,
                },
                None => Value::error("timeout is not a float or out of range"),
            },
            ("BLPOP" | "BRPOP", [lists @ .., time]) if !lists.is_empty() => match seconds(time) {
                Some(time) => match keys.wait_pop(lists, time, name == "BRPOP").await {
                    Some((key, item)) => Value::List(vec![Value::Bulk(key), Value::Bulk(item)]),
                    None => Value::NoList,
                },
                None => Value::error("timeout is not a float or out of range"),
            },
            ("EXISTS" | "LKEYEXISTS", list) if !list.is_empty() => {
                Value::Integer(list.iter().filter(|key| keys.length(key) > 0).count() as i64)
            }
            ("TTL" | "LTTL", [key]) => Value::Integer(keys.ttl(key)),
            ("LLEN", [key]) => Value::Integer(keys.length(key) as i64),
            ("DEL", list) if !list.is_empty() => {
                Value::Integer(list.iter().filter(|key| keys.remove(key)).count() as i64)
            }
            (
                "PING" | "ECHO" | "SELECT" | "CLIENT" | "RPUSH" | "LPUSH" | "BRPOPLPUSH" | "BLPOP"
                | "BRPOP" | "EXISTS" | "LKEYEXISTS" | "TTL" | "LTTL" | "LLEN" | "DEL",
                _,
            ) => wrong_number(name),
            (other, _) => Value::error(format!("unknown command '{}'", other.to_lowercase())),
        }
    }

    fn auth<C>(&mut self, door: &Door<C>, args: &[Vec<u8>]) -> Value {
        // Newer clients send a user name before it.
        let token = match args {
            [token] | [_, token] => token,
            _ => return Value::error("invalid number of arguments"),
        };
        match &door.settings.organization {
            Some(organization) if !organization.admits(token) => {
                self.admitted = false;
                Value::error("invalid jwt")
            }
            _ => {
                self.admitted = true;
                Value::Ok
            }
        }
    }

    /// Agrees on a version, and lets in whoever shows a token with it.
    fn hello<C>(&mut self, door: &Door<C>, args: &[Vec<u8>]) -> Value {
        let mut rest = args;
        let mut version = self.version;
        if let [first, others @ ..] = rest {
            version = match first.as_slice() {
                b"2" => 2,
                b"3" => 3,
                _ => return Value::Error("NOPROTO unsupported protocol version".into()),
            };
            rest = others;
        }
        while let [word, others @ ..] = rest {
            match (word.to_ascii_uppercase().as_slice(), others) {
                (b"AUTH", [_, token, others @ ..]) => {
                    let said = self.auth(door, std::slice::from_ref(token));
                    if said != Value::Ok {
                        return said;
                    }
                    rest = others;
                }
                (b"SETNAME", [_, others @ ..]) => rest = others,
                _ => return Value::error("syntax error in HELLO"),
            }
        }
        if !self.admitted {
            return Value::Error(format!("NOAUTH {DENIED}"));
        }
        self.version = version;
        let pair = |key: &str, value| (Value::text(key), value);
        Value::Map(vec![
            pair("server", Value::text("lodge")),
            pair("version", Value::text(&door.settings.version)),
            pair("proto", Value::Integer(i64::from(version))),
            pair("id", Value::Integer(1)),
            pair("mode", Value::text("standalone")),
            pair("role", Value::text("master")),
            pair("modules", Value::List(Vec::new())),
        ])
    }
}

fn push(counts: impl Iterator<Item = Option<usize>>) -> Value {
    match counts.last().flatten() {
        Some(count) => Value::Integer(count as i64),
        None => Value::Error("OOM there is no room for more".into()),
    }
}
