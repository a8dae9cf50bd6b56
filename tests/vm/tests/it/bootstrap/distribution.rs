//! Images that come from shacache and go there: a server written from the protocol, which also
//! misbehaves.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lodge_vm_tests::assets::boot_sector;
use lodge_vm_tests::bootstrap::{Asked, Reply, Web, build, family_home, status};
use lodge_vm_tests::lab::command;
use lodge_vm_tests::python::{environment, must};
use lodge_vm_tests::{Lab, keys};
use serde_json::{Value, json};
use sha2::{Digest, Sha512};

fn sha512(bytes: &[u8]) -> String {
    Sha512::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// How a GET of a file is answered: its bytes, from where on they are wanted, how often it was
/// asked.
type Get = fn(&[u8], Option<usize>, usize) -> Reply;
/// How a POST is: by its digest.
type Post = fn(&str) -> Reply;

/// What the server does wrong, and what it holds.
#[derive(Default)]
struct State {
    blobs: HashMap<String, Vec<u8>>,
    index: HashMap<String, Vec<Value>>,
    /// A POST is answered so instead.
    post: Option<Post>,
    /// A GET of a file is.
    get: Option<Get>,
}

fn part(bytes: &[u8], from: usize) -> Reply {
    let (length, last) = (bytes.len() - from, bytes.len() - 1);
    let head = format!(
        "HTTP/1.1 206 Partial\r\nContent-Length: {length}\r\nContent-Range: bytes {from}-{last}/{}\r\n\
         Connection: close\r\n\r\n",
        bytes.len()
    );
    Reply::Raw([head.into_bytes(), bytes[from..].to_vec()].concat())
}

/// The head of a whole answer, and less than it promises.
fn cut(bytes: &[u8]) -> Reply {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nAccept-Ranges: bytes\r\nConnection: close\r\n\r\n",
        bytes.len()
    );
    Reply::Raw([head.into_bytes(), bytes[..bytes.len() * 2 / 5].to_vec()].concat())
}

fn answer(state: &Mutex<State>, asked: &Asked) -> Reply {
    let mut state = state.lock().unwrap();
    let path = asked.path.as_str();
    match (asked.method.as_str(), path.strip_prefix("/shacache/"), path.strip_prefix("/shadir/")) {
        ("POST", _, _) if path == "/shacache" => {
            let digest = sha512(&asked.body);
            if let Some(post) = state.post {
                return post(&digest);
            }
            state.blobs.insert(digest.clone(), asked.body.clone());
            status(201, digest.as_bytes())
        }
        ("GET", Some(digest), _) => match state.blobs.get(digest) {
            None => status(404, b""),
            Some(bytes) => {
                let range = asked.headers.get("range").and_then(|r| {
                    r.strip_prefix("bytes=")?.split('-').next()?.parse::<usize>().ok()
                });
                match (state.get, range) {
                    (Some(get), range) => get(bytes, range, asked.before),
                    (None, Some(from)) => part(bytes, from),
                    (None, None) => Reply::Ok(bytes.clone()),
                }
            }
        },
        ("GET", _, Some(key)) => match state.index.get(key) {
            Some(list) => Reply::Ok(Value::from(list.clone()).to_string().into_bytes()),
            None => status(404, b""),
        },
        ("PUT", _, Some(key)) => {
            let record = serde_json::from_slice(&asked.body).unwrap();
            state.index.entry(key.to_owned()).or_default().push(record);
            status(201, b"")
        }
        _ => status(400, b""),
    }
}

struct Shacache {
    lab: Lab,
    web: Web,
    state: Arc<Mutex<State>>,
    /// Where both servers are.
    base: String,
    config: PathBuf,
}

impl Shacache {
    fn new() -> Self {
        let lab = Lab::new();
        let state: Arc<Mutex<State>> = Arc::default();
        let own = state.clone();
        let web = Web::new(move |asked| answer(&own, asked));
        let base = format!("http://127.0.0.1:{}", web.port);
        Self::of(lab, web, state, base, "")
    }

