//! Blocks behind HTTP: files of a web server, or a server that knows blocks.

use std::time::{Duration, Instant};

use super::{CONNECT, MAX_BODY, Store, hex, left};

pub(super) enum Layout {
    /// `BASE/HH/NAME`, else `BASE/NAME`.
    Folders,
    /// `BASE/api/v1/block/NAME`.
    Blocks { token: Option<String> },
}

pub(super) struct Web {
    agent: ureq::Agent,
    base: String,
    layout: Layout,
}

/// One that follows no more than a few redirects and keeps connections.
pub(super) fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT))
        .max_redirects(4)
        .max_idle_connections_per_host(16)
        .max_idle_age(Duration::from_secs(30))
        .http_status_as_error(false)
        .user_agent(concat!("lodge/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Fetches one object; `None`: the server has none there.
pub(super) fn fetch(
    agent: &ureq::Agent,
    url: &str,
    headers: &[(&str, String)],
    deadline: Instant,
) -> Result<Option<Vec<u8>>, String> {
    let mut request = agent.get(url).config().timeout_global(Some(left(deadline)?)).build();
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let mut answer = request.call().map_err(|e| e.to_string())?;
    match answer.status().as_u16() {
        200 => {
            let body = answer.body_mut().with_config().limit(MAX_BODY).read_to_vec();
            Ok(Some(body.map_err(|e| e.to_string())?))
        }
        404 => Ok(None),
        status => Err(format!("it answered {status}")),
    }
}

/// Sends one object to where it belongs.
pub(super) fn send(
    request: ureq::RequestBuilder<ureq::typestate::WithBody>,
    body: &[u8],
    deadline: Instant,
) -> Result<(), String> {
    let request = request.config().timeout_global(Some(left(deadline)?)).build();
    let answer = request.send(body).map_err(|e| e.to_string())?;
    match answer.status().as_u16() {
        200..=299 => Ok(()),
        status => Err(format!("it answered {status}")),
    }
}

impl Web {
    pub(super) fn of(base: &str, layout: Layout) -> Self {
        Self { agent: agent(), base: base.trim_end_matches('/').to_owned(), layout }
    }
}

impl Store for Web {
    fn get(&self, id: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, String> {
        let (base, name) = (&self.base, hex(id));
        match &self.layout {
            Layout::Folders => {
                let first = format!("{base}/{}/{name}", &name[..2]);
                match fetch(&self.agent, &first, &[], deadline)? {
                    Some(body) => Ok(Some(body)),
                    None => fetch(&self.agent, &format!("{base}/{name}"), &[], deadline),
                }
            }
            Layout::Blocks { token } => {
                let headers: Vec<(&str, String)> =
                    token.iter().map(|t| ("authorization", format!("bearer {t}"))).collect();
                let url = format!("{base}/api/v1/block/{name}");
                fetch(&self.agent, &url, &headers, deadline)
            }
        }
    }

    fn put(&self, id: &[u8], body: &[u8], deadline: Instant) -> Result<(), String> {
        match &self.layout {
            Layout::Folders => Err("a web server is only read from".into()),
            Layout::Blocks { token } => {
                let url = format!("{}/api/v1/block?file_hash={}&idx=0", self.base, hex(id));
                let mut request = self.agent.post(url);
                if let Some(token) = token {
                    request = request.header("authorization", format!("bearer {token}"));
                }
                send(request, body, deadline)
            }
        }
    }
}
