//! Certificates as people make them, with `openssl`: an authority of a test's own, and what it
//! signs.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::command;
use crate::python::must;

/// A certificate and its key, PEM files.
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Pair {
    fn at(dir: &Path, name: &str) -> Self {
        let file = |end: &str| dir.join(format!("{name}.{end}"));
        Self { certificate: file("pem"), key: file("key") }
    }
}

fn openssl(words: &str, files: &[(&str, &Path)]) {
    let mut openssl = command("openssl");
    openssl.args(words.split(' '));
    for (option, file) in files {
        openssl.arg(option).arg(file);
    }
    must(openssl.output());
}

/// A certificate that nobody else signed.
pub fn authority(dir: &Path, name: &str) -> Pair {
    let own = Pair::at(dir, name);
    let words = format!("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name}");
    openssl(&words, &[("-keyout", &own.key), ("-out", &own.certificate)]);
    own
}

/// One that an authority signed, for 127.0.0.1.
pub fn signed(by: &Pair, dir: &Path, name: &str) -> Pair {
    let own = Pair::at(dir, name);
    let (request, names) = (dir.join(format!("{name}.csr")), dir.join("names"));
    fs::write(&names, "subjectAltName=IP:127.0.0.1\n").unwrap();
    let words = format!("req -newkey rsa:2048 -nodes -subj /CN={name}");
    openssl(&words, &[("-keyout", &own.key), ("-out", &request)]);
    let files: [(&str, &Path); 5] = [
        ("-in", &request),
        ("-CA", &by.certificate),
        ("-CAkey", &by.key),
        ("-extfile", &names),
        ("-out", &own.certificate),
    ];
    openssl("x509 -req -days 2 -CAcreateserial", &files);
    own
}
