//! Who may come in: JSON web tokens in the place of a password, signed with ECDSA on P-384 by
//! whoever an organization trusts.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
use serde_json::Value;

/// An organization and the key that its tokens are signed with.
#[derive(Clone, Debug)]
pub struct Organization {
    name: String,
    /// An uncompressed point of P-384.
    point: Vec<u8>,
}

/// What comes before the point in the DER form of such a key.
const HEAD: &[u8] = &[
    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b,
    0x81, 0x04, 0x00, 0x22, 0x03, 0x62, 0x00,
];

impl Organization {
    /// `key`: the public key as PEM (`-----BEGIN PUBLIC KEY-----`).
    pub fn new(name: &str, key: &str) -> Result<Self, String> {
        let body: String = key.lines().filter(|l| !l.starts_with("-----")).map(str::trim).collect();
        let der = STANDARD.decode(body).map_err(|e| format!("the key is not PEM: {e}"))?;
        match der.strip_prefix(HEAD) {
            Some(point) if point.len() == 97 => {
                Ok(Self { name: name.to_owned(), point: point.to_vec() })
            }
            _ => Err("the key is not a public key on the curve P-384".into()),
        }
    }

    /// Whether a token is in force and its owner belongs to the organization.
    pub(super) fn admits(&self, token: &[u8]) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        std::str::from_utf8(token).is_ok_and(|token| self.admits_at(token, now).is_some())
    }

    fn admits_at(&self, token: &str, now: u64) -> Option<()> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (head, claims) = signed.split_once('.')?;
        let json = |part: &str| -> Option<Value> {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
        };
        // Only this one: whoever is told which kind to use can choose one that signs nothing.
        if json(head)?["alg"] != "ES384" {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, &self.point);
        key.verify(signed.as_bytes(), &signature).ok()?;
        let claims = json(claims)?;
        if claims["exp"].as_f64()? <= now as f64 {
            return None;
        }
        if claims["nbf"].as_f64().is_some_and(|from| from > now as f64) {
            return None;
        }
        let scope = format!("user:memberof:{}", self.name);
        let scopes = claims["scope"].as_array();
        let member = scopes.is_some_and(|all| all.iter().any(|s| s == scope.as_str()));
        (claims["azp"] == self.name.as_str() || member).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair};

    fn pair() -> (EcdsaKeyPair, Organization) {
        let (kind, random) = (&ECDSA_P384_SHA384_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).unwrap();
        let der = [HEAD, pair.public_key().as_ref()].concat();
        let pem = format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            STANDARD.encode(der)
        );
        (pair, Organization::new("org", &pem).unwrap())
    }

    fn token(pair: &EcdsaKeyPair, head: &str, claims: &str) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(head), URL_SAFE_NO_PAD.encode(claims));
        let signature = pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    #[test]
    fn members_come_in_and_nobody_else() {
        let (pair, organization) = pair();
        let head = r#"{"alg":"ES384","typ":"JWT"}"#;
        let admits = |head: &str, claims: &str| {
            organization.admits_at(&token(&pair, head, claims), 1000).is_some()
        };
        assert!(admits(head, r#"{"azp":"org","exp":2000}"#));
        assert!(admits(head, r#"{"scope":["user:memberof:org"],"exp":2000,"nbf":900}"#));
        for claims in [
            r#"{"azp":"other","exp":2000}"#,
            r#"{"azp":"org","exp":1000}"#,
            r#"{"azp":"org"}"#,
            r#"{"azp":"org","exp":2000,"nbf":1001}"#,
            r#"{"scope":["user:memberof:organ"],"exp":2000}"#,
        ] {
            assert!(!admits(head, claims), "{claims}");
        }
        assert!(!admits(r#"{"alg":"none"}"#, r#"{"azp":"org","exp":2000}"#));
        let (other, _) = self::pair();
        let foreign = token(&other, head, r#"{"azp":"org","exp":2000}"#);
        assert!(organization.admits_at(&foreign, 1000).is_none());
        assert!(organization.admits_at("a.b.c", 1000).is_none());
        assert!(Organization::new("org", "nonsense").is_err());
    }
}
