//! The port: connections with their limits, the paths beside the calls, and the transport's own
//! refusals. Past these, a request is the library's.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectRpcBody, ConnectRpcService, Limits};
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method as Verb, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

use super::Door;
use super::methods::{Method, Methods};
use super::tenants::Caller;
use crate::control::Control;

/// A request is at most this large.
const MAX_BODY: usize = 4 << 20;
/// A client has this long for its headers, and for its body.
const PATIENCE: Duration = Duration::from_secs(30);
const MAX_CONNECTIONS: usize = 2048;

const ACCEPT_POST: &str = "application/grpc, application/grpc+json, \
application/grpc+json; charset=utf-8, application/grpc+proto, application/grpc-web, \
application/grpc-web+json, application/grpc-web+json; charset=utf-8, \
application/grpc-web+proto, application/json, application/json; charset=utf-8, application/proto";

type Body = Either<Full<Bytes>, ConnectRpcBody>;
type Answer = Response<Body>;

/// Serves until the listener fails.
pub async fn serve<C: Control>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    door: Arc<Door<C>>,
) -> io::Result<()> {
    let limits =
        Limits::default().with_max_request_body_size(MAX_BODY).with_max_message_size(MAX_BODY);
    let calls = ConnectRpcService::new(Methods(door.clone())).with_limits(limits);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(1 << 20);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        .max_header_list_size(64 << 10)
        .keep_alive_interval(PATIENCE)
        .keep_alive_timeout(PATIENCE);
    loop {
        // Beyond the limit, connections wait in the kernel's queue.
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Out of descriptors, most likely; connections that end give some back.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (server, door, calls) = (server.clone(), door.clone(), calls.clone());
        let tls = tls.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let (door, calls) = (door.clone(), calls.clone());
                async move { Ok::<_, Infallible>(answer(&door, calls, request).await) }
            });
            // A client that breaks off is no fault of ours.
            match tls {
                None => drop(server.serve_connection(TokioIo::new(stream), service).await),
                Some(tls) => {
                    let shaken = tokio::time::timeout(PATIENCE, tls.accept(stream)).await;
                    if let Ok(Ok(stream)) = shaken {
                        drop(server.serve_connection(TokioIo::new(stream), service).await);
                    }
                }
            }
            drop(place);
        });
    }
}

async fn answer<C: Control>(
    door: &Arc<Door<C>>,
    mut calls: ConnectRpcService<Methods<C>>,
    request: Request<Incoming>,
) -> Answer {
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/health" => return text(StatusCode::OK, "application/json", r#"{"status":"ok"}"#),
        "/_/health" => return health(door),
        "/metrics" => return metrics(door, request.headers()).await,
        _ => {}
    }
    let Some(method) = Method::of(&path) else { return lost(&path) };
    if request.method() != Verb::POST {
        let mut answer = empty(StatusCode::METHOD_NOT_ALLOWED);
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return answer;
    }
    let (mut parts, body) = request.into_parts();
    let Some(body) = collect(body).await else { return empty(StatusCode::REQUEST_TIMEOUT) };
    let Some(kind) = content_kind(&parts.headers, &body, method) else {
        let mut answer = empty(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        answer.headers_mut().insert("accept-post", HeaderValue::from_static(ACCEPT_POST));
        return answer;
    };
    if kind != Kind::Rpc
        && let Some(refusal) = refuse(&parts.headers)
    {
        return refusal;
    }
    let asked = parts.headers.get(header::CONTENT_TYPE).cloned();
    if matches!(kind, Kind::Json { .. }) {
        let json = HeaderValue::from_static("application/json");
        parts.headers.insert(header::CONTENT_TYPE, json);
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    let request = Request::from_parts(parts, Full::new(body));
    let mut answer = match calls.call(request).await {
        Ok(answer) => answer.map(Either::Right),
        Err(never) => match never {},
    };
    // A client that said more about its JSON than the library repeats is told the same.
    if let (Kind::Json { asked: true }, Some(asked)) = (kind, asked)
        && answer.status() == StatusCode::OK
    {
        answer.headers_mut().insert(header::CONTENT_TYPE, asked);
    }
    answer
}

/// What a request's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One message in JSON; `asked`: it says so itself.
    Json { asked: bool },
    /// One message in binary.
    Proto,
    /// gRPC or gRPC-Web, or a call that streams, which have refusals of their own.
    Rpc,
}