    /// A server that speaks TLS with those alone whom its authority knows.
    fn secured() -> Self {
        let lab = Lab::new();
        let state: Arc<Mutex<State>> = Arc::default();
        let own = state.clone();
        let authority = keys::authority(lab.home(), "authority");
        let server = keys::signed(&authority, lab.home(), "server");
        let client = keys::signed(&authority, lab.home(), "client");
        let web = Web::tls(&server, &authority, move |asked| answer(&own, asked));
        let base = format!("https://127.0.0.1:{}", web.port);
        let more = ["shacache", "shadir"].map(|name| {
            format!(
                "{name}-ca-file = {}\n{name}-cert-file = {}\n{name}-key-file = {}\n",
                authority.certificate.display(),
                client.certificate.display(),
                client.key.display()
            )
        });
        Self::of(lab, web, state, base, &more.concat())
    }

    fn of(lab: Lab, web: Web, state: Arc<Mutex<State>>, base: String, more: &str) -> Self {
        let (key, certificate) = key(lab.home(), "own");
        let indented = fs::read_to_string(certificate).unwrap().replace('\n', "\n  ");
        let text = format!(
            "[networkcache]\n{more}download-cache-url = {base}/shacache\ndownload-dir-url = {base}/shadir\n\
             upload-cache-url = {base}/shacache\nupload-dir-url = {base}/shadir\n\
             signature-private-key-file = {}\nsignature-certificate-list =\n  {indented}\n",
            key.display()
        );
        let config = lab.home().join("shacache.cfg");
        fs::write(&config, text).unwrap();
        Self { lab, web, state, base, config }
    }

    fn pull(&self, source: &str, more: &[&str]) -> Result<String, String> {
        let args = ["image", "pull", source, "--shacache", self.config.to_str().unwrap()];
        let output = self.lab.run(&[&args[..], more].concat());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout) + &text(&output.stderr)),
            false => Err(text(&output.stderr)),
        }
    }

    /// Puts a file on the server; gives its URL and its digest.
    fn hold(&self, bytes: &[u8]) -> (String, String) {
        let digest = sha512(bytes);
        self.state.lock().unwrap().blobs.insert(digest.clone(), bytes.to_vec());
        (format!("{}/shacache/{digest}", self.base), digest)
    }

    /// Files a record, signed by a key.
    fn record(&self, key: &Path, text: &str) -> Value {
        let mut sign = command("openssl");
        sign.args(["dgst", "-sha1", "-sign"]).arg(key);
        sign.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = sign.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let signature = child.wait_with_output().unwrap().stdout;
        let mut encode = command("openssl");
        encode.args(["base64", "-A"]);
        encode.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = encode.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&signature).unwrap();
        let encoded = child.wait_with_output().unwrap().stdout;
        json!([text, String::from_utf8(encoded).unwrap()])
    }

    fn file(&self, key: &str, records: Vec<Value>) {
        self.state.lock().unwrap().index.insert(key.into(), records);
    }

    fn images(&self) -> usize {
        self.lab.json(&["image", "ls", "-o", "json"]).as_array().unwrap().len()
    }

    fn downloads(&self) -> usize {
        fs::read_dir(self.lab.home().join("cache/downloads")).unwrap().count()
    }
}

/// A key and a certificate, as the protocol's own tools make them.
fn key(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (key, certificate) = (dir.join(format!("{name}.key")), dir.join(format!("{name}.crt")));
    let mut openssl = command("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:1024", "-nodes", "-days", "36500", "-subj"]);
    openssl.arg(format!("/CN={name}")).arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    must(openssl.output());
    (key, certificate)
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

