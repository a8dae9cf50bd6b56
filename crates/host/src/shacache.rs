//! Shacache and shadir: files by their SHA-512, and an index of signed records of what they are.
//! Everything that comes over the wire is foreign until it is verified.

pub mod config;
mod download;
mod records;
mod sign;
mod upload;

use std::path::Path;
use std::time::Duration;

pub use config::Config;
pub use download::{Digest, Fetched, fetch};
pub use records::{Filter, Pick, pick};
pub use upload::{Uploaded, upload};

/// To the first byte of an answer.
const FIRST_BYTE: Duration = Duration::from_secs(60);
/// For a whole file, in either direction.
const WHOLE: Duration = Duration::from_secs(4 * 3600);
/// For records.
const SHORT: Duration = Duration::from_secs(120);
/// Bytes of all records of one key.
const MAX_INDEX: u64 = 64 << 20;

/// The keys of one server: whom to trust, and who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    pub authority: String,
    pub certificate: String,
    pub key: String,
}

/// What asks one server.
fn agent(tls: Option<&Tls>, whole: Duration) -> Result<ureq::Agent, String> {
    use ureq::tls::{
        Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem,
    };
    let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let certificates = |path: &str| {
        let bytes = read(path)?;
        let list: Vec<Certificate<'static>> = parse_pem(&bytes)
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        if list.is_empty() { Err(format!("{path} holds no certificate")) } else { Ok(list) }
    };
    let mut config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(FIRST_BYTE))
        .timeout_recv_response(Some(whole.min(FIRST_BYTE.max(SHORT))))
        .timeout_global(Some(whole))
        .user_agent(concat!("lodge/", env!("CARGO_PKG_VERSION")));
    if let Some(Tls { authority, certificate, key }) = tls {
        let own = PrivateKey::from_pem(&read(key)?).map_err(|e| format!("{key}: {e}"))?;
        let own = ClientCert::new_with_certs(&certificates(certificate)?, own);
        let trusted = RootCerts::new_with_certs(&certificates(authority)?);
        let tls = TlsConfig::builder().client_cert(Some(own)).root_certs(trusted).build();
        config = config.tls_config(tls);
    }
    Ok(config.build().into())
}

/// The last part of a path, for people.
fn shown(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
