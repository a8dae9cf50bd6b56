//! Giving a file: the file first, unless it is there, then a signed record of what it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha512};

use super::{Config, SHORT, WHOLE, agent};
use crate::image::store::hex;

/// What was given.
#[derive(Clone, Debug, PartialEq)]
pub struct Uploaded {
    pub sha512: String,
    /// Where it can be fetched.
    pub url: String,
    /// It was there already.
    pub known: bool,
    /// What its record says.
    pub metadata: Map<String, Value>,
}

/// Uploads a file and files a record of it under a key. Safe to repeat: what is there is not sent
/// again, and there is no record of what is not there.
pub fn upload(
    config: &Config,
    path: &Path,
    key: &str,
    mut metadata: Map<String, Value>,
) -> Result<Uploaded, String> {
    let text = |e: io::Error| format!("{}: {e}", path.display());
    let base = config.upload_cache.as_deref().ok_or("upload-cache-url is not set")?;
    let from = config.download_cache.as_deref().unwrap_or(base);
    let mut file = File::open(path).map_err(text)?;
    let mut hash = Sha512::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(text)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    let sha512 = hex(&hash.finalize());
    let url = format!("{from}/{sha512}");
    let tls = config.cache_tls.as_ref();
    let known = agent(tls, SHORT)?.get(&url).header("range", "bytes=0-0").call();
    let known = known.map_err(|e| format!("{url}: {e}"))?.status().is_success();
    if !known {
        let file = File::open(path).map_err(text)?;
        let length = file.metadata().map_err(text)?.len();
        let sent = agent(tls, WHOLE)?
            .post(base)
            .content_type("application/octet-stream")
            .header("content-length", length.to_string())
            .send(ureq::SendBody::from_owned_reader(file));
        let mut answer = sent.map_err(|e| format!("{base}: {e}"))?;
        let status = answer.status().as_u16();
        let said = answer.body_mut().with_config().limit(4096).read_to_string().unwrap_or_default();
        if status != 201 {
            return Err(format!("{base}: the server answered {status} and not 201"));
        }
        if said.trim() != sha512 {
            return Err(format!(
                "{base}: the server has {:?} where {sha512} was sent",
                said.trim()
            ));
        }
    }
    metadata.insert("sha512".into(), sha512.clone().into());
    if let Some(index) = &config.upload_dir {
        let index = format!("{index}/{key}");
        let record = Value::Object(metadata.clone()).to_string();
        let signature = config.key.as_ref().map(|key| key.sign(&record)).unwrap_or_default();
        let body = serde_json::to_string(&[record, signature]).map_err(|e| e.to_string())?;
        let put = agent(config.dir_tls.as_ref(), SHORT)?.put(&index);
        let answer = put.content_type("application/json").send(body.as_bytes());
        let status = answer.map_err(|e| format!("{index}: {e}"))?.status().as_u16();
        if status != 201 {
            return Err(format!("{index}: the server answered {status} and not 201"));
        }
    }
    Ok(Uploaded { sha512, url, known, metadata })
}