fn content_kind(headers: &HeaderMap, body: &[u8], method: Method) -> Option<Kind> {
    let written = headers.get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("?"));
    let written = written.unwrap_or("").to_ascii_lowercase();
    let (kind, parameters) = written.split_once(';').unwrap_or((&written, ""));
    let utf8 = parameters
        .split(';')
        .filter_map(|p| p.trim().strip_prefix("charset="))
        .all(|charset| charset.trim_matches('"') == "utf-8");
    match kind.trim() {
        "application/json" if utf8 && !method.streams() => Some(Kind::Json { asked: true }),
        "application/proto" if !method.streams() => Some(Kind::Proto),
        "application/connect+json" | "application/connect+proto" if method.streams() => {
            Some(Kind::Rpc)
        }
        "application/grpc"
        | "application/grpc+proto"
        | "application/grpc+json"
        | "application/grpc-web"
        | "application/grpc-web+proto"
        | "application/grpc-web+json" => Some(Kind::Rpc),
        // What curl sends where nobody tells it what it sends. A page in a browser could send
        // the same, but not without saying where it comes from.
        "" | "application/x-www-form-urlencoded"
            if !method.streams()
                && !headers.contains_key(header::ORIGIN)
                && body.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{') =>
        {
            Some(Kind::Json { asked: false })
        }
        _ => None,
    }
}

/// The refusals of the simple protocol that come before the message is read.
fn refuse(headers: &HeaderMap) -> Option<Answer> {
    let value = |name: &str| headers.get(name).map(|v| v.to_str().unwrap_or("?").to_owned());
    let invalid =
        |message: String| Some(error(StatusCode::BAD_REQUEST, "invalid_argument", &message));
    if let Some(version) = value("connect-protocol-version").filter(|v| v != "1") {
        return invalid(format!("Connect-Protocol-Version must be \"1\": got {version:?}"));
    }
    if let Some(timeout) = value("connect-timeout-ms") {
        if timeout.is_empty() || !timeout.bytes().all(|b| b.is_ascii_digit()) {
            return invalid(format!("parse timeout: {timeout:?} is not a number of milliseconds"));
        }
        if timeout.len() > 10 {
            return invalid(format!("parse timeout: {timeout:?} has more than 10 digits"));
        }
    }
    let encoding =
        value("content-encoding").filter(|e| !matches!(e.as_str(), "" | "gzip" | "identity"));
    encoding.map(|encoding| {
        let message = format!("unknown compression {encoding:?}: supported encodings are gzip");
        error(StatusCode::NOT_IMPLEMENTED, "unimplemented", &message)
    })
}

/// The whole body, cut off just past the limit so that the library says so in the right protocol.
/// `None`: it did not come in time, or not at all.
async fn collect(mut body: Incoming) -> Option<Bytes> {
    let mut whole = BytesMut::new();
    let reading = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.ok()?.into_data() else { continue };
            let room = (MAX_BODY + 1).saturating_sub(whole.len());
            whole.extend_from_slice(&data[..data.len().min(room)]);
        }
        Some(())
    };
    tokio::time::timeout(PATIENCE, reading).await.ok()??;
    Some(whole.freeze())
}

fn lost(path: &str) -> Answer {
    if Method::is_service(path) {
        let mut answer = empty(StatusCode::MOVED_PERMANENTLY);
        if let Ok(to) = HeaderValue::from_str(&format!("{path}/")) {
            answer.headers_mut().insert(header::LOCATION, to);
        }
        return answer;
    }
    text(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n")
}

fn health<C>(door: &Door<C>) -> Answer {
    let backend = (door.settings().health)();
    let at = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
    let (status, code) = match &backend {
        Ok(_) => ("healthy", StatusCode::OK),
        Err(_) => ("unhealthy", StatusCode::SERVICE_UNAVAILABLE),
    };
    let page = serde_json::json!({
        "status": status,
        "timestamp": at,
        "version": env!("CARGO_PKG_VERSION"),
        "backend": {
            "type": backend.as_ref().map_or("", String::as_str),
            "status": status,
            "error": backend.as_ref().err(),
        },
    });
    let mut answer = text(code, "application/json", &page.to_string());
    let never = HeaderValue::from_static("no-cache, no-store, must-revalidate");
    answer.headers_mut().insert(header::CACHE_CONTROL, never);
    answer
}

async fn metrics<C: Control>(door: &Arc<Door<C>>, headers: &HeaderMap) -> Answer {
    let caller: Caller = match door.settings().tenants.caller(headers) {
        Ok(caller) => caller,
        Err(refusal) => {
            let why = refusal.message.unwrap_or_default();
            return error(StatusCode::UNAUTHORIZED, "unauthenticated", &why);
        }
    };
    let mut machines = Vec::new();
    for detail in door.all(&caller).await.unwrap_or_default() {
        let live = detail.summary.state.is_live();
        let usage = match live {
            true => door.usage(detail.summary.id.to_string()).await,
            false => Default::default(),
        };
        machines.push((detail, usage));
    }
    let page = door.metrics.text(&machines);
    text(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", &page)
}

fn error(status: StatusCode, code: &str, message: &str) -> Answer {
    let body = serde_json::json!({"code": code, "message": message});
    text(status, "application/json", &body.to_string())
}

fn text(status: StatusCode, kind: &'static str, body: &str) -> Answer {
    let mut answer =
        Response::new(Either::Left(Full::new(Bytes::copy_from_slice(body.as_bytes()))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Either::Left(Full::default()));
    *answer.status_mut() = status;
    answer
}
