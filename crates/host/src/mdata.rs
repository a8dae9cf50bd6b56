//! What a guest is told when it asks for its metadata, and what becomes of what it writes: whose
//! keys are whose. Pure; the frames are `lodge_formats::mdata`'s.

use lodge_formats::mdata::{Answer, Ask};
use lodge_machine::host::Wrote;
use lodge_spec::draft::Scalar;
use lodge_spec::extras::{MAX_MDATA, Mdata, text_of};
use serde_json::Value;

/// Told as JSON text, whatever they hold.
const DOCUMENTS: [&str; 4] = ["nics", "resolvers", "routes", "tmpfs"];
/// Of the object, what is the operator's alone.
const SECRETS: [&str; 4] =
    ["internal_metadata", "customer_metadata", "vnc_password", "spice_password"];

/// Answers one question; what the guest wrote, if it may, is to be kept.
pub(crate) fn answer(mdata: &mut Mdata, ask: Ask) -> (Answer, Option<Wrote>) {
    match ask {
        Ask::Get { key } => (get(mdata, &key), None),
        Ask::Keys => (Answer::Success(keys(mdata).join("\n")), None),
        Ask::Put { key, value } => put(mdata, key, Some(value).filter(|v| !v.is_empty())),
        Ask::Delete { key } => put(mdata, key, None),
        Ask::Unknown { why } => (Answer::Failure(why), None),
    }
}

fn found(value: Option<String>) -> Answer {
    value.map_or(Answer::NotFound, Answer::Success)
}

/// The namespace of a key that only the operator writes.
fn namespace<'a>(mdata: &Mdata, key: &'a str) -> Option<&'a str> {
    let (prefix, _) = key.split_once(':')?;
    let own = mdata.namespaces.iter().any(|namespace| namespace == prefix);
    (prefix == "sdc" || own).then_some(prefix)
}

fn is_password(key: &str) -> bool {
    key.ends_with("_pw")
}

fn get(mdata: &Mdata, key: &str) -> Answer {
    let internal = |key: &str| found(mdata.internal.get(key).map(text_of));
    match namespace(mdata, key) {
        Some("sdc") => match &key["sdc:".len()..] {
            "operator-script" => internal("operator-script"),
            "volumes" => internal("sdc:volumes"),
            path => of_object(&mdata.object, path),
        },
        Some(_) => internal(key),
        None if is_password(key) => internal(key),
        None => found(mdata.customer.get(key).map(text_of)),
    }
}

fn of_object(object: &str, path: &str) -> Answer {
    let first = path.split('.').next().unwrap_or("");
    if SECRETS.contains(&first) {
        return Answer::NotFound;
    }
    let object: Value = serde_json::from_str(object).unwrap_or_default();
    if DOCUMENTS.contains(&path) {
        return found(object.get(path).map(Value::to_string));
    }
    // A tag's name may have dots of its own.
    let value = match path.strip_prefix("tags.") {
        Some(tag) => object.get("tags").and_then(|tags| tags.get(tag)),
        None => path.split('.').try_fold(&object, |at, part| match at {
            Value::Array(list) => list.get(part.parse::<usize>().ok()?),
            other => other.get(part),
        }),
    };
    match value {
        None | Some(Value::Null) => Answer::NotFound,
        Some(Value::String(text)) => Answer::Success(text.clone()),
        Some(value @ (Value::Bool(_) | Value::Number(_))) => Answer::Success(value.to_string()),
        Some(Value::Array(_) | Value::Object(_)) => Answer::Failure(String::new()),
    }
}

fn keys(mdata: &Mdata) -> Vec<String> {
    let theirs = |key: &&String| namespace(mdata, key).is_none() && !is_password(key);
    let own = mdata.internal.keys().filter(|key| namespace(mdata, key).is_some_and(|n| n != "sdc"));
    mdata.customer.keys().filter(theirs).chain(own).cloned().collect()
}

