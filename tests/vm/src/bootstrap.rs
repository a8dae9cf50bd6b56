//! What first boots need of the world: a web server that does as it is told, also badly; plain
//! QEMU as people call it; a folder in which families of images are built once.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::assets;
use crate::keys::Pair;
use crate::lab::{PATIENCE, command, program};

/// One answer.
pub enum Reply {
    /// As it should be.
    Ok(Vec<u8>),
    /// Bytes as they are, head and all.
    Raw(Vec<u8>),
    /// The connection ends without a word.
    Close,
}

/// What was asked: method, path, headers in lower case, body; how often the same was asked before.
pub struct Asked {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    pub before: usize,
}

/// A server on a port of its own, for as long as it lives.
pub struct Web {
    pub port: u16,
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl Web {
    pub fn new(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::of(None, answer)
    }

    /// Speaks TLS, with those alone whom the same authority has signed.
    pub fn tls(
        own: &Pair,
        authority: &Pair,
        answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::of(Some(Arc::new(tls(own, authority))), answer)
    }

    fn of(
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked: Arc<Mutex<Vec<(String, String)>>> = Arc::default();
        let (log, answer) = (asked.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer, tls) = (log.clone(), answer.clone(), tls.clone());
                let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
                std::thread::spawn(move || match tls {
                    None => serve(stream, &log, &*answer),
                    Some(tls) => {
                        let server = rustls::ServerConnection::new(tls).unwrap();
                        let mut stream = rustls::StreamOwned::new(server, stream);
                        serve(&mut stream, &log, &*answer);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        Self { port, asked }
    }

    /// How often something was asked.
    pub fn count(&self, method: &str, path: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(m, p)| m == method && p == path).count()
    }
}

fn tls(own: &Pair, authority: &Pair) -> rustls::ServerConfig {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = |pair: &Pair| CertificateDer::from_pem_file(&pair.certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(authority)).unwrap();
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    );
    let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider);
    let config = config.with_safe_default_protocol_versions().unwrap();
    let config = config.with_client_cert_verifier(clients.build().unwrap());
    config.with_single_cert(vec![certificate(own)], key).unwrap()
}

fn serve(
    mut stream: impl Read + Write,
    log: &Mutex<Vec<(String, String)>>,
    answer: &dyn Fn(&Asked) -> Reply,
) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) if head.len() < 1 << 16 => head.push(byte[0]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: HashMap<String, String> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.to_lowercase(), v.trim().to_owned()))
        .collect();
    let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    if stream.read_exact(&mut body).is_err() {
        return;
    }
    let before = {
        let mut log = log.lock().unwrap();
        let before = log.iter().filter(|(m, p)| *m == method && *p == path).count();
        log.push((method.clone(), path.clone()));
        before
    };
    match answer(&Asked { method, path, headers, body, before }) {
        Reply::Ok(body) => {
            let head = format!(
                "HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: \
                 {}\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(&[head.into_bytes(), body].concat());
        }
        Reply::Raw(bytes) => drop(stream.write_all(&bytes)),
        Reply::Close => {}
    }
}

/// An answer with another status.
pub fn status(code: u16, body: &[u8]) -> Reply {
    let head =
        format!("HTTP/1.1 {code} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    Reply::Raw([head.into_bytes(), body.to_vec()].concat())
}

/// A machine as people start it by hand; ends with this.
pub struct Qemu {
    child: Child,
    console: PathBuf,
}

impl Qemu {
    /// `server`: the port that 10.0.2.100:80 leads to, and whether the guest reaches nothing else.
    pub fn start(dir: &Path, server: Option<(u16, bool)>, args: &[&str]) -> Self {
        let console = dir.join(format!("console-{}", args.len()));
        let mut qemu = command("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024", "-display", "none"]);
        qemu.args(["-serial", &format!("file:{}", console.display())]);
        match server {
            Some((port, restrict)) => {
                let restrict = if restrict { "restrict=on," } else { "" };
                let forward = "guestfwd=tcp:10.0.2.100:80-cmd:netcat 127.0.0.1";
                qemu.args(["-net", &format!("user,{restrict}{forward} {port}")]);
                qemu.args(["-net", "nic,model=virtio"]);
            }
            None => drop(qemu.args(["-net", "none"])),
        }
        qemu.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        Self { child: qemu.spawn().unwrap(), console }
    }

    pub fn text(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has printed something.
    pub fn until(&self, words: &str) -> String {
        let begun = Instant::now();
        loop {
            let text = self.text();
            if text.contains(words) {
                return text;
            }
            assert!(begun.elapsed() < PATIENCE, "{words:?} did not come:\n{text}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program that goes into guests, as it was built beside `lodge`.
pub fn runner() -> PathBuf {
    program().parent().unwrap().join("vm-bootstrap")
}

/// The folder in which families are built: what does not change is built once.
pub fn family_home() -> PathBuf {
    let home = assets::cache().join("families");
    std::fs::create_dir_all(&home).unwrap();
    home
}

/// Builds a family, beside its document; says what was printed.
pub fn build(home: &Path, folder: &Path, document: &str, more: &[&str]) -> String {
    std::fs::create_dir_all(folder).unwrap();
    let file = folder.join("build-vm-bootstrap.yml");
    std::fs::write(&file, document).unwrap();
    let mut lodge = command(program());
    lodge.args(["image", "matrix"]).arg(&file).args(more).env("LODGE_HOME", home);
    let output = lodge.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    out
}

/// Unpacks an image of a family into a folder.
pub fn unpack(folder: &Path, name: &str, into: &Path) -> PathBuf {
    let packed = folder.join(format!("output-{name}/packer-{name}.zst"));
    let disk = into.join(format!("{name}.qcow2"));
    let mut out = std::fs::File::create(&disk).unwrap();
    let input = std::fs::File::open(packed).unwrap();
    let mut input = ruzstd::decoding::StreamingDecoder::new(input).unwrap();
    std::io::copy(&mut input, &mut out).unwrap();
    disk
}
