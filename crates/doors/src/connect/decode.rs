//! Bytes of a request to a message: the mapping's rules where the library is laxer than they are,
//! and the two JSON spellings that are not in the definition. Knows no machine.

use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};

use super::fault::invalid;
use super::proto::vmprovisioner::v1::CreateVmRequest;

/// A message that is on the wire in both formats.
pub(super) trait Wire: buffa::Message + DeserializeOwned + serde::Serialize {}
impl<M: buffa::Message + DeserializeOwned + serde::Serialize> Wire for M {}

/// Keys that mean nothing here, as paths; callers of another version may send them.
pub(super) type Unknown = Vec<String>;

/// No more of them are kept.
const MAX_UNKNOWN: usize = 16;

/// `name`: of the message, for the complaint.
pub(super) fn message<M: Wire>(
    body: &[u8],
    format: CodecFormat,
    name: &str,
    unknown: &mut Unknown,
) -> Result<M, ConnectError> {
    match format {
        CodecFormat::Json => json(body, name, unknown),
        _ => buffa::DecodeOptions::new().decode_from_slice(body).map_err(|e| complain(name, e)),
    }
}

pub(super) fn encode<M: Wire>(message: &M, format: CodecFormat) -> Result<Bytes, ConnectError> {
    match format {
        CodecFormat::Json => serde_json::to_vec(message)
            .map(Bytes::from)
            .map_err(|e| ConnectError::internal(e.to_string())),
        _ => Ok(message.encode_to_bytes()),
    }
}

fn complain(name: &str, why: impl std::fmt::Display) -> ConnectError {
    invalid(format!("unmarshal message: unmarshal into *vmprovisionerv1.{name}: {why}"))
}

fn json<M: Wire>(body: &[u8], name: &str, unknown: &mut Unknown) -> Result<M, ConnectError> {
    if body.is_empty() {
        return Err(invalid("unmarshal message: zero-length payload is not a valid JSON object"));
    }
    // A list would be taken for a message with its fields in order.
    let first = body.iter().find(|b| !b.is_ascii_whitespace());
    if first != Some(&b'{') {
        return Err(complain(name, "not a JSON object"));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let message = serde_ignored::deserialize(&mut reader, |path| {
        // Options are steps of their own.
        let path = path.to_string().replace(".?", "");
        if unknown.len() < MAX_UNKNOWN && !ALIASES.iter().any(|alias| path.ends_with(alias)) {
            unknown.push(path);
        }
    });
    let message = message.map_err(|e| complain(name, e))?;
    reader.end().map_err(|e| complain(name, e))?;
    Ok(message)
}

/// Keys that are in no definition, and mean something all the same.
const ALIASES: &[&str] = &[".readonly", "memory.hotplug_size_bytes", "memory.hotplugSizeBytes"];

/// The request to create, with `readonly` and `hotplug_size_bytes` meaning what they say.
pub(super) fn create(
    body: &[u8],
    format: CodecFormat,
    unknown: &mut Unknown,
) -> Result<CreateVmRequest, ConnectError> {
    let mut request: CreateVmRequest = message(body, format, "CreateVmRequest", unknown)?;
    if format == CodecFormat::Json {
        let written: Written =
            serde_json::from_slice(body).map_err(|e| complain("CreateVmRequest", e))?;
        apply(&mut request, &written).map_err(invalid)?;
    }
    Ok(request)
}

/// An object or null, and nothing else in its place.
#[derive(Default)]
struct Object<T>(Option<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let fields = serde::de::value::MapAccessDeserializer::new(map);
                T::deserialize(fields).map(Some).map(Object)
            }
            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Object(None))
            }
        }
        deserializer.deserialize_any(Fields(std::marker::PhantomData))
    }
}

