//! `send` and `receive`: a machine as one stream. A header of 512 bytes before each part: fields
//! that end with a zero byte, `MAGIC-VMBUNDLE`, the version, `CHECKSUM`, the part's name, its size
//! and its size with padding. First comes the description as JSON, then each disk's own layer.

use std::io::Read;

use lodge_spec::request::Request;
use serde_json::{Value, json};

use super::build::Metadata;
use super::draft;
use super::nics;
use super::one::{Vm, document, redefine};
use super::properties::Brand;
use super::run::{Done, Fault, Session};
use super::values::{Object, objects, text};
use super::view::metadata_of;

const MAGIC: &str = "MAGIC-VMBUNDLE";
const BLOCK: usize = 512;
/// A description longer than this is none.
const MAX_DESCRIPTION: u64 = 8 << 20;

fn header(name: &str, size: u64) -> Vec<u8> {
    let padded = size.next_multiple_of(BLOCK as u64);
    let mut bytes = Vec::new();
    for field in [MAGIC, "1", "CHECKSUM", name, &size.to_string(), &padded.to_string()] {
        bytes.extend(field.as_bytes());
        bytes.push(0);
    }
    bytes.resize(BLOCK, 0);
    bytes
}

/// The name and the size of the part that comes; `None` at the end.
fn read_header(from: &mut dyn Read) -> Result<Option<(String, u64)>, String> {
    let mut bytes = [0; BLOCK];
    let mut filled = 0;
    while filled < BLOCK {
        match from.read(&mut bytes[filled..]).map_err(|e| e.to_string())? {
            0 if filled == 0 => return Ok(None),
            0 => return Err("the stream is cut off".into()),
            count => filled += count,
        }
    }
    let fields: Vec<&[u8]> = bytes.split(|b| *b == 0).take(6).collect();
    let field = |i: usize| std::str::from_utf8(fields[i]).unwrap_or("").to_owned();
    if fields.len() < 6 || field(0) != MAGIC || field(1) != "1" {
        return Err("this is no bundle of a VM".into());
    }
    let size = field(4).parse().map_err(|_| "a part of the bundle has no size".to_owned())?;
    Ok(Some((field(3), size)))
}

fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

pub(super) async fn send(session: &mut Session<'_, '_>, vm: Vm) -> Done {
    if session.place.stdout_is_terminal {
        return Err(Fault::Error("Cannot send VM to a TTY.".into()));
    }
    let stop = Request::Stop { target: vm.uuid.clone(), force: false, timeout_ms: 180_000 };
    session.ask(stop).await?.map_err(|refusal| refusal.to_string())?;
    let Metadata { customer, internal } = metadata_of(&vm.detail);
    let mut doc = vm.doc.clone();
    doc.insert("customer_metadata".into(), customer.into());
    doc.insert("internal_metadata".into(), internal.into());
    let description = Value::Object(doc).to_string();
    let size = description.len() as u64;
    session.place.stdout.write_all(&header("JSON", size))?;
    session.place.stdout.write_all(description.as_bytes())?;
    session.place.stdout.write_all(&vec![0; padding(size)])?;
    let files = document(session, Request::DiskFiles { target: vm.uuid.clone() }).await??;
    for file in files.as_array().into_iter().flatten() {
        let (name, path) = (&file["name"], file["path"].as_str().unwrap_or(""));
        // A disk that was never started with has no bytes yet.
        let Some(size) = file["bytes"].as_u64() else { continue };
        session.place.stdout.write_all(&header(name.as_str().unwrap_or(""), size))?;
        let mut reader = (session.place.open)(path)?.take(size);
        let copied = std::io::copy(&mut reader, session.place.stdout)?;
        if copied != size {
            return Err(Fault::Error(format!("{path} became shorter while it was read")));
        }
        session.place.stdout.write_all(&vec![0; padding(size)])?;
    }
    session.place.stdout.flush()?;
    session.say(&format!("Successfully sent VM {}", vm.uuid))
}