#[test]
fn cases_d1_to_d3_d9_and_d10_nothing_is_used_that_is_not_what_it_should_be() {
    let server = Shacache::new();
    let disk = boot_sector("good");
    let (url, digest) = server.hold(&disk);
    server.pull(&url, &["--name", "good"]).unwrap();
    let before = server.lab.json(&["image", "inspect", "good"]);
    // D1: one bit.
    server.state.lock().unwrap().get = Some(|bytes, _, _| {
        let mut bytes = bytes.to_vec();
        bytes[600] ^= 1;
        Reply::Ok(bytes)
    });
    let said = server.pull(&url, &["--name", "good"]).unwrap_err();
    assert!(said.contains("is not what it should be: its SHA-512 is"), "{said}");
    assert_eq!(server.lab.json(&["image", "inspect", "good"]), before);
    assert_eq!(server.downloads(), 0);
    // D2: cut off, with and without ranges afterwards.
    server.state.lock().unwrap().get =
        Some(|bytes, from, _| from.map_or_else(|| cut(bytes), |at| part(bytes, at)));
    server.pull(&url, &["--name", "resumed"]).unwrap();
    // D3: a part was asked for and everything came.
    server.state.lock().unwrap().get =
        Some(|bytes, from, _| from.map_or_else(|| cut(bytes), |_| Reply::Ok(bytes.to_vec())));
    server.pull(&url, &["--name", "anew"]).unwrap();
    // Another part than was asked for is no part at all.
    server.state.lock().unwrap().get = Some(|bytes, from, _| match from {
        Some(_) => part(bytes, 1),
        None => cut(bytes),
    });
    let said = server.pull(&url, &["--name", "odd"]).unwrap_err();
    assert!(said.contains("another part") || said.contains("cut off"), "{said}");
    // What fails again and again is given up, what has come is kept and gone on with.
    server.state.lock().unwrap().get = Some(|bytes, from, _| match from {
        None => cut(bytes),
        Some(_) => status(503, b""),
    });
    assert!(server.pull(&url, &["--name", "later"]).unwrap_err().contains("503"));
    assert_eq!(server.downloads(), 1);
    server.state.lock().unwrap().get = None;
    server.pull(&url, &["--name", "later"]).unwrap();
    for name in ["resumed", "anew", "later"] {
        assert_eq!(server.lab.json(&["image", "inspect", name])["disk"], before["disk"], "{name}");
    }
    // D9: the right bytes of a file that is not whole.
    let whole = packed(&disk);
    for bad in [&whole[..whole.len() / 2], &[&whole[..], b"garbage"].concat()] {
        let (url, _) = server.hold(bad);
        let count = server.images();
        assert!(server.pull(&url, &["--name", "packed"]).is_err());
        assert_eq!(server.images(), count);
    }
    let (packed_url, _) = server.hold(&whole);
    server.pull(&packed_url, &["--name", "packed"]).unwrap();
    assert_eq!(server.lab.json(&["image", "inspect", "packed"])["disk"], before["disk"]);
    // D10: what says nothing of its file.
    let plain = url.replace(&digest, "disk.img");
    for odd in [
        plain.clone(),
        format!("{plain}#{}", "a".repeat(31)),
        format!("{url}#{}#x", "a".repeat(32)),
    ] {
        let said = server.pull(&odd, &["--name", "x"]).unwrap_err();
        assert!(said.contains(&odd), "{said}");
    }
    let said = server.pull(&format!("{url}#{}", "a".repeat(32)), &["--name", "x"]).unwrap_err();
    assert!(said.contains("its MD5 is"), "{said}");
}