/// An object whatever is in it.
type Anything = std::collections::BTreeMap<String, IgnoredAny>;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Written {
    config: Object<WrittenConfig>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WrittenConfig {
    memory: Object<WrittenMemory>,
    storage: Option<Vec<Object<WrittenDisk>>>,
    cpu: Object<Anything>,
    boot: Object<Anything>,
    console: Object<Anything>,
    network: Option<Vec<Object<Anything>>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WrittenMemory {
    #[serde(alias = "hotplugSizeBytes")]
    hotplug_size_bytes: Option<Whole>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WrittenDisk {
    readonly: Option<bool>,
    #[serde(alias = "readOnly")]
    read_only: Option<bool>,
}

/// A 64-bit number, in digits or in quotes.
#[derive(Deserialize)]
#[serde(untagged)]
enum Whole {
    Number(i64),
    Text(String),
}

fn apply(request: &mut CreateVmRequest, written: &Written) -> Result<(), String> {
    let Some(config) = &written.config.0 else { return Ok(()) };
    for (i, disk) in config.storage.iter().flatten().enumerate() {
        let Some(WrittenDisk { readonly: Some(readonly), read_only }) = &disk.0 else { continue };
        if read_only.is_some_and(|other| other != *readonly) {
            return Err(format!("storage[{i}]: readonly and read_only contradict each other"));
        }
        if let Some(disk) = request.config.get_or_insert_default().storage.get_mut(i) {
            disk.read_only = *readonly;
        }
    }
    let more = config.memory.0.as_ref().and_then(|m| m.hotplug_size_bytes.as_ref());
    let more = match more {
        None => return Ok(()),
        Some(Whole::Number(more)) => *more,
        Some(Whole::Text(text)) => text
            .parse()
            .map_err(|_| "memory.hotplug_size_bytes is not a whole number".to_owned())?,
    };
    let memory = request.config.get_or_insert_default().memory.get_or_insert_default();
    if more < 0 {
        return Err("memory.hotplug_size_bytes must not be negative".into());
    }
    if more == 0 {
        return Ok(());
    }
    let most = memory.size_bytes.checked_add(more);
    let most = most.ok_or("memory.hotplug_size_bytes is too large")?;
    if memory.max_size_bytes != 0 && memory.max_size_bytes != most {
        return Err(format!(
            "memory.hotplug_size_bytes makes {most} bytes in all, memory.max_size_bytes says {}",
            memory.max_size_bytes
        ));
    }
    (memory.hotplug_enabled, memory.max_size_bytes) = (true, most);
    Ok(())
}

/// Reads a request of some kind in some form, as the first byte says.
#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    use super::proto::vmprovisioner::v1::{ListVmsRequest, ShutdownVmRequest};
    let Some((kind, body)) = bytes.split_first() else { return };
    let format = if kind % 2 == 0 { CodecFormat::Json } else { CodecFormat::Proto };
    let unknown = &mut Unknown::new();
    match kind / 2 % 3 {
        0 => {
            let Ok(mut request) = create(body, format, unknown) else { return };
            // What was read is written, and reads the same again.
            let written = encode(&request, format).expect("is written");
            let again = create(&written, format, unknown).expect("is read");
            assert_eq!(encode(&again, format).expect("is written"), written);
            let config = request.config.get_or_insert_default();
            let _ = super::create::check(config);
        }
        1 => drop(message::<ListVmsRequest>(body, format, "ListVmsRequest", unknown)),
        _ => drop(message::<ShutdownVmRequest>(body, format, "ShutdownVmRequest", unknown)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use buffa::Message;

    fn taken(bytes: &[u8], format: CodecFormat) -> Result<CreateVmRequest, ConnectError> {
        create(bytes, format, &mut Vec::new())
    }

    fn read(text: &str) -> Result<CreateVmRequest, String> {
        taken(text.as_bytes(), CodecFormat::Json).map_err(|e| e.message.unwrap_or_default())
    }

    #[test]
    fn both_spellings_and_all_numbers_are_read() {
        let text = r#"{"config":{"cpu":{"vcpuCount":"1"},"memory":{"size_bytes":"134217728",
            "hotplug_size_bytes":268435456},"storage":[{"path":"/a","readonly":true},{"readOnly":false}]}}"#;
        let config = read(text).unwrap().config;
        assert_eq!(config.cpu.vcpu_count, 1);
        assert!(config.storage[0].read_only && !config.storage[1].read_only);
        assert!(config.memory.hotplug_enabled);
        assert_eq!(config.memory.max_size_bytes, 134_217_728 + 268_435_456);
        assert_eq!(
            read(r#"{"config":{"cpu":{"vcpu_count":1.0}}}"#).unwrap().config.cpu.vcpu_count,
            1
        );
        assert!(read(r#"{"config":null,"vm_id":null,"x":[1]}"#).unwrap().config.is_unset());
    }

    #[test]
    fn keys_that_mean_nothing_are_told() {
        let mut unknown = Vec::new();
        let text = r#"{"config":{"memory":{"size_bytes":1,"hotplug_size_bytes":0,"sizeMb":3},
            "storage":[{"path":"/a","readonly":true,"cache":"x"}],"metadata":{"any":"key"}},
            "vmid":"a"}"#;
        create(text.as_bytes(), CodecFormat::Json, &mut unknown).unwrap();
        assert_eq!(unknown, ["config.memory.sizeMb", "config.storage.0.cache", "vmid"]);
    }

    const WHOLE: &str = r#"{"vm_id":"a","config":{"cpu":{"vcpu_count":2,"topology":{"sockets":1}},
        "memory":{"size_bytes":"134217728","hotplug_size_bytes":0},"boot":{"kernel_path":"/k"},
        "storage":[{"path":"/a","readonly":true,"options":{"a":"b"}}],
        "network":[{"mode":1,"ipv4_config":{"dns_servers":["1.1.1.1"]}}],"metadata":{"k":"v"}}}"#;

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(2000))]

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            for format in [CodecFormat::Json, CodecFormat::Proto] {
                let _ = taken(&bytes, format);
            }
        }

        /// A sound request with some bytes changed is read or refused in the known words.
        #[test]
        fn damaged_requests_are_read_or_refused(
            changes in proptest::collection::vec((0usize..500, proptest::prelude::any::<u8>()), 1..6),
        ) {
            let mut text = WHOLE.as_bytes().to_vec();
            let binary = read(WHOLE).unwrap().encode_to_vec();
            let mut message = binary.clone();
            for (at, byte) in changes {
                let (length, other) = (text.len(), message.len());
                text[at % length] = byte;
                message[at % other] = byte;
            }
            for (bytes, format) in [(text, CodecFormat::Json), (message, CodecFormat::Proto)] {
                if let Err(error) = taken(&bytes, format) {
                    proptest::prop_assert_eq!(error.code, connectrpc::ErrorCode::InvalidArgument);
                }
            }
        }

        /// What is written in one form reads the same in the other.
        #[test]
        fn both_forms_say_the_same(
            id in "[a-z0-9]{0,20}", cpus: i32, bytes: i64, path in "\\PC{0,30}", read_only: bool,
        ) {
            let mut request = read(WHOLE).unwrap();
            request.vm_id = id;
            let config = request.config.get_or_insert_default();
            config.cpu.get_or_insert_default().vcpu_count = cpus;
            config.memory.get_or_insert_default().size_bytes = bytes;
            config.storage[0].path = path;
            config.storage[0].read_only = read_only;
            let json = encode(&request, CodecFormat::Json).unwrap();
            let proto = encode(&request, CodecFormat::Proto).unwrap();
            proptest::prop_assert_eq!(&taken(&json, CodecFormat::Json).unwrap(), &request);
            proptest::prop_assert_eq!(&taken(&proto, CodecFormat::Proto).unwrap(), &request);
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for text in [
            "[]",
            "null",
            "{} x",
            "{\"config\":",
            "{\"config\":[]}",
            "{\"vmId\":\"a\",\"vm_id\":\"a\"}",
            r#"{"config":{"cpu":{"vcpu_count":1.5}}}"#,
            r#"{"config":{"cpu":{"vcpu_count":"abc"}}}"#,
            r#"{"config":{"cpu":{"vcpu_count":3000000000}}}"#,
            r#"{"config":{"cpu":[1]}}"#,
            r#"{"config":{"network":[{"mode":"DUAL"}]}}"#,
            "{\"config\":{\"cpu\":{\"vcpu_count\":2 // two\n}}}",
        ] {
            let complaint = read(text).expect_err(text);
            assert!(complaint.starts_with("unmarshal message: "), "{text}: {complaint}");
        }
        assert!(read("").unwrap_err().starts_with("unmarshal message: zero-length payload"));
        for text in [
            r#"{"config":{"storage":[{"readonly":true,"read_only":false}]}}"#,
            r#"{"config":{"memory":{"hotplug_size_bytes":-1}}}"#,
            r#"{"config":{"memory":{"size_bytes":1,"hotplug_size_bytes":1,"max_size_bytes":3}}}"#,
            r#"{"config":{"memory":{"size_bytes":"9223372036854775807","hotplugSizeBytes":"1"}}}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(read(r#"{"config":{"storage":[{"readonly":true,"read_only":true}]}}"#).is_ok());
    }
}
