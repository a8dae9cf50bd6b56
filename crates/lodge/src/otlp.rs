//! Finished calls told to a collector, as OpenTelemetry's protocol over HTTP in JSON. Calls are never
//! held up: what the collector does not take in time is dropped.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use lodge_doors::connect::Span;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::settings::Traces;

/// Calls that wait to be told.
const QUEUE: usize = 1024;
/// More are not told at once.
const BATCH: usize = 128;
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Exporter {
    spans: mpsc::Sender<(Span, SystemTime)>,
}

impl Exporter {
    pub(crate) fn start(traces: Traces) -> Self {
        let (spans, mut waiting) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while waiting.recv_many(&mut batch, BATCH).await > 0 {
                let told: Vec<Value> =
                    batch.drain(..).filter_map(|(s, at)| render(&s, at, traces.sampling)).collect();
                if !told.is_empty() {
                    // A collector that is away misses these.
                    let _ = tokio::time::timeout(PATIENCE, send(&traces.endpoint, &told)).await;
                }
            }
        });
        Self { spans }
    }

    pub(crate) fn take(&self, span: Span) {
        let _ = self.spans.try_send((span, SystemTime::now()));
    }
}

/// `00-TRACE-PARENT-FLAGS`: the trace, the span above, and whether that one is told.
fn parent(header: &str) -> Option<(&str, &str, bool)> {
    let parts: Vec<&str> = header.split('-').collect();
    let hex = |text: &str, length| {
        text.len() == length
            && text.bytes().all(|b| b.is_ascii_hexdigit())
            && text.bytes().any(|b| b != b'0')
    };
    match parts.as_slice() {
        [_, trace, span, flags, ..] if hex(trace, 32) && hex(span, 16) => {
            let flags = u8::from_str_radix(flags, 16).ok()?;
            Some((trace, span, flags & 1 == 1))
        }
        _ => None,
    }
}

/// `None`: not one of those that are told. Who calls decides, where it says so.
fn render(span: &Span, ended: SystemTime, sampling: f64) -> Option<Value> {
    let random = uuid::Uuid::new_v4().simple().to_string();
    let above = span.parent.as_deref().and_then(parent);
    let (trace, parent, told) = match above {
        Some((trace, parent, told)) => (trace.to_owned(), Some(parent), told),
        None => {
            let part = u32::from_str_radix(&random[..8], 16).unwrap_or(0);
            (random.clone(), None, f64::from(part) / f64::from(u32::MAX) <= sampling)
        }
    };
    // An error is worth telling whatever the dice say.
    if !told && span.code == "ok" {
        return None;
    }
    let own = uuid::Uuid::new_v4().simple().to_string()[..16].to_owned();
    let nanos =
        |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let mut rendered = json!({
        "traceId": trace,
        "spanId": own,
        "name": format!("vmprovisioner.v1.VmService/{}", span.method),
        "kind": 2,
        "startTimeUnixNano": nanos(ended - span.took),
        "endTimeUnixNano": nanos(ended),
        "attributes": [
            text("rpc.system", "connect_rpc"),
            text("rpc.service", "vmprovisioner.v1.VmService"),
            text("rpc.method", span.method),
            text("rpc.connect.code", span.code),
            text("vm_id", &span.vm_id),
            text("customer_id", &span.customer),
        ],
        "status": match span.code {
            "ok" => json!({"code": 1}),
            _ => json!({"code": 2, "message": span.message}),
        },
    });
    if let Some(parent) = parent {
        rendered["parentSpanId"] = json!(parent);
    }
    Some(rendered)
}

async fn send(endpoint: &str, spans: &[Value]) -> Result<()> {
    let resource = json!({"attributes": [
        {"key": "service.name", "value": {"stringValue": "lodge"}},
        {"key": "service.version", "value": {"stringValue": env!("CARGO_PKG_VERSION")}},
    ]});
    let scope = json!({"scope": {"name": "lodge"}, "spans": spans});
    let body =
        json!({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}).to_string();
    let mut stream = TcpStream::connect(endpoint).await?;
    let head = format!(
        "POST /v1/traces HTTP/1.1\r\nHost: {endpoint}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    // Whatever the answer is, it is waited for: a collector may close on those who do not.
    let mut answer = [0; 256];
    let _ = stream.read(&mut answer).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(parent: Option<&str>, code: &'static str) -> Span {
        Span {
            method: "BootVm",
            parent: parent.map(str::to_owned),
            took: Duration::from_millis(5),
            code,
            message: None,
            vm_id: "ud-1".into(),
            customer: "a".into(),
        }
    }

    #[test]
    fn traces_go_on_where_they_come_from() {
        let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let told = render(&span(Some(header), "ok"), SystemTime::now(), 0.0).unwrap();
        assert_eq!(told["traceId"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(told["parentSpanId"], "b7ad6b7169203331");
        let unsampled = header.replace("-01", "-00");
        assert!(render(&span(Some(&unsampled), "ok"), SystemTime::now(), 1.0).is_none());
        assert!(render(&span(Some(&unsampled), "internal"), SystemTime::now(), 1.0).is_some());
        assert!(render(&span(None, "ok"), SystemTime::now(), 1.0).is_some());
        assert!(render(&span(None, "ok"), SystemTime::now(), 0.0).is_none());
        for bad in ["", "00-0-0-0", "00-00000000000000000000000000000000-b7ad6b7169203331-01"] {
            assert!(parent(bad).is_none(), "{bad}");
        }
    }
}
