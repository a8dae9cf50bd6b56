//! Getting a file: into a place of its own, on from where an earlier attempt broke off, and there
//! only once it is what it should be.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use md5::Md5;
use sha2::{Digest as _, Sha256, Sha512};

use super::{Tls, WHOLE, agent, shown};
use crate::image::store::hex;

/// How often a connection that breaks off is made again.
const ATTEMPTS: usize = 5;

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Digest {
    Md5(String),
    Sha256(String),
    Sha512(String),
}

pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Digest {
    /// A digest in hexadecimal, told by its length.
    fn of(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        match text.len() {
            32 if is_hex(text, 32) => Some(Self::Md5(lower)),
            64 if is_hex(text, 64) => Some(Self::Sha256(lower)),
            128 if is_hex(text, 128) => Some(Self::Sha512(lower)),
            _ => None,
        }
    }

    /// Splits `URL#DIGEST`. A URL whose last part is a SHA-512 names its own.
    pub fn split(text: &str) -> Result<(&str, Vec<Self>), String> {
        let (url, fragment) = match text.split_once('#') {
            Some((_, rest)) if rest.contains('#') => {
                return Err(format!("{text}: there is more than one `#`"));
            }
            Some((url, fragment)) => (url, Some(fragment)),
            None => (text, None),
        };
        let mut list: Vec<Self> = Vec::new();
        if let Some(fragment) = fragment {
            let digest = Self::of(fragment).ok_or_else(|| {
                format!("{text}: what follows `#` is no MD5, SHA-256 or SHA-512 in hexadecimal")
            })?;
            list.push(digest);
        }
        let last = url.rsplit('/').next().unwrap_or_default();
        list.extend(Self::of(last).filter(|digest| matches!(digest, Self::Sha512(_))));
        match list.is_empty() {
            true => Err(format!(
                "{text}: nothing says what the file must be; put its digest behind it, as in \
                 URL#MD5 or URL#SHA512"
            )),
            false => Ok((url, list)),
        }
    }

    fn name(&self) -> &str {
        let (Self::Md5(text) | Self::Sha256(text) | Self::Sha512(text)) = self;
        text
    }
}

#[derive(Default)]
struct Sums {
    md5: Md5,
    sha256: Sha256,
    sha512: Sha512,
}

impl Sums {
    fn update(&mut self, bytes: &[u8]) {
        self.md5.update(bytes);
        self.sha256.update(bytes);
        self.sha512.update(bytes);
    }

    fn check(self, digests: &[Digest]) -> Result<(), String> {
        let (md5, sha256) = (hex(&self.md5.finalize()), hex(&self.sha256.finalize()));
        let sha512 = hex(&self.sha512.finalize());
        for digest in digests {
            let (kind, wanted, found) = match digest {
                Digest::Md5(wanted) => ("MD5", wanted, &md5),
                Digest::Sha256(wanted) => ("SHA-256", wanted, &sha256),
                Digest::Sha512(wanted) => ("SHA-512", wanted, &sha512),
            };
            if wanted != found {
                return Err(format!("its {kind} is {found}, not {wanted}"));
            }
        }
        Ok(())
    }
}

/// A file that is what it should be.
#[derive(Debug)]
pub struct Fetched {
    pub path: PathBuf,
    pub bytes: u64,
    /// How many of them an earlier attempt had brought.
    pub resumed: u64,
}

/// Fetches a file into a folder; `done` hears the bytes there and, if the server tells, of how
/// many.
pub fn fetch(
    url: &str,
    digests: &[Digest],
    tls: Option<&Tls>,
    folder: &Path,
    mut done: impl FnMut(u64, u64),
) -> Result<Fetched, String> {
    let name = digests.first().map(Digest::name).ok_or("there is no digest to check")?;
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let (whole, part) = (folder.join(name), folder.join(format!("{name}.part")));
    let text = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| format!("{path}: {e}")
    };
    let mut options = File::options();
    let mut file = options.create(true).read(true).append(true).open(&part).map_err(text(&part))?;
    // Two who fetch the same wait for each other.
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| text(&part)(e.into()))?;
    let resumed = file.metadata().map_err(text(&part))?.len();
    let agent = agent(tls, WHOLE)?;
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        match go_on(&agent, url, &mut file, &mut done) {
            Ok(bytes) => {
                let mut sums = Sums::default();
                each_piece(&mut file, |piece| sums.update(piece)).map_err(text(&part))?;
                if let Err(why) = sums.check(digests) {
                    let _ = fs::remove_file(&part);
                    return Err(format!(
                        "{url} is not what it should be: {why}; nothing of it is kept"
                    ));
                }
                file.sync_all().map_err(text(&part))?;
                fs::rename(&part, &whole).map_err(text(&whole))?;
                return Ok(Fetched { path: whole, bytes, resumed });
            }
            Err(Broken::ForGood(why)) => {
                return Err(format!("{url}: {why}"));
            }
            Err(Broken::Off(why)) => last = why,
        }
    }
    Err(format!("{url}: {last}, {ATTEMPTS} times; what has come of {} is kept", shown(&whole)))
}

