//! Signatures of records: RSA, PKCS #1 v1.5 over SHA-1, as the protocol has them. Of certificates
//! only the keys count.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rsa::pkcs1::DecodeRsaPrivateKey;
use rsa::pkcs1v15::{Signature, SigningKey, VerifyingKey};
use rsa::pkcs8::DecodePrivateKey;
use rsa::signature::{SignatureEncoding, Signer, Verifier};
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha1::Sha1;
use x509_cert::Certificate;
use x509_cert::der::DecodePem;
use x509_cert::spki::DecodePublicKey;

/// What signs.
pub(super) struct Key(RsaPrivateKey);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    pub(super) fn read(path: &str) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
        let key = RsaPrivateKey::from_pkcs8_pem(&text).ok();
        let key = key.or_else(|| RsaPrivateKey::from_pkcs1_pem(&text).ok());
        key.map(Self).ok_or_else(|| format!("{path} is no RSA key in PEM"))
    }

    /// Base64, in one line.
    pub(super) fn sign(&self, text: &str) -> String {
        let key = SigningKey::<Sha1>::new(self.0.clone());
        STANDARD.encode(key.sign(text.as_bytes()).to_bytes())
    }
}

/// Whose signatures count.
#[derive(Debug, Default)]
pub(super) struct Certificates(Vec<RsaPublicKey>);

impl Certificates {
    /// Reads certificates in PEM, one behind the other; those that cannot be read are told.
    pub(super) fn parse(text: &str, warnings: &mut Vec<String>) -> Self {
        const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
        const END: &str = "-----END CERTIFICATE-----";
        let mut list = Vec::new();
        for (number, part) in text.split(BEGIN).skip(1).enumerate() {
            let body: Option<&str> = part.split(END).next();
            let pem = format!("{BEGIN}{}{END}\n", body.unwrap_or_default());
            match key_of(&pem) {
                Some(key) => list.push(key),
                None => warnings.push(format!(
                    "signature-certificate-list: certificate {} cannot be read",
                    number + 1
                )),
            }
        }
        Self(list)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn know(&self, key: &Key) -> bool {
        self.0.contains(&key.0.to_public_key())
    }

    /// Whether one of them signed this very text.
    pub(super) fn verify(&self, text: &str, signature: &str) -> bool {
        let Ok(bytes) = STANDARD.decode(signature.trim()) else { return false };
        let Ok(signature) = Signature::try_from(bytes.as_slice()) else { return false };
        let by = |key: &RsaPublicKey| {
            let key = VerifyingKey::<Sha1>::new(key.clone());
            key.verify(text.as_bytes(), &signature).is_ok()
        };
        self.0.iter().any(by)
    }
}

fn key_of(pem: &str) -> Option<RsaPublicKey> {
    use x509_cert::der::Encode;
    let certificate = Certificate::from_pem(pem).ok()?;
    let key = certificate.tbs_certificate.subject_public_key_info.to_der().ok()?;
    RsaPublicKey::from_public_key_der(&key).ok()
}