#[test]
fn cases_d7_and_d8_records_that_cannot_be_believed_are_passed_over() {
    let server = Shacache::new();
    let (_, digest) = server.hold(&packed(&boot_sector("image")));
    let own = server.lab.home().join("own.key");
    let (stranger, _) = key(server.lab.home(), "stranger");
    let text = |version: &str| {
        format!(
            "{{\"sha512\": \"{digest}\", \"title\": \"packerimage-Debian-{version}.gz\", \"version\": {version}}}"
        )
    };
    let good = server.record(&own, &text("12"));
    let mut altered = good.clone();
    altered[0] = text("13").into();
    let object: Value = serde_json::from_str(&text("14")).unwrap();
    let bad = vec![
        altered,
        json!([text("15"), ""]),
        server.record(&stranger, &text("16")),
        server.record(&own, "no JSON"),
        json!([object, good[1]]),
        server.record(&own, "{\"version\": 17}"),
        server.record(&own, "{\"sha512\": \"abc\", \"version\": 18}"),
        json!("a text"),
        json!([]),
    ];
    server.file("packer-images", [bad.clone(), vec![good.clone(), good]].concat());
    let said = server.pull("shacache:packer-images", &["version>=12"]).unwrap();
    assert!(said.contains("debian-12"), "{said}");
    for words in [
        "nobody who is trusted",
        "not signed",
        "not JSON",
        "no pair",
        "no sha512",
        "no such digest",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    server.file("packer-images", bad.clone());
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("No result found with given criteria."), "{said}");
    // Who says so believes what is not signed, and still nothing that is nothing.
    let said = server.pull("shacache:packer-images", &["version==15", "--insecure"]).unwrap();
    assert!(said.contains("debian-15"), "{said}");
    assert!(server.pull("shacache:nothing", &[]).unwrap_err().contains("nothing is known"));
    // Without anybody to trust, nothing is believed by accident.
    let config = fs::read_to_string(&server.config).unwrap();
    let (head, _) = config.split_once("signature-private-key-file").unwrap();
    fs::write(&server.config, head).unwrap();
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("--insecure believes all"), "{said}");
    fs::write(&server.config, config.replace("BEGIN CERTIFICATE", "BEGIN NOTHING")).unwrap();
    assert!(server.pull("shacache:packer-images", &[]).unwrap_err().contains("no certificate"));
}

#[test]
fn cases_d4_to_d6_what_is_uploaded_is_found_again() {
    let server = Shacache::secured();
    let folder = family_home().join("uploaded");
    let document = "images: [{distro: debian12, sizes: [4]}]\n";
    build(&family_home(), &folder, document, &[]);
    for name in ["URL.txt", "metadata.json"] {
        let _ = fs::remove_file(folder.join(name));
    }
    let file = folder.join("build-vm-bootstrap.yml");
    let args =
        ["image", "matrix", file.to_str().unwrap(), "--shacache", server.config.to_str().unwrap()];
    let mut lab = server.lab.command(&args);
    let upload = |lab: &mut std::process::Command| {
        lab.env("LODGE_HOME", family_home()).env("UPLOAD", "yes");
        let output = lab.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // D4 and D6: a server that breaks off, says another word, or has other bytes.
    let wrong: [(Post, &str); 3] = [
        (|_| Reply::Close, "not uploaded"),
        (|digest| status(200, digest.as_bytes()), "answered 200 and not 201"),
        (|_| status(201, "0".repeat(128).as_bytes()), "the server has"),
    ];
    for (post, words) in wrong {
        server.state.lock().unwrap().post = Some(post);
        let (fine, said) = upload(&mut lab);
        assert!(!fine && said.contains(words), "{words}: {said}");
        assert!(server.state.lock().unwrap().index.is_empty(), "a record of what is not there");
        assert!(!folder.join("URL.txt").exists());
    }
    server.state.lock().unwrap().post = None;
    let (fine, said) = upload(&mut lab);
    assert!(fine && said.contains(": uploaded"), "{said}");
    // D5: it is there already; its record is filed all the same.
    let posts = server.web.count("POST", "/shacache");
    let (fine, said) = upload(&mut lab);
    assert!(fine && said.contains("is there already"), "{said}");
    assert_eq!(server.web.count("POST", "/shacache"), posts);
    assert_eq!(server.state.lock().unwrap().index["packer-images"].len(), 2);
    let image = "packer-debian12-4G-vm-bootstrap.gz";
    let packed = fs::read(folder.join("output-debian12-4G-vm-bootstrap").join(image)).unwrap();
    let (digest, md5) = (sha512(&packed), fs::read_to_string(folder.join("MD5SUM.txt")).unwrap());
    let line = format!("{image}  {}/shacache/{digest}   {}\n", server.base, &md5[..32]);
    assert_eq!(fs::read_to_string(folder.join("URL.txt")).unwrap(), line);
    let metadata: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("metadata.json")).unwrap()).unwrap();
    let wanted = json!({
        "title": "packerimage-debian12-4G-vm-bootstrap.gz", "distribution": "debian",
        "version": "12", "disk-size": 4, "compressed": true, "sha512": digest,
    });
    assert_eq!(metadata, wanted);
    // What the line says is what SlapOS is given, and what is filed is believed.
    server
        .pull(&format!("{}/shacache/{digest}#{}", server.base, &md5[..32]), &["--name", "by-url"])
        .unwrap();
    server.pull("shacache:packer-images", &["distribution==debian", "disk-size==4"]).unwrap();
    let of = |name: &str| server.lab.json(&["image", "inspect", name])["disk"].clone();
    assert_eq!(of("by-url"), of("debian12-4g-vm-bootstrap"));
    assert_eq!(of("by-url")["virtual_bytes"], 4_000_000_000_u64);
    // Its own tools believe it too, and are given what was sent.
    let words = ["distribution==\"debian\"", "disk-size==4"];
    assert_eq!(own_tool("networkcache-download", &server, &words), packed);
}