fn put(mdata: &mut Mdata, key: String, value: Option<String>) -> (Answer, Option<Wrote>) {
    if let Some(namespace) = namespace(mdata, &key) {
        let why = format!("Cannot update the \"{namespace}\" Namespace.");
        return (Answer::Failure(why), None);
    }
    let more = key.len() + value.as_ref().map_or(0, String::len);
    if key.len() > 255 || mdata.weight() + more > MAX_MDATA {
        return (Answer::Failure("The metadata is full.".into()), None);
    }
    let internal = is_password(&key) || key == "operator-script";
    let map = if internal { &mut mdata.internal } else { &mut mdata.customer };
    match &value {
        Some(value) => drop(map.insert(key.clone(), Scalar::Text(value.clone()))),
        None => drop(map.remove(&key)),
    }
    (Answer::Success("OK".into()), Some(Wrote { internal, key, value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mdata() -> Mdata {
        let text = |t: &str| Scalar::Text(t.into());
        Mdata {
            object: r#"{"uuid":"u","ram":256,"autoboot":false,"alias":null,"tags":{"a.b":"dot"},
                "nics":[{"ip":"10.0.0.1"}],"vnc_password":"secret",
                "internal_metadata":{"hidden":"x"}}"#
                .into(),
            customer: [("foo:bar", text("c")), ("bar:foo", text("c")), ("user-script", text("s"))]
                .map(|(k, v)| (k.to_owned(), v))
                .into(),
            internal: [
                ("foo:bar", text("i")),
                ("bar:foo", text("i")),
                ("hidden", text("x")),
                ("root_pw", text("pw")),
                ("operator-script", text("#!/bin/sh")),
            ]
            .map(|(k, v)| (k.to_owned(), v))
            .into(),
            namespaces: vec!["baz".into(), "foo".into()],
        }
    }

    fn ok(text: &str) -> Answer {
        Answer::Success(text.into())
    }

    #[test]
    fn case_86_namespaces_belong_to_the_operator() {
        let mut m = mdata();
        assert_eq!(get(&m, "foo:bar"), ok("i"));
        assert_eq!(get(&m, "bar:foo"), ok("c"));
        assert_eq!(keys(&m), ["bar:foo", "user-script", "foo:bar"]);
        let (said, wrote) = put(&mut m, "foo:qux".into(), Some("1".into()));
        assert_eq!(said, Answer::Failure("Cannot update the \"foo\" Namespace.".into()));
        assert_eq!(wrote, None);
        assert_eq!(put(&mut m, "quux:qux".into(), Some("1".into())).0, ok("OK"));
        assert!(matches!(put(&mut m, "foo:bar".into(), None).0, Answer::Failure(_)));
        assert_eq!(get(&m, "hidden"), Answer::NotFound);
    }

    #[test]
    fn keys_of_the_system_and_passwords() {
        let mut m = mdata();
        for (key, said) in [
            ("sdc:uuid", ok("u")),
            ("sdc:ram", ok("256")),
            ("sdc:autoboot", ok("false")),
            ("sdc:alias", Answer::NotFound),
            ("sdc:nope", Answer::NotFound),
            ("sdc:nics", ok(r#"[{"ip":"10.0.0.1"}]"#)),
            ("sdc:nics.0.ip", ok("10.0.0.1")),
            ("sdc:nics.0", Answer::Failure(String::new())),
            ("sdc:tags.a.b", ok("dot")),
            ("sdc:operator-script", ok("#!/bin/sh")),
            ("operator-script", Answer::NotFound),
            ("sdc:vnc_password", Answer::NotFound),
            ("sdc:internal_metadata.hidden", Answer::NotFound),
            ("root_pw", ok("pw")),
        ] {
            assert_eq!(get(&m, key), said, "{key}");
        }
        let refused = put(&mut m, "sdc:uuid".into(), Some("x".into())).0;
        assert_eq!(refused, Answer::Failure("Cannot update the \"sdc\" Namespace.".into()));
        let (_, wrote) = put(&mut m, "admin_pw".into(), Some("x".into()));
        assert!(wrote.unwrap().internal);
        let (_, wrote) =
            put(&mut m, "user-script".into(), Some(String::new()).filter(|v| !v.is_empty()));
        assert_eq!(wrote.unwrap().value, None);
        assert_eq!(get(&m, "user-script"), Answer::NotFound);
        let full = put(&mut m, "big".into(), Some("x".repeat(MAX_MDATA)));
        assert!(matches!(full, (Answer::Failure(_), None)));
    }
}
