//! Stores of blocks, by URL: a folder, a web server, a server of the Redis protocol, an S3 bucket.
//! Each answers one block within a deadline, or says why not. What they answer is not looked at.

mod folder;
pub(crate) mod redis;
mod s3;
mod web;

use std::time::{Duration, Instant};

use url::Url;

/// One place where blocks are. Used by many threads at once.
pub trait Store: Send + Sync {
    /// The bytes stored under a name; `None`: it has no such block.
    fn get(&self, id: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, String>;

    /// Keeps bytes under a name, unless they are there.
    fn put(&self, id: &[u8], body: &[u8], deadline: Instant) -> Result<(), String>;
}

/// Stored bytes beyond this are not read: no block is as large.
const MAX_BODY: u64 = lodge_formats::flist::MAX_BLOCK as u64 + (1 << 20);
/// A server that cannot be reached within this is gone.
const CONNECT: Duration = Duration::from_secs(3);

/// The store of a URL. Connects to nothing yet.
pub fn open(text: &str) -> Result<Box<dyn Store>, String> {
    let shown = without_secret(text);
    let url = Url::parse(text).map_err(|e| format!("{shown:?} is not the URL of a store: {e}"))?;
    let store: Result<Box<dyn Store>, String> = match url.scheme() {
        "dir" | "file" => folder::Folder::of(&url).map(|s| Box::new(s) as _),
        "http" | "https" => Ok(Box::new(web::Web::of(url.as_str(), web::Layout::Folders))),
        "server" => {
            // What follows is itself a URL, with a token behind it.
            let inner = text.trim_start_matches("server://");
            let (base, token) = match inner.split_once("?token=") {
                Some((base, token)) => (base, Some(token.to_owned())),
                None => (inner, None),
            };
            Ok(Box::new(web::Web::of(base, web::Layout::Blocks { token })))
        }
        "zdb" | "ardb" | "redis" | "zdb+tcp" | "zdb+unix" | "redis+unix" => {
            redis::Redis::of(&url).map(|s| Box::new(s) as _)
        }
        "s3" | "s3s" | "s3+tls" | "s3s+tls" => s3::Bucket::of(&url).map(|s| Box::new(s) as _),
        other => Err(format!(
            "stores of the kind {other}:// are not known; known are dir, http, https, zdb, redis, \
             ardb, s3, s3s and server"
        )),
    };
    store.map_err(|why| format!("{shown}: {why}"))
}

/// A URL as it may be shown and written down: without a password in it.
pub fn without_secret(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        return text.split('@').next_back().unwrap_or("").to_owned();
    };
    let query: Vec<(String, String)> = url
        .query_pairs()
        .filter(|(key, _)| key != "token" && key != "password")
        .map(|(key, value)| (key.into_owned(), value.into_owned()))
        .collect();
    // A URL that cannot have them has none.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.set_query(None);
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query);
    }
    url.to_string()
}

fn hex(id: &[u8]) -> String {
    crate::image::store::hex(id)
}

/// What is left until a deadline; an error where nothing is.
fn left(deadline: Instant) -> Result<Duration, String> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err("it did not answer in time".into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        for (url, shown) in [
            ("zdb://user:secret@host:9900/ns", "zdb://host:9900/ns"),
            ("s3://ak:sk@host:9000/bucket?region=eu", "s3://host:9000/bucket?region=eu"),
            ("server://http://host:1?token=secret", "server://http//host:1"),
            ("redis://host:6379/?password=secret", "redis://host:6379/"),
        ] {
            let text = without_secret(url);
            assert!(!text.contains("secret") && !text.contains("sk"), "{text}");
            if url.starts_with("server") {
                continue;
            }
            assert_eq!(text, shown);
        }
    }

    #[test]
    fn unknown_stores_are_refused() {
        for (url, why) in [
            ("ftp://host/x", "not known"),
            ("nothing", "not the URL"),
            ("s3://ak:sk@host/bucket", "port"),
            ("zdb://host:99999", "port"),
        ] {
            let error = open(url).err().unwrap();
            assert!(error.contains(why), "{url}: {error}");
        }
    }
}
