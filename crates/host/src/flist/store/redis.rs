//! A server that speaks the Redis protocol: 0-db, ARDB or Redis itself. Connections are kept and
//! each carries one question at a time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use url::Url;

use super::{CONNECT, MAX_BODY, Store, left};

/// What a server without a port in its URL listens on.
const PORT: u16 = 9900;
/// A connection on which nothing was said for this long may be dead.
const IDLE: Duration = Duration::from_secs(10);
const MAX_KEPT: usize = 16;
/// Questions that are on their way together.
const AT_ONCE: usize = 32;

enum Place {
    Tcp(String, u16),
    Unix(PathBuf),
}

pub(crate) struct Redis {
    place: Place,
    password: Option<String>,
    /// Of 0-db, or the number of a database of Redis.
    namespace: Option<String>,
    namespace_password: Option<String>,
    kept: Mutex<Vec<(Connection, Instant)>>,
}

trait Wire: Read + Write + Send {
    fn set_timeouts(&self, time: Duration) -> io::Result<()>;
}

impl Wire for TcpStream {
    fn set_timeouts(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl Wire for UnixStream {
    fn set_timeouts(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

fn in_words(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "it did not answer in time".to_owned()
        }
        _ => error.to_string(),
    }
}

struct Connection(BufReader<Box<dyn Wire>>);

/// What a server says.
enum Said {
    Fine,
    Nothing,
    Bytes(Vec<u8>),
}

impl Redis {
    pub(crate) fn of(url: &Url) -> Result<Self, String> {
        let query = |name: &str| {
            url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        let host = url.host_str().filter(|h| !h.is_empty());
        let path = url.path();
        let (place, namespace) = match host {
            Some(host) => {
                let host = host.trim_matches(['[', ']']).to_owned();
                let place = Place::Tcp(host, url.port().unwrap_or(PORT));
                (place, path.trim_matches('/').to_owned())
            }
            None if path.len() > 1 => (Place::Unix(path.into()), String::new()),
            None => return Err("the server is missing".into()),
        };
        let namespace = Some(namespace).filter(|n| !n.is_empty()).or_else(|| query("namespace"));
        let user = Some(url.username().to_owned()).filter(|u| !u.is_empty());
        // 0-db's own clients write the server's password as the user.
        let (password, namespace_password) = match url.password() {
            Some(password) => (None, Some(password.to_owned())),
            None => (user, query("password")),
        };
        Ok(Self {
            place,
            password,
            namespace: namespace.filter(|n| n != "default"),
            namespace_password,
            kept: Mutex::default(),
        })
    }

    fn connect(&self, deadline: Instant) -> Result<Connection, String> {
        let time = left(deadline)?.min(CONNECT);
        let wire: Box<dyn Wire> = match &self.place {
            Place::Unix(path) => Box::new(UnixStream::connect(path).map_err(|e| e.to_string())?),
            Place::Tcp(host, port) => {
                let all = (host.as_str(), *port).to_socket_addrs().map_err(|e| e.to_string())?;
                let mut why = format!("{host} has no address");
                let mut stream = None;
                for address in all {
                    match TcpStream::connect_timeout(&address, time) {
                        Ok(found) => {
                            stream = Some(found);
                            break;
                        }
                        Err(error) => why = error.to_string(),
                    }
                }
                let stream = stream.ok_or(why)?;
                stream.set_nodelay(true).map_err(|e| e.to_string())?;
                Box::new(stream)
            }
        };
        let mut connection = Connection(BufReader::with_capacity(1 << 16, wire));
        if let Some(password) = &self.password {
            connection.ask(&[b"AUTH", password.as_bytes()], deadline)?;
        }
        if let Some(namespace) = &self.namespace {
            let mut words: Vec<&[u8]> = vec![b"SELECT", namespace.as_bytes()];
            words.extend(self.namespace_password.as_ref().map(|p| p.as_bytes()));
            connection.ask(&words, deadline)?;
        }
        Ok(connection)
    }

    /// Asks all at once and hears all answers; `None`: there was nothing.
    pub(crate) fn all(
        &self,
        asks: &[Vec<&[u8]>],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, String> {
        let said = self.converse(deadline, |connection| {
            let said = connection.all(asks, deadline)?;
            Ok(said.into_iter().map(|said| match said {
                Said::Bytes(bytes) => Some(bytes),
                Said::Fine | Said::Nothing => None,
            }))
        });
        said.map(Iterator::collect)
    }

    fn ask(&self, words: &[&[u8]], deadline: Instant) -> Result<Said, String> {
        self.converse(deadline, |connection| connection.ask(words, deadline))
    }

    /// Over a connection that is there, or else a new one.
    fn converse<T>(
        &self,
        deadline: Instant,
        talk: impl Fn(&mut Connection) -> Result<T, String>,
    ) -> Result<T, String> {
        let kept = self.kept.lock().expect("not poisoned").pop();
        if let Some((mut connection, since)) = kept.filter(|(_, since)| since.elapsed() < IDLE) {
            // One that the server has closed meanwhile is no answer.
            if let Ok(said) = talk(&mut connection) {
                self.keep(connection);
                return Ok(said);
            }
            drop((connection, since));
        }
        let mut connection = self.connect(deadline)?;
        let said = talk(&mut connection)?;
        self.keep(connection);
        Ok(said)
    }

    fn keep(&self, connection: Connection) {
        let mut kept = self.kept.lock().expect("not poisoned");
        if kept.len() < MAX_KEPT {
            kept.push((connection, Instant::now()));
        }
    }
}

impl Connection {
    fn ask(&mut self, words: &[&[u8]], deadline: Instant) -> Result<Said, String> {
        let time = left(deadline)?;
        self.say(words, time).and_then(|()| self.hear()).map_err(in_words)
    }

    fn all(&mut self, asks: &[Vec<&[u8]>], deadline: Instant) -> Result<Vec<Said>, String> {
        // Few enough that neither side waits with full hands for the other.
        let mut said = Vec::new();
        for some in asks.chunks(AT_ONCE) {
            let time = left(deadline)?;
            for words in some {
                self.say(words, time).map_err(in_words)?;
            }
            for _ in some {
                said.push(self.hear().map_err(in_words)?);
            }
        }
        Ok(said)
    }

    fn say(&mut self, words: &[&[u8]], time: Duration) -> io::Result<()> {
        let mut out = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            out.extend(format!("${}\r\n", word.len()).as_bytes());
            out.extend(*word);
            out.extend(b"\r\n");
        }
        self.0.get_ref().set_timeouts(time)?;
        self.0.get_mut().write_all(&out)
    }

    fn hear(&mut self) -> io::Result<Said> {
        let mut line = Vec::new();
        (&mut self.0).take(512).read_until(b'\n', &mut line)?;
        let Some((kind, rest)) = line.strip_suffix(b"\r\n").and_then(|l| l.split_first()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it closed the connection"));
        };
        let rest = String::from_utf8_lossy(rest);
        let strange = || io::Error::new(io::ErrorKind::InvalidData, "it answered strangely");
        match kind {
            b'+' | b':' => Ok(Said::Fine),
            b'_' => Ok(Said::Nothing),
            b'-' => Err(io::Error::other(format!("it answered {rest}"))),
            b'$' => {
                let length: i64 = rest.parse().map_err(|_| strange())?;
                let Ok(length) = u64::try_from(length) else { return Ok(Said::Nothing) };
                if length > MAX_BODY {
                    return Err(strange());
                }
                let mut bytes = vec![0; length as usize + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(length as usize);
                Ok(Said::Bytes(bytes))
            }
            _ => Err(strange()),
        }
    }
}

impl Store for Redis {
    fn get(&self, id: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, String> {
        match self.ask(&[b"GET", id], deadline)? {
            Said::Nothing | Said::Fine => Ok(None),
            // 0-db answers so for what it has lost.
            Said::Bytes(bytes) if bytes.is_empty() => Ok(None),
            Said::Bytes(bytes) => Ok(Some(bytes)),
        }
    }

    fn put(&self, id: &[u8], body: &[u8], deadline: Instant) -> Result<(), String> {
        // 0-db answers with the name, or with nothing where it has the same already.
        self.ask(&[b"SET", id, body], deadline).map(drop)
    }
}
