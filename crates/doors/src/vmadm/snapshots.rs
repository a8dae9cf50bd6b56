//! Snapshots and reprovisioning: of the brand that has them.

use lodge_spec::request::{Request, SnapshotVerb};
use serde_json::{Value, json};

use super::grammar::{BootWords, Source};
use super::one::{Vm, document, find, is_wanted, redefine, start};
use super::properties::Brand;
use super::run::{Done, Fault, Session};
use super::values::{Object, is_true, objects, text};
use super::view::timestamp;

fn allowed(vm: &Vm, name: &str) -> Result<(), Fault> {
    if vm.brand == Brand::Kvm {
        return Err(Fault::Error("snapshots for kvm VMs currently unsupported".into()));
    }
    let letters = |b: u8| b.is_ascii_alphanumeric() || b"-_.:%".contains(&b);
    if !(1..=64).contains(&name.len()) || !name.bytes().all(letters) || name.starts_with('.') {
        return Err(Fault::Error("Invalid snapshot name".into()));
    }
    Ok(())
}

fn position(vm: &Vm, name: &str) -> Result<usize, Fault> {
    let list = objects(&vm.doc, "snapshots");
    let at = list.iter().position(|snapshot| text(snapshot, "name") == Some(name));
    at.ok_or_else(|| Fault::Error(format!("No snapshot named \"{name}\" for {}", vm.uuid)))
}

async fn act(
    session: &mut Session<'_, '_>,
    vm: &Vm,
    name: &str,
    verb: SnapshotVerb,
) -> Result<Value, Fault> {
    let (target, name) = (vm.uuid.clone(), name.to_owned());
    Ok(document(session, Request::Snapshot { target, name, verb }).await??)
}

pub(super) async fn create(session: &mut Session<'_, '_>, vm: Vm, name: &str) -> Done {
    allowed(&vm, name)?;
    if position(&vm, name).is_ok() {
        return Err(Fault::Error(format!("snapshot with name \"{name}\" already exists.")));
    }
    let made = act(session, &vm, name, SnapshotVerb::Take).await?;
    let size = made["bytes"].as_u64().unwrap_or(0).div_ceil(1 << 20);
    let created_at = timestamp(made["at_us"].as_i64().unwrap_or(0));
    let entry = json!({"name": name, "size": size, "created_at": created_at});
    // The newest comes first.
    redefine(session, &vm.uuid, |doc| {
        let mut list = objects(doc, "snapshots");
        list.insert(0, entry.as_object().cloned().unwrap_or_default());
        doc.insert("snapshots".into(), json!(list));
    })
    .await?;
    session.say(&format!("Created snapshot {name} for VM {}", vm.uuid))
}

pub(super) async fn delete(session: &mut Session<'_, '_>, vm: Vm, name: &str) -> Done {
    allowed(&vm, name)?;
    position(&vm, name)?;
    act(session, &vm, name, SnapshotVerb::Drop).await?;
    forget(session, &vm.uuid, &[name.to_owned()]).await?;
    session.say(&format!("Deleted snapshot {name} for VM {}", vm.uuid))
}

async fn forget(session: &mut Session<'_, '_>, uuid: &str, names: &[String]) -> Result<(), Fault> {
    redefine(session, uuid, |doc| {
        let mut list = objects(doc, "snapshots");
        list.retain(|s| !names.iter().any(|name| text(s, "name") == Some(name)));
        doc.insert("snapshots".into(), json!(list));
    })
    .await
}

/// Ends the machine by force, takes its disks back to the snapshot, forgets newer ones, starts.
pub(super) async fn rollback(session: &mut Session<'_, '_>, vm: Vm, name: &str) -> Done {
    allowed(&vm, name)?;
    let at = position(&vm, name)?;
    let stop = Request::Stop { target: vm.uuid.clone(), force: true, timeout_ms: 0 };
    session.ask(stop).await?.map_err(|refusal| refusal.to_string())?;
    act(session, &vm, name, SnapshotVerb::Restore).await?;
    let list = objects(&vm.doc, "snapshots");
    let newer: Vec<String> =
        list[..at].iter().filter_map(|s| text(s, "name").map(str::to_owned)).collect();
    for name in &newer {
        act(session, &vm, name, SnapshotVerb::Drop).await?;
    }
    forget(session, &vm.uuid, &newer).await?;
    start(session, &vm.uuid, &BootWords::default()).await?;
    session.say(&format!("Rolled back snapshot {name} for VM {}", vm.uuid))
}

/// Puts a new image in the place of the first disk.
pub(super) async fn reprovision(session: &mut Session<'_, '_>, vm: Vm, source: &Source) -> Done {
    let uuid = vm.uuid.clone();
    let failed = |why: String| Fault::Error(format!("Failed to reprovision VM {uuid}: {why}"));
    if vm.brand == Brand::Kvm {
        return Err(failed("brand \"kvm\" does not yet support reprovision".into()));
    }
    let payload = session.read(source, "take payload from")?;
    let image = text(&payload, "image_uuid").map(str::to_owned);
    let image = image.ok_or_else(|| failed("payload is missing image_uuid".into()))?;
    if is_true(&vm.doc, "indestructible_zoneroot") {
        return Err(failed("indestructible_zoneroot is set, cannot reprovision".into()));
    }
    let images = session.images().await?;
    let known = images.get(&image).ok_or_else(|| failed(format!("there is no image {image}")))?;
    let size = known.size;
    let first = objects(&vm.doc, "disks").into_iter().next().filter(|disk| is_true(disk, "boot"));
    let mut first = first.ok_or_else(|| failed("the first disk is not a boot disk".into()))?;
    let wanted = is_wanted(&vm);
    let stop = Request::Stop { target: uuid.clone(), force: true, timeout_ms: 0 };
    session.ask(stop).await?.map_err(|refusal| failed(refusal.to_string()))?;
    let path = text(&first, "path").map(str::to_owned);
    // Without the disk its bytes go; with it again it is made anew from the image.
    redefine(session, &uuid, |doc| {
        let mut list = objects(doc, "disks");
        list.retain(|disk| text(disk, "path") != path.as_deref());
        doc.insert("disks".into(), json!(list));
    })
    .await?;
    first.insert("image_uuid".into(), image.into());
    first.insert("image_size".into(), size.into());
    let larger = super::values::number(&first, "size").unwrap_or(0).max(size);
    first.insert("size".into(), larger.into());
    redefine(session, &uuid, |doc: &mut Object| {
        let mut list = objects(doc, "disks");
        if list.iter().all(|disk| text(disk, "path") != path.as_deref()) {
            list.insert(0, first.clone());
        }
        doc.insert("disks".into(), json!(list));
    })
    .await?;
    if wanted {
        start(session, &uuid, &BootWords::default()).await?;
    }
    find(session, &uuid, |uuid| format!("VM {uuid} not found")).await?;
    session.say(&format!("Successfully reprovisioned VM {uuid}"))
}
