//! The server of one machine's first boot: its script, which it may read, a folder of its own,
//! into which it may write, and its reports. Answers its own guest and nobody else; what it is
//! sent is bounded in size, number and time.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderName, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use lodge_guest::{REPORT_HEADER, REQUIRE_HEADER, Report, TAIL};
use lodge_spec::state::{Bootstrap, Stage};
use sha2::{Digest, Sha256};

use super::message::Tell;
use super::serve::Shared;

const SCRIPT: &str = "/vm-bootstrap";
const REPORT: &str = "/.lodge/report";
/// Connections at a time; a guest with more waits.
const VISITORS: usize = 64;
const HEADERS: Duration = Duration::from_secs(10);
/// From the first byte of a request to the last one of its answer.
const WHOLE: Duration = Duration::from_secs(120);
/// A report takes a transaction of the daemon; a guest makes them no faster than this.
const REPORT_PACE: Duration = Duration::from_millis(50);
/// Bytes of one request's body.
const MAX_BODY: usize = 1 << 20;
/// Bytes of all that a guest has sent and that is kept.
const QUOTA: u64 = 16 << 20;

/// Takes a connection of the guest's.
pub(super) fn receive(shared: &Rc<Shared>, visitor: OwnedFd) {
    if shared.visitors.get() >= VISITORS {
        return;
    }
    let stream = std::net::TcpStream::from(visitor);
    let stream =
        stream.set_nonblocking(true).and_then(|()| tokio::net::TcpStream::from_std(stream));
    let Ok(stream) = stream else { return };
    let shared = shared.clone();
    shared.visitors.set(shared.visitors.get() + 1);
    tokio::task::spawn_local(async move {
        let own = shared.clone();
        let service = hyper::service::service_fn(move |request| {
            let own = own.clone();
            async move { Ok::<_, std::convert::Infallible>(answer(&own, request).await) }
        });
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        let _ = tokio::time::timeout(WHOLE, serving).await;
        shared.visitors.set(shared.visitors.get() - 1);
    });
}

type Answer = Response<Full<Bytes>>;

fn plain(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(format!("{text}\n"))));
    *answer.status_mut() = status;
    answer
}

async fn answer(shared: &Rc<Shared>, request: Request<Incoming>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, SCRIPT) => script(shared),
        (&Method::GET | &Method::HEAD, _) => plain(StatusCode::NOT_FOUND, "there is nothing here"),
        (&Method::POST, path) => {
            let path = path.to_owned();
            let kind = request.headers().get(header::CONTENT_TYPE).cloned();
            let Ok(body) = Limited::new(request.into_body(), MAX_BODY).collect().await else {
                return plain(StatusCode::PAYLOAD_TOO_LARGE, "at most 1 MiB at a time");
            };
            let body = body.to_bytes();
            let form = kind.is_some_and(|kind| {
                kind.as_bytes().starts_with(b"application/x-www-form-urlencoded")
            });
            match path.as_str() {
                REPORT => {
                    let _one = shared.reporting.lock().await;
                    let answer = report(shared, &body);
                    tokio::time::sleep(REPORT_PACE).await;
                    answer
                }
                _ if form => upload(&shared.plan.bootstrap.uploads, &body),
                _ => plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "send a url-encoded form"),
            }
        }
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD and POST are known"),
    }
}

/// The script as it is, with its length and its digest.
fn script(shared: &Shared) -> Answer {
    let end = &shared.plan.bootstrap;
    let mut answer = match fs::read(&end.script) {
        Ok(script) => {
            let digest = format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(&script)));
            let mut answer = Response::new(Full::new(Bytes::from(script)));
            let name = HeaderName::from_static("repr-digest");
            answer.headers_mut().extend(digest.parse().ok().map(|digest| (name, digest)));
            answer
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            plain(StatusCode::NOT_FOUND, "there is no script for this machine")
        }
        Err(_) => plain(StatusCode::SERVICE_UNAVAILABLE, "the script cannot be read"),
    };
    let headers = answer.headers_mut();
    let kind = header::HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(REPORT_HEADER, header::HeaderValue::from_static(REPORT));
    if end.require {
        headers.insert(REQUIRE_HEADER, header::HeaderValue::from_static("yes"));
    }
    answer
}