fn each_piece(file: &mut File, mut see: impl FnMut(&[u8])) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            count => see(&buffer[..count]),
        }
    }
}

enum Broken {
    /// Trying again may help.
    Off(String),
    ForGood(String),
}

/// What became of a request without an answer. Who the other side is, or that it does not know us,
/// does not change by asking again.
fn broken(error: ureq::Error) -> Broken {
    match error {
        ureq::Error::Io(error) if error.kind() != io::ErrorKind::InvalidData => {
            Broken::Off(error.to_string())
        }
        ureq::Error::Io(error) => Broken::ForGood(error.to_string()),
        error @ (ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_)) => Broken::Off(error.to_string()),
        error => Broken::ForGood(error.to_string()),
    }
}

/// One connection. Returns how long the file is once it is all there.
fn go_on(
    agent: &ureq::Agent,
    url: &str,
    file: &mut File,
    done: &mut impl FnMut(u64, u64),
) -> Result<u64, Broken> {
    let full = |e: io::Error| Broken::ForGood(e.to_string());
    let mut at = file.metadata().map_err(full)?.len();
    let mut request = agent.get(url).header("accept-encoding", "identity");
    if at > 0 {
        request = request.header("range", format!("bytes={at}-"));
    }
    let answer = request.call().map_err(broken)?;
    let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
    let length = header("content-length").and_then(|l| l.parse::<u64>().ok());
    let range = header("content-range").unwrap_or_default();
    let from = range.strip_prefix("bytes ").and_then(|r| r.split('-').next()?.parse::<u64>().ok());
    match answer.status().as_u16() {
        206 if from == Some(at) => {}
        // It begins anew, whatever was asked for.
        200 => {
            file.set_len(0).map_err(full)?;
            at = 0;
        }
        // What is there is all there is, or more; the digest tells.
        416 if at > 0 && range == format!("bytes */{at}") => return Ok(at),
        206 | 416 => {
            file.set_len(0).map_err(full)?;
            return Err(Broken::Off(
                "the server answered with another part than was asked for".into(),
            ));
        }
        status @ (500..=599 | 429) => {
            return Err(Broken::Off(format!("the server answered {status}")));
        }
        status => return Err(Broken::ForGood(format!("the server answered {status}"))),
    }
    let total = length.map(|length| at + length);
    let mut body = answer.into_body().into_reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                file.write_all(&buffer[..count]).map_err(full)?;
                at += count as u64;
                done(at, total.unwrap_or(0));
            }
            Err(error) => return Err(Broken::Off(format!("cut off after {at} bytes: {error}"))),
        }
    }
    match total {
        Some(total) if at < total => {
            Err(Broken::Off(format!("cut off after {at} bytes of {total}")))
        }
        Some(_) | None => Ok(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_d10_an_entry_names_what_its_file_must_be() {
        let digest = "ab".repeat(16);
        let (url, list) =
            Digest::split(&format!("http://a/b#{digest}")).map(|(u, l)| (u.to_owned(), l)).unwrap();
        assert_eq!((url.as_str(), list), ("http://a/b", vec![Digest::Md5(digest.clone())]));
        let long = "cd".repeat(64);
        assert_eq!(Digest::split(&format!("http://a/{long}#{digest}")).unwrap().1.len(), 2);
        assert_eq!(Digest::split(&format!("http://a/{long}")).unwrap().1.len(), 1);
        for odd in [
            "http://a/b",
            "http://a/b#",
            &format!("http://a/b#{}", &digest[1..]),
            &format!("http://a/b#{digest}#x"),
        ] {
            assert!(Digest::split(odd).unwrap_err().starts_with(odd), "{odd}");
        }
    }
}
