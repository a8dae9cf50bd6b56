//! Who asks: bearer tokens, what they stand for, and how much each tenant may have. Tokens are
//! known only by their SHA-256, and compared without telling how far they agree.

use std::collections::BTreeMap;

use connectrpc::{ConnectError, ErrorCode};
use http::HeaderMap;
use sha2::{Digest, Sha256};

use super::DEFAULT_CUSTOMER;

/// What is told of somebody else's machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Foreign {
    /// That there is none.
    #[default]
    NotFound,
    /// That it is not theirs.
    Denied,
}

/// A token that is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub sha256: [u8; 32],
    pub customer: String,
}

/// What one customer may have. `None`: as much as there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    pub vms: Option<usize>,
    pub vcpus: Option<u64>,
    pub memory_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenants {
    /// Without it everyone is everyone.
    pub required: bool,
    /// `dev_customer_<id>` stands for its customer: for trying out, not for keeping anyone out.
    pub development: bool,
    pub tokens: Vec<Token>,
    pub foreign: Foreign,
    /// By customer; `*` is for those who have none of their own.
    pub quotas: BTreeMap<String, Quota>,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// Nobody had to say.
    Anyone,
    Customer(String),
}

impl Caller {
    /// Whose machines the caller sees; `None`: all.
    pub(super) fn sees(&self) -> Option<&str> {
        match self {
            Caller::Anyone => None,
            Caller::Customer(customer) => Some(customer),
        }
    }

    /// Who owns what the caller makes, if the request names `customer_id`.
    pub(super) fn owner(&self, customer_id: &str) -> Result<String, ConnectError> {
        match self {
            Caller::Anyone if customer_id.is_empty() => Ok(DEFAULT_CUSTOMER.to_owned()),
            Caller::Anyone => Ok(customer_id.to_owned()),
            Caller::Customer(own) if customer_id.is_empty() || customer_id == own => {
                Ok(own.clone())
            }
            Caller::Customer(_) => {
                Err(ConnectError::new(ErrorCode::PermissionDenied, "customer_id mismatch"))
            }
        }
    }

    pub(super) fn name(&self) -> &str {
        self.sees().unwrap_or("anyone")
    }
}

impl Tenants {
    pub(super) fn caller(&self, headers: &HeaderMap) -> Result<Caller, ConnectError> {
        if !self.required {
            return Ok(Caller::Anyone);
        }
        let refuse = |why: &str| Err(ConnectError::new(ErrorCode::Unauthenticated, why));
        let Some(header) = headers.get(http::header::AUTHORIZATION) else {
            return refuse("authorization header required");
        };
        let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        let Some(token) = token else {
            return refuse("authorization must be 'Bearer <token>'");
        };
        if let Some(customer) = self.known(token) {
            return Ok(Caller::Customer(customer));
        }
        match token.strip_prefix("dev_customer_").filter(|_| self.development) {
            Some(id) if is_customer(id) => Ok(Caller::Customer(id.to_owned())),
            Some(_) => refuse("invalid development token format"),
            None if self.development => {
                refuse("invalid token format - use 'dev_customer_<customer_id>' for development")
            }
            None => refuse("invalid token"),
        }
    }

    fn known(&self, token: &str) -> Option<String> {
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let mut found = None;
        for known in &self.tokens {
            // Every byte of every token is looked at, whatever was found before.
            let differs = known.sha256.iter().zip(digest).fold(0, |sum, (a, b)| sum | (a ^ b));
            if differs == 0 {
                found = Some(known.customer.clone());
            }
        }
        found
    }

    pub(super) fn quota(&self, customer: &str) -> Option<&Quota> {
        self.quotas.get(customer).or_else(|| self.quotas.get("*"))
    }
}

/// Letters, digits and `._-`, at most 64 of them.
fn is_customer(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(tenants: &Tenants, header: Option<&str>) -> Result<Caller, String> {
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert(http::header::AUTHORIZATION, value.parse().unwrap());
        }
        tenants.caller(&headers).map_err(|e| e.message.unwrap_or_default())
    }

    #[test]
    fn the_four_refusals_have_their_words() {
        let tenants = Tenants { required: true, development: true, ..Tenants::default() };
        assert_eq!(ask(&tenants, None).unwrap_err(), "authorization header required");
        for bad in ["Basic x", "bearer dev_customer_a", "Bearer"] {
            let said = ask(&tenants, Some(bad)).unwrap_err();
            assert_eq!(said, "authorization must be 'Bearer <token>'", "{bad}");
        }
        let said = ask(&tenants, Some("Bearer zzz")).unwrap_err();
        assert!(said.starts_with("invalid token format - use 'dev_customer_"));
        for bad in ["", "a b", "a,b=c"] {
            let said = ask(&tenants, Some(&format!("Bearer dev_customer_{bad}"))).unwrap_err();
            assert_eq!(said, "invalid development token format");
        }
        let a = Caller::Customer("a".into());
        assert_eq!(ask(&tenants, Some("Bearer dev_customer_a")), Ok(a.clone()));
        assert_eq!(a.owner("").unwrap(), "a");
        assert_eq!(a.owner("b").unwrap_err().message.unwrap(), "customer_id mismatch");
    }

    #[test]
    fn configured_tokens_stand_for_their_customer() {
        let sha256 = Sha256::digest(b"secret").into();
        let tokens = vec![Token { sha256, customer: "acme".into() }];
        let tenants = Tenants { required: true, tokens, ..Tenants::default() };
        assert_eq!(ask(&tenants, Some("Bearer secret")), Ok(Caller::Customer("acme".into())));
        assert_eq!(ask(&tenants, Some("Bearer dev_customer_a")).unwrap_err(), "invalid token");
        assert_eq!(ask(&Tenants::default(), None), Ok(Caller::Anyone));
    }
}