pub(super) async fn receive(session: &mut Session<'_, '_>) -> Done {
    let mut from = (session.place.open)("-")?;
    let first = read_header(&mut from)?;
    let Some((_, size)) = first.filter(|(name, size)| name == "JSON" && *size <= MAX_DESCRIPTION)
    else {
        return Err(Fault::Error("this is no bundle of a VM".into()));
    };
    let mut description = vec![0; usize::try_from(size).unwrap_or(0) + padding(size)];
    from.read_exact(&mut description)?;
    description.truncate(description.len() - padding(size));
    let value: Value = serde_json::from_slice(&description).map_err(|e| e.to_string())?;
    let Value::Object(mut doc) = value else {
        return Err(Fault::Error("this is no bundle of a VM".into()));
    };
    let (metadata, uuid) = unpack(&mut doc)?;
    let world = session.world().await?;
    if world.others.iter().any(|other| text(other, "uuid") == Some(&uuid)) {
        return Err(Fault::Error(format!("VM with UUID {uuid} already exists")));
    }
    nics::conflicts(&doc, &objects(&doc, "nics"), &world)?;
    doc.insert("receiving".into(), true.into());
    let draft = draft::draft(&doc, &metadata, &world, &session.place.settings)?;
    let created = session.ask(Request::Create { draft: Box::new(draft) }).await?;
    created.map_err(|refusal| refusal.to_string())?;
    if let Err(why) = take_disks(session, &uuid, &mut from).await {
        // Half a machine is none.
        let remove = Request::Remove { target: uuid, force: true };
        let _ = session.ask(remove).await?;
        return Err(why);
    }
    session.say(&format!("Successfully received VM {uuid}"))
}

/// The description without what is kept beside it.
fn unpack(doc: &mut Object) -> Result<(Metadata, String), String> {
    let mut object_of = |name: &str| match doc.remove(name) {
        Some(Value::Object(map)) => map,
        Some(_) | None => Object::new(),
    };
    let metadata = Metadata {
        customer: object_of("customer_metadata"),
        internal: object_of("internal_metadata"),
    };
    if text(doc, "brand").and_then(Brand::of).is_none() {
        return Err("the bundle's VM has a brand that is not known here".into());
    }
    let uuid = text(doc, "uuid").filter(|uuid| super::values::is_uuid(uuid)).map(str::to_owned);
    if objects(doc, "disks").iter().any(|disk| super::values::is_true(disk, "nocreate")) {
        // Whoever made the bundle does not say what of this host a guest gets to see.
        return Err("the bundle's VM uses a device of the host that it comes from".into());
    }
    doc.remove("snapshots");
    Ok((metadata, uuid.ok_or("the bundle's VM has no uuid")?))
}

async fn take_disks(
    session: &mut Session<'_, '_>,
    uuid: &str,
    from: &mut Box<dyn Read>,
) -> Result<(), Fault> {
    let files = document(session, Request::DiskFiles { target: uuid.to_owned() }).await??;
    while let Some((name, size)) = read_header(from)? {
        let file = files.as_array().into_iter().flatten().find(|file| file["name"] == json!(name));
        let file = file.ok_or_else(|| format!("the bundle's disk {name} belongs to no disk"))?;
        let (path, owner) = (file["path"].as_str().unwrap_or(""), file["owner"].as_u64());
        let owner = owner.and_then(|owner| u32::try_from(owner).ok()).unwrap_or(0);
        (session.place.store)(path, owner, &mut from.by_ref().take(size), size)?;
        let mut rest = vec![0; padding(size)];
        from.read_exact(&mut rest)?;
    }
    Ok(())
}

pub(super) async fn install(session: &mut Session<'_, '_>, vm: Vm) -> Done {
    if vm.state() != "receiving" {
        return Err(Fault::Error(format!(
            "Cannot install vm from state \"{}\", must be \"receiving\".",
            vm.state()
        )));
    }
    redefine(session, &vm.uuid, |doc| drop(doc.remove("receiving"))).await?;
    session.say(&format!("Successfully installed VM {}", vm.uuid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_were_written() {
        let mut bytes = header("JSON", 700);
        bytes.extend(header("disk0", 0));
        let mut from: &[u8] = &bytes;
        assert_eq!(read_header(&mut from), Ok(Some(("JSON".into(), 700))));
        assert_eq!(read_header(&mut from), Ok(Some(("disk0".into(), 0))));
        assert_eq!(read_header(&mut from), Ok(None));
        assert_eq!((padding(0), padding(512), padding(700)), (0, 0, 324));
        assert!(read_header(&mut &bytes[..100]).is_err());
        assert!(read_header(&mut &[0; 512][..]).is_err());
    }

    #[test]
    fn a_bundle_says_nothing_about_this_host() {
        let uuid = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";
        let unpacked = |disks: Value| {
            let doc = json!({"brand": "kvm", "uuid": uuid, "disks": disks, "snapshots": [{}]});
            unpack(&mut doc.as_object().cloned().unwrap())
        };
        assert_eq!(unpacked(json!([])).unwrap().1, uuid);
        let theirs = json!([{"path": "/dev/sda", "nocreate": true}]);
        assert!(unpacked(theirs).unwrap_err().contains("a device of the host"));
        let doc = json!({"brand": "lx", "uuid": uuid});
        assert!(unpack(&mut doc.as_object().cloned().unwrap()).is_err());
    }
}