/// Notes how far the guest says it is, and tells the daemon, whichever there is.
fn report(shared: &Shared, body: &[u8]) -> Answer {
    let Ok(report) = serde_json::from_slice::<Report>(body) else {
        return plain(StatusCode::BAD_REQUEST, "this is no report");
    };
    let Report { stage, runs, limit, exit, tail } = report;
    let stage = match stage {
        lodge_guest::Stage::Running => Stage::Running,
        lodge_guest::Stage::Failed => Stage::Failed,
        lodge_guest::Stage::Succeeded => Stage::Succeeded,
        lodge_guest::Stage::GivenUp => Stage::GivenUp,
    };
    // Foreign text: no longer than it may be, and nothing in it that steers a terminal.
    let start = tail.char_indices().rev().nth(TAIL - 1).map_or(0, |(at, _)| at);
    let log = tail[start..].replace(|c: char| c.is_control() && c != '\n' && c != '\t', "?");
    let told = Bootstrap { stage, runs, limit, exit, log };
    shared.status.borrow_mut().bootstrap = Some(told.clone());
    shared.tell(Tell::Bootstrap { told });
    plain(StatusCode::OK, "noted")
}

/// A form of `path`, `content` and, to begin anew, `clear`: into the machine's own folder, where
/// nothing of it is ever served.
fn upload(folder: &Path, body: &[u8]) -> Answer {
    let (mut path, mut content, mut clear) = (None, None, false);
    for (key, value) in url::form_urlencoded::parse(body) {
        match key.as_ref() {
            "path" => path = Some(value.into_owned()),
            "content" => content = Some(value.into_owned()),
            "clear" => clear = value == "1",
            _ => {}
        }
    }
    let (Some(path), Some(content)) = (path, content) else {
        return plain(StatusCode::BAD_REQUEST, "a form has a `path` and a `content`");
    };
    let Some(place) = place(folder, &path) else {
        return plain(StatusCode::FORBIDDEN, "Forbidden");
    };
    let size = |path: &Path| fs::symlink_metadata(path).map_or(0, |meta| meta.len());
    let freed = if clear { size(&place) } else { 0 };
    // A name takes room too.
    if used(folder).saturating_sub(freed) + content.len() as u64 + 4096 > QUOTA {
        return plain(
            StatusCode::INSUFFICIENT_STORAGE,
            "what this machine has sent fills its room",
        );
    }
    let write = || {
        fs::create_dir_all(place.parent().unwrap_or(folder))?;
        let mut options = File::options();
        options.create(true).append(!clear).write(true).truncate(clear);
        let mut file = options.mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&place)?;
        file.write_all(content.as_bytes())
    };
    match write() {
        Ok(()) => plain(StatusCode::OK, &format!("Content written to {path}")),
        Err(_) => plain(StatusCode::CONFLICT, "it cannot be written there"),
    }
}

/// Where a guest's path leads: below the folder, and never to what the guest is served.
fn place(folder: &Path, path: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = path.split('/').collect();
    let sound = |part: &&str| !matches!(*part, "" | "." | "..") && part.len() < 128;
    let whole = parts.iter().all(sound) && parts.len() <= 8 && !path.contains(['\0', '\n']);
    (whole && parts != [&SCRIPT[1..]]).then(|| folder.join(path))
}

fn used(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => 4096 + used(&entry.path()),
        Ok(meta) => 4096 + meta.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(folder: &Path, form: &str) -> StatusCode {
        upload(folder, form.as_bytes()).status()
    }

    #[test]
    fn cases_h5_to_h7_what_a_guest_sends_stays_in_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("uploads");
        for path in ["../x", "/etc/x", "a/../../x", "", "a//b", "vm-bootstrap", "a%00b"] {
            let form = format!("path={path}&content=evil");
            assert_eq!(post(&folder, &form), StatusCode::FORBIDDEN, "{path}");
        }
        assert!(!folder.exists());
        for _ in 0..2 {
            assert_eq!(post(&folder, "path=ansible/log&content=one+"), StatusCode::OK);
        }
        assert_eq!(fs::read_to_string(folder.join("ansible/log")).unwrap(), "one one ");
        assert_eq!(post(&folder, "path=ansible/log&content=two&clear=1"), StatusCode::OK);
        assert_eq!(fs::read_to_string(folder.join("ansible/log")).unwrap(), "two");
        assert_eq!(post(&folder, "content=x"), StatusCode::BAD_REQUEST);
        std::os::unix::fs::symlink("/etc/hostname", folder.join("link")).unwrap();
        assert_eq!(post(&folder, "path=link&content=x"), StatusCode::CONFLICT);
    }

    #[test]
    fn a_guest_cannot_fill_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let form = format!("path=a&content={}", "x".repeat(1_000_000));
        let statuses: Vec<StatusCode> = (0..20).map(|_| post(dir.path(), &form)).collect();
        assert_eq!(statuses[0], StatusCode::OK);
        assert_eq!(statuses[19], StatusCode::INSUFFICIENT_STORAGE);
        assert!(used(dir.path()) <= QUOTA);
    }
}
