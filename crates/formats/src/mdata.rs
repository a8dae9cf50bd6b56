//! The metadata protocol that SmartOS speaks with its guests over a serial line: lines with (V2)
//! and without (V1) a checksum. Knows frames, not keys.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// What a line asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Get {
        key: String,
    },
    Keys,
    Put {
        key: String,
        value: String,
    },
    Delete {
        key: String,
    },
    /// Well framed, and not to be understood; the text says why.
    Unknown {
        why: String,
    },
}

/// Which form the answer takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    V1,
    V2 { request: String },
}

/// What is to be done about a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Ask(Form, Ask),
    /// Only these words, as they are.
    Say(&'static str),
    /// A damaged frame: no answer.
    Nothing,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Success(String),
    NotFound,
    Failure(String),
}

/// Judges one line, which comes without its end.
pub fn hear(line: &[u8]) -> Heard {
    let Ok(line) = std::str::from_utf8(line) else { return Heard::Say("FAILURE") };
    let mut words = line.split_ascii_whitespace();
    match words.next() {
        Some("V2") => hear_v2(line).unwrap_or(Heard::Nothing),
        Some("NEGOTIATE") => Heard::Say(match words.next() {
            Some("V2") => "V2_OK",
            Some(_) => "FAILURE",
            None => "invalid command",
        }),
        Some("GET") => {
            let key = line.trim_start()["GET".len()..].trim();
            match key {
                "" => Heard::Say("invalid command"),
                key => Heard::Ask(Form::V1, Ask::Get { key: key.to_owned() }),
            }
        }
        Some("KEYS") => Heard::Ask(Form::V1, Ask::Keys),
        Some(_) => Heard::Say("FAILURE"),
        None => Heard::Say("invalid command"),
    }
}

fn hear_v2(line: &str) -> Option<Heard> {
    let mut words = line.split_ascii_whitespace();
    let (length, crc) = (words.nth(1)?, words.next()?);
    let rest: Vec<&str> = words.collect();
    let (request, code) = (*rest.first()?, *rest.get(1)?);
    // Any run of blanks may stand between fields; what is counted has one.
    let body = rest.join(" ");
    let sound = length.parse::<usize>().ok()? == body.len()
        && crc.len() == 8
        && u32::from_str_radix(crc, 16).ok()? == crc32fast::hash(body.as_bytes())
        && request.len() == 8
        && request.bytes().all(|b| b.is_ascii_hexdigit())
        && rest.len() <= 3;
    if !sound {
        return None;
    }
    let payload = decode(rest.get(2).copied().unwrap_or(""));
    let ask = match code {
        "GET" => key_of(payload).map(|key| Ask::Get { key }).ok_or("Invalid GET Request"),
        "KEYS" => Ok(Ask::Keys),
        "PUT" => put_of(payload).ok_or("Invalid PUT Request"),
        "DELETE" => key_of(payload).map(|key| Ask::Delete { key }).ok_or("Invalid DELETE Request"),
        other => return Some(unknown(request, format!("Unknown command {other}"))),
    };
    Some(match ask {
        Ok(ask) => Heard::Ask(Form::V2 { request: request.to_owned() }, ask),
        Err(why) => unknown(request, why.to_owned()),
    })
}

fn unknown(request: &str, why: String) -> Heard {
    Heard::Ask(Form::V2 { request: request.to_owned() }, Ask::Unknown { why })
}

