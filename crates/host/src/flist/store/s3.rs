//! A bucket of an S3-compatible server; an object for each block, named by its digest.

use std::time::{Duration, Instant};

use rusty_s3::{Bucket as Place, Credentials, S3Action, UrlStyle};
use url::Url;

use super::{Store, hex, web};

const SIGNED_FOR: Duration = Duration::from_secs(300);

pub(super) struct Bucket {
    agent: ureq::Agent,
    place: Place,
    credentials: Credentials,
}

impl Bucket {
    pub(super) fn of(url: &Url) -> Result<Self, String> {
        let secure = url.scheme() != "s3";
        let host = url.host_str().filter(|h| !h.is_empty()).ok_or("the server is missing")?;
        let port = url.port().ok_or("the server's port is missing")?;
        let name = url.path().trim_matches('/').to_owned();
        if name.is_empty() {
            return Err("the bucket's name is missing".into());
        }
        let region = url.query_pairs().find(|(key, _)| key == "region");
        let region = region.map_or_else(|| "us-east-1".to_owned(), |(_, value)| value.into_owned());
        let scheme = if secure { "https" } else { "http" };
        let endpoint = Url::parse(&format!("{scheme}://{host}:{port}"));
        let endpoint = endpoint.map_err(|e| e.to_string())?;
        let place =
            Place::new(endpoint, UrlStyle::Path, name, region).map_err(|e| e.to_string())?;
        let key = url.username().to_owned();
        let secret = url.password().unwrap_or("").to_owned();
        Ok(Self { agent: web::agent(), place, credentials: Credentials::new(key, secret) })
    }
}

impl Store for Bucket {
    fn get(&self, id: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, String> {
        let name = hex(id);
        let url = self.place.get_object(Some(&self.credentials), &name).sign(SIGNED_FOR);
        web::fetch(&self.agent, url.as_str(), &[], deadline)
    }

    fn put(&self, id: &[u8], body: &[u8], deadline: Instant) -> Result<(), String> {
        let name = hex(id);
        let url = self.place.put_object(Some(&self.credentials), &name).sign(SIGNED_FOR);
        web::send(self.agent.put(url.as_str()), body, deadline)
    }
}