/// Runs a tool of the protocol's own library; gives what it printed.
fn own_tool(name: &str, server: &Shacache, args: &[&str]) -> Vec<u8> {
    let mut tool = command(own_tools().join(name));
    tool.arg("-c").arg(&server.config).args(["-k", "packer-images"]).args(args);
    let output = tool.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn own_tools() -> PathBuf {
    environment(&["slapos.libnetworkcache==0.30"], true).join("bin")
}

#[test]
fn what_its_own_tools_upload_is_pulled() {
    let server = Shacache::secured();
    let image = server.lab.home().join("image.gz");
    fs::write(&image, packed(&boot_sector("theirs"))).unwrap();
    let words = ["-f", image.to_str().unwrap(), "title=packerimage-Debian-12.gz", "version=12"];
    own_tool("networkcache-upload", &server, &words);
    let said = server.pull("shacache:packer-images", &["version==\"12\""]).unwrap();
    assert!(said.contains("debian-12"), "{said}");
    // A key of theirs, where it is not the one that signed.
    let (theirs, certificate) = ("theirs.key", "theirs.crt");
    let mut generate = command(own_tools().join("generate-signature-key"));
    generate.args(["--cert-file", certificate, theirs, "theirs"]).current_dir(server.lab.home());
    must(generate.output());
    let key = server.lab.home().join(theirs);
    let config = fs::read_to_string(&server.config).unwrap();
    let own = server.lab.home().join("own.key");
    let other = config.replace(own.to_str().unwrap(), key.to_str().unwrap());
    fs::write(&server.config, &other).unwrap();
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("so nobody who reads this file would believe it"), "{said}");
    let indented = |name: &str| {
        fs::read_to_string(server.lab.home().join(name)).unwrap().replace('\n', "\n  ")
    };
    fs::write(&server.config, other.replace(&indented("own.crt"), &indented(certificate))).unwrap();
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("nobody who is trusted"), "{said}");
    // Who is not known to the server, and whom we do not know.
    let stranger = keys::authority(server.lab.home(), "stranger");
    let client = server.lab.home().join("client.pem");
    let (pem, key) = (stranger.certificate.display(), stranger.key.display());
    let odd = config.replace(client.to_str().unwrap(), &pem.to_string());
    let odd = odd.replace(server.lab.home().join("client.key").to_str().unwrap(), &key.to_string());
    fs::write(&server.config, odd).unwrap();
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("shadir"), "{said}");
    let authority = server.lab.home().join("authority.pem");
    fs::write(&server.config, config.replace(authority.to_str().unwrap(), &pem.to_string()))
        .unwrap();
    let said = server.pull("shacache:packer-images", &[]).unwrap_err();
    assert!(said.contains("certificate"), "{said}");
}
