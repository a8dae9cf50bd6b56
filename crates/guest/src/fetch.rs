//! Getting the script: whole or not at all, within bounds of time and size. Says what stood in
//! the way; never keeps anything of an earlier script.

use std::time::Duration;

use lodge_guest::{REPORT_HEADER, REQUIRE_HEADER};
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::http::HeaderMap;

/// A script larger than this is none.
const MAX_SCRIPT: u64 = 16 << 20;
const CONNECT: Duration = Duration::from_secs(5);
/// To the first byte of an answer. What stands between guest and server may keep a connection open
/// on whose other side nobody is left.
const FIRST_BYTE: Duration = Duration::from_secs(10);
/// From there to the last one.
const BODY: Duration = Duration::from_secs(30);
/// Each report is small and nobody depends on it.
const REPORT: Duration = Duration::from_secs(5);

pub(crate) struct Fetched {
    pub(crate) body: Vec<u8>,
    /// Where the server wants to hear of the runs.
    pub(crate) report: Option<String>,
}

/// Why there is no script.
pub(crate) struct Missing {
    pub(crate) why: String,
    /// The server wants such a run to count, and to hear of it.
    pub(crate) required: bool,
    pub(crate) report: Option<String>,
}

fn agent(first: Duration, body: Duration) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .proxy(None)
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(first))
        .timeout_recv_body(Some(body))
        .timeout_global(Some(CONNECT + first + body))
        .build();
    config.into()
}

pub(crate) fn script(url: &str) -> Result<Fetched, Missing> {
    let failed = |why: String| Missing { why, required: false, report: None };
    let answer = agent(FIRST_BYTE, BODY).get(url).call();
    let mut answer = answer.map_err(|e| failed(format!("{url}: {}", plain(&e))))?;
    let status = answer.status();
    let headers = answer.headers().clone();
    let report = header(&headers, REPORT_HEADER).and_then(|path| beside(url, path));
    let required = header(&headers, REQUIRE_HEADER) == Some("yes");
    let missing = |why: String| Missing { why, required, report: report.clone() };
    if !status.is_success() {
        return Err(missing(format!("{url}: the server answered {status}")));
    }
    let length = header(&headers, "content-length").and_then(|l| l.parse::<u64>().ok());
    let digest = expected(&headers);
    let framed = header(&headers, "transfer-encoding").is_some_and(|t| t.contains("chunked"));
    if length.is_none() && !framed && digest.is_empty() {
        return Err(missing(format!(
            "{url}: the server does not say how long the script is, so half of it could pass for \
             all of it"
        )));
    }
    let body = answer.body_mut().with_config().limit(MAX_SCRIPT).read_to_vec();
    let body = body.map_err(|e| missing(format!("{url}: {}", plain(&e))))?;
    if length.is_some_and(|l| l != body.len() as u64) {
        let got = body.len();
        return Err(missing(format!(
            "{url}: cut off after {got} bytes of {}",
            length.unwrap_or(0)
        )));
    }
    if body.is_empty() {
        return Err(missing(format!("{url}: the script is empty")));
    }
    let own: [u8; 32] = Sha256::digest(&body).into();
    if let Some((who, _)) = digest.iter().find(|(_, digest)| *digest != own) {
        return Err(missing(format!("{url}: the script's digest is not the one that {who} gives")));
    }
    Ok(Fetched { body, report })
}

pub(crate) fn report(url: &str, report: &lodge_guest::Report) -> Result<(), String> {
    let text = serde_json::to_vec(report).map_err(|e| e.to_string())?;
    let posted = agent(REPORT, REPORT).post(url).content_type("application/json").send(&text[..]);
    match posted.map(|answer| answer.status()) {
        Ok(status) if status.is_success() => Ok(()),
        Ok(status) => Err(format!("the server answered {status}")),
        Err(error) => Err(plain(&error)),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// A path on the server of a URL, and on no other.
fn beside(url: &str, path: &str) -> Option<String> {
    let after = url.find("://")? + 3;
    let host = url[after..].split('/').next()?;
    (path.starts_with('/') && !path.contains(['\r', '\n', ' ']))
        .then(|| format!("{}{host}{path}", &url[..after]))
}

/// Digests that the script must have: the server's, and those that came another way than it did.
fn expected(headers: &HeaderMap) -> Vec<(&'static str, [u8; 32])> {
    let mut list = Vec::new();
    let own = header(headers, "repr-digest").and_then(|value| {
        value.split(',').find_map(|part| part.trim().strip_prefix("sha-256=:")?.strip_suffix(':'))
    });
    list.extend(own.and_then(base64).map(|digest| ("its server", digest)));
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let word = words.split_whitespace().find_map(|w| w.strip_prefix("vm-bootstrap.sha256="));
    list.extend(word.and_then(hex).map(|digest| ("the kernel's command line", digest)));
    let firmware = "/sys/firmware/qemu_fw_cfg/by_name/opt/vm-bootstrap.sha256/raw";
    let firmware = std::fs::read_to_string(firmware).unwrap_or_default();
    list.extend(hex(firmware.trim()).map(|digest| ("the firmware", digest)));
    list
}

fn hex(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

fn base64(text: &str) -> Option<[u8; 32]> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut count, mut bytes) = (0_u32, 0, Vec::with_capacity(33));
    for letter in text.bytes().filter(|b| *b != b'=') {
        bits = bits << 6 | LETTERS.iter().position(|l| *l == letter)? as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes.try_into().ok()
}

fn plain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::ConnectionFailed => "no connection".into(),
        ureq::Error::BodyExceedsLimit(_) => {
            format!("larger than {} MiB, which is no script", MAX_SCRIPT >> 20)
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_in_both_writings() {
        let digest: [u8; 32] = Sha256::digest(b"x").into();
        let words = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
        assert_eq!(hex(words), Some(digest));
        assert_eq!(base64("LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE="), Some(digest));
        assert_eq!(hex("zz"), None);
        assert_eq!(base64("LXE"), None);
    }

    #[test]
    fn reports_stay_with_the_server() {
        let url = "http://10.0.2.100/vm-bootstrap";
        assert_eq!(beside(url, "/report").as_deref(), Some("http://10.0.2.100/report"));
        assert_eq!(beside(url, "http://elsewhere/"), None);
        assert_eq!(beside(url, "@elsewhere/"), None);
    }
}