fn decode(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

fn key_of(payload: Option<String>) -> Option<String> {
    payload.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}

fn put_of(payload: Option<String>) -> Option<Ask> {
    let payload = payload?;
    let mut words = payload.split(' ');
    let (key, value) = (words.next()?, words.next()?);
    if words.next().is_some() {
        return None;
    }
    Some(Ask::Put { key: key_of(decode(key))?, value: decode(value)? })
}

/// An answer as bytes, its line end included.
pub fn say(form: &Form, answer: &Answer) -> Vec<u8> {
    match form {
        Form::V1 => say_v1(answer),
        Form::V2 { request } => {
            let (code, payload) = match answer {
                Answer::Success(text) => ("SUCCESS", text.as_str()),
                Answer::NotFound => ("NOTFOUND", ""),
                Answer::Failure(why) => ("FAILURE", why.as_str()),
            };
            let body = match payload {
                "" => format!("{request} {code}"),
                payload => format!("{request} {code} {}", STANDARD.encode(payload)),
            };
            frame(&body)
        }
    }
}

/// A frame around a body, which begins with the request's number.
pub fn frame(body: &str) -> Vec<u8> {
    format!("V2 {} {:08x} {body}\n", body.len(), crc32fast::hash(body.as_bytes())).into_bytes()
}

fn say_v1(answer: &Answer) -> Vec<u8> {
    let text = match answer {
        Answer::NotFound => return b"NOTFOUND\n".to_vec(),
        Answer::Failure(_) => return b"FAILURE\n".to_vec(),
        Answer::Success(text) => text,
    };
    let mut out = String::from("SUCCESS\n");
    for line in text.split('\n').filter(|_| !text.is_empty()) {
        if line.starts_with('.') {
            out.push('.');
        }
        out.push_str(line);
        out.push('\n');
    }
    out.push_str(".\n");
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(request: &str) -> Form {
        Form::V2 { request: request.into() }
    }

    #[test]
    fn case_84_frames_are_the_published_ones() {
        let get = hear(b"V2 25 3a426b73 deadbeef GET c2RjOnV1aWQ=");
        assert_eq!(get, Heard::Ask(v2("deadbeef"), Ask::Get { key: "sdc:uuid".into() }));
        let keys = hear(b"V2 13 67351a51 00c0ffee KEYS");
        assert_eq!(keys, Heard::Ask(v2("00c0ffee"), Ask::Keys));
        let put = hear(b"V2 25 4c03a644 01234567 PUT Wm05diBZbUZ5");
        let wanted = Ask::Put { key: "foo".into(), value: "bar".into() };
        assert_eq!(put, Heard::Ask(v2("01234567"), wanted));
        let delete = hear(b"V2 20 1729f40a 89abcdef DELETE Zm9v");
        assert_eq!(delete, Heard::Ask(v2("89abcdef"), Ask::Delete { key: "foo".into() }));
        let said = |request: &str, answer| String::from_utf8(say(&v2(request), &answer)).unwrap();
        let ok = |text: &str| Answer::Success(text.into());
        assert_eq!(
            said("dc4fae17", ok("[]")).len(),
            "V2 21 265ae1d8 dc4fae17 SUCCESS W10=\n".len()
        );
        assert_eq!(said("dc4fae17", ok("[]")), "V2 21 265ae1d8 dc4fae17 SUCCESS W10=\n");
        assert_eq!(
            said("deadbeef", ok("b8ab5fc1-8576-45ef-bb51-9826b52a4651")),
            "V2 65 4b635364 deadbeef SUCCESS YjhhYjVmYzEtODU3Ni00NWVmLWJiNTEtOTgyNmI1MmE0NjUx\n"
        );
        assert_eq!(said("deadbeef", Answer::NotFound), "V2 17 3dc88642 deadbeef NOTFOUND\n");
        assert_eq!(
            said("00c0ffee", ok("root_authorized_keys\nuser-script")),
            "V2 61 3b9f1dd8 00c0ffee SUCCESS cm9vdF9hdXRob3JpemVkX2tleXMKdXNlci1zY3JpcHQ=\n"
        );
        assert_eq!(said("01234567", ok("OK")), "V2 21 5c9c8f29 01234567 SUCCESS T0s=\n");
        assert_eq!(
            said("89abcdef", Answer::Failure("Cannot update the \"sdc\" Namespace.".into())),
            "V2 65 2034dd71 89abcdef FAILURE \
             Q2Fubm90IHVwZGF0ZSB0aGUgInNkYyIgTmFtZXNwYWNlLg==\n"
        );
    }

    #[test]
    fn cases_82_83_85_words_before_a_frame_and_damaged_frames() {
        assert_eq!(hear(b""), Heard::Say("invalid command"));
        assert_eq!(hear(b"GET"), Heard::Say("invalid command"));
        assert_eq!(hear(b"NEGOTIATE"), Heard::Say("invalid command"));
        assert_eq!(hear(b"NEGOTIATE V2"), Heard::Say("V2_OK"));
        assert_eq!(hear(b"NEGOTIATE V3"), Heard::Say("FAILURE"));
        for word in ["PUT a b", "DELETE a", "HELLO"] {
            assert_eq!(hear(word.as_bytes()), Heard::Say("FAILURE"), "{word}");
        }
        for damaged in [
            "V2 25 3a426b74 deadbeef GET c2RjOnV1aWQ=",
            "V2 24 3a426b73 deadbeef GET c2RjOnV1aWQ=",
            "V2 13 67351a51 00c0ffee KEYS more words",
            "V2",
            "V2 13",
        ] {
            assert_eq!(hear(damaged.as_bytes()), Heard::Nothing, "{damaged}");
        }
        let spaced = hear(b"V2  13   67351a51 00c0ffee    KEYS");
        assert_eq!(spaced, Heard::Ask(v2("00c0ffee"), Ask::Keys));
    }

    #[test]
    fn lines_of_the_first_form_are_stuffed() {
        let said = say(&Form::V1, &Answer::Success("a\n.b\n".into()));
        assert_eq!(String::from_utf8(said).unwrap(), "SUCCESS\na\n..b\n\n.\n");
        assert_eq!(say(&Form::V1, &Answer::Success(String::new())), b"SUCCESS\n.\n");
        assert_eq!(say(&Form::V1, &Answer::NotFound), b"NOTFOUND\n");
    }

    #[test]
    fn requests_that_make_no_sense_are_named() {
        let heard = |body: &str| {
            let frame = frame(body);
            hear(&frame[..frame.len() - 1])
        };
        let why = |text: &str| Heard::Ask(v2("01234567"), Ask::Unknown { why: text.into() });
        assert_eq!(heard("01234567 GET"), why("Invalid GET Request"));
        assert_eq!(heard("01234567 PUT Zm9v"), why("Invalid PUT Request"));
        assert_eq!(heard("01234567 DELETE IA=="), why("Invalid DELETE Request"));
        assert_eq!(heard("01234567 DANCE"), why("Unknown command DANCE"));
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(line: Vec<u8>) {
            let _ = hear(&line);
        }

        #[test]
        fn what_is_framed_is_heard(key in "[ -~]{1,40}", value in ".{0,80}") {
            let inner = format!("{} {}", STANDARD.encode(&key), STANDARD.encode(&value));
            let frame = frame(&format!("0badcafe PUT {}", STANDARD.encode(inner)));
            let heard = hear(&frame[..frame.len() - 1]);
            let key = key.trim().to_owned();
            let wanted = match key.is_empty() {
                true => Ask::Unknown { why: "Invalid PUT Request".into() },
                false => Ask::Put { key, value },
            };
            proptest::prop_assert_eq!(heard, Heard::Ask(v2("0badcafe"), wanted));
        }
    }
}
