//! The Redis protocol, versions 2 and 3: commands in, values out. Lengths are a stranger's.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// A command has at most so many words of so many bytes.
const MAX_WORDS: usize = 1024;
const MAX_WORD: usize = 16 << 20;
const MAX_LINE: usize = 64 << 10;

/// What the server says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Ok,
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nothing,
    /// Nothing where a list would have been.
    NoList,
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Value::Bulk(text.as_bytes().to_vec())
    }

    pub(super) fn error(text: impl Into<String>) -> Self {
        Value::Error(format!("ERR {}", text.into()))
    }

    /// The bytes of a version of the protocol: 2 or 3.
    pub(super) fn write(&self, version: u8, out: &mut Vec<u8>) {
        match self {
            Value::Ok => out.extend(b"+OK\r\n"),
            Value::Simple(text) => out.extend(format!("+{text}\r\n").as_bytes()),
            Value::Error(text) => {
                let text = text.replace(['\r', '\n'], " ");
                out.extend(format!("-{text}\r\n").as_bytes());
            }
            Value::Integer(n) => out.extend(format!(":{n}\r\n").as_bytes()),
            Value::Bulk(bytes) => {
                out.extend(format!("${}\r\n", bytes.len()).as_bytes());
                out.extend(bytes);
                out.extend(b"\r\n");
            }
            Value::Nothing | Value::NoList if version == 3 => out.extend(b"_\r\n"),
            Value::Nothing => out.extend(b"$-1\r\n"),
            Value::NoList => out.extend(b"*-1\r\n"),
            Value::List(list) => {
                out.extend(format!("*{}\r\n", list.len()).as_bytes());
                list.iter().for_each(|value| value.write(version, out));
            }
            Value::Map(pairs) => {
                let head = match version {
                    3 => format!("%{}\r\n", pairs.len()),
                    _ => format!("*{}\r\n", pairs.len() * 2),
                };
                out.extend(head.as_bytes());
                for (key, value) in pairs {
                    key.write(version, out);
                    value.write(version, out);
                }
            }
        }
    }
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("Protocol error: {what}"))
}

/// The next command's words; `None` at the end. An empty list is an empty line.
pub(super) async fn read(
    from: &mut (impl AsyncBufRead + Unpin),
) -> io::Result<Option<Vec<Vec<u8>>>> {
    let Some(line) = line(from).await? else { return Ok(None) };
    let Some(count) = line.strip_prefix(b"*") else {
        // As somebody types it.
        let words = line.split(|b| b.is_ascii_whitespace()).filter(|w| !w.is_empty());
        return Ok(Some(words.map(<[u8]>::to_vec).collect()));
    };
    let count = number(count).ok_or_else(|| strange("invalid multibulk length"))?;
    if count > MAX_WORDS {
        return Err(strange("invalid multibulk length"));
    }
    let mut words = Vec::with_capacity(count.min(16));
    let mut total = 0;
    for _ in 0..count {
        let Some(line) = self::line(from).await? else { return Err(strange("cut off")) };
        let length = line.strip_prefix(b"$").ok_or_else(|| strange("expected '$'"))?;
        let length = number(length).ok_or_else(|| strange("invalid bulk length"))?;
        total += length;
        if total > MAX_WORD {
            return Err(strange("invalid bulk length"));
        }
        let mut word = Vec::new();
        let read = (&mut *from).take(length as u64).read_to_end(&mut word).await?;
        let mut end = [0; 2];
        from.read_exact(&mut end).await?;
        if read != length || &end != b"\r\n" {
            return Err(strange("a word does not end where it says"));
        }
        words.push(word);
    }
    Ok(Some(words))
}

async fn line(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = (&mut *from).take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
    if read == 0 {
        return Ok(None);
    }
    match line.strip_suffix(b"\n") {
        Some(rest) => Ok(Some(rest.strip_suffix(b"\r").unwrap_or(rest).to_vec())),
        None => Err(strange("too big a line")),
    }
}

fn number(text: &[u8]) -> Option<usize> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(bytes: &[u8]) -> io::Result<Vec<Vec<Vec<u8>>>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut from = bytes;
            let mut all = Vec::new();
            while let Some(words) = read(&mut from).await? {
                all.push(words);
            }
            Ok(all)
        })
    }

    #[test]
    fn commands_are_read_whole() {
        let all = commands(b"*2\r\n$4\r\nPING\r\n$2\r\n\r\n\r\nPING  x\r\n*0\r\n").unwrap();
        assert_eq!(all[0], [b"PING".to_vec(), b"\r\n".to_vec()]);
        assert_eq!(all[1], [b"PING".to_vec(), b"x".to_vec()]);
        assert!(all[2].is_empty());
        for wrong in [
            &b"*1\r\n$99999999999\r\n"[..],
            b"*99999\r\n",
            b"*-1\r\n",
            b"*1\r\nx\r\n",
            b"*1\r\n$1\r\nxyz\r\n",
            b"*2\r\n$1\r\nx\r\n",
        ] {
            assert!(commands(wrong).is_err(), "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn nothing_is_said_as_each_version_expects_it() {
        let written = |value: &Value, version| {
            let mut out = Vec::new();
            value.write(version, &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(written(&Value::Nothing, 2), "$-1\r\n");
        assert_eq!(written(&Value::Nothing, 3), "_\r\n");
        assert_eq!(written(&Value::NoList, 2), "*-1\r\n");
        assert_eq!(written(&Value::Error("a\r\nb".into()), 2), "-a  b\r\n");
        let map = Value::Map(vec![(Value::text("a"), Value::Integer(1))]);
        assert_eq!(written(&map, 2), "*2\r\n$1\r\na\r\n:1\r\n");
        assert_eq!(written(&map, 3), "%1\r\n$1\r\na\r\n:1\r\n");
    }

    proptest::proptest! {
        #[test]
        fn foreign_bytes_are_answered(bytes: Vec<u8>) {
            let _ = commands(&bytes);
        }
    }
}
