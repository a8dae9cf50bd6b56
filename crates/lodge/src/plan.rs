//! A plan as text for people: what each hypervisor lacks, then every effect in its order.

use anyhow::Result;
use serde_json::{Value, json};

pub(crate) fn plan_text(value: &Value) -> Result<String> {
    use lodge_host::backend::{Launch, Unsupported};
    let mut text = String::new();
    for (name, backend) in value["backends"].as_object().into_iter().flatten() {
        if backend["can"] == json!(true) {
            text += &format!("{name}: yes\n");
            continue;
        }
        text += &format!("{name}: no\n");
        let lacks: Vec<Unsupported> = serde_json::from_value(backend["lacks"].clone())?;
        for lack in lacks {
            text += &format!("  {lack}\n");
        }
    }
    if value["chosen"].is_null() {
        return Ok(text);
    }
    let launch: Launch = serde_json::from_value(value["chosen"].clone())?;
    for note in &launch.notes {
        text += &format!("  {note}\n");
    }
    text += "make:\n";
    for step in &launch.steps {
        text += &format!("  {step}\n");
    }
    let warden = &launch.warden;
    for tap in &warden.taps {
        let network = tap.network.file_name().unwrap_or_default().to_string_lossy();
        text += &format!(
            "  interface {} on network {network}: {} {}\n",
            tap.interface, tap.mac, tap.address
        );
    }
    for port in &warden.ports {
        text += &format!(
            "  port {}:{} to guest {}/{}\n",
            port.ip, port.host, port.guest, port.protocol
        );
    }
    text += &format!("  control group lodge/{}\n", warden.cgroup.name);
    text += "open:\n";
    for file in &warden.files {
        let rights = if file.writable { "read and write" } else { "read" };
        text += &format!("  {} as {} ({rights})\n", file.path.display(), file.fd);
    }
    for socket in &warden.sockets {
        text += &format!("  socket {} as {}\n", socket.path.display(), socket.fd);
    }
    let jail = &warden.jail;
    text += &format!("jail: user {}, {} files and folders bound\n", jail.uid, jail.binds.len());
    text += &format!("run {}:\n", jail.program.display());
    let mut args = jail.argv.iter().skip(1).peekable();
    while let Some(arg) = args.next() {
        text += &format!("  {arg}");
        if let Some(value) = args.next_if(|next| !next.starts_with('-')) {
            text += &format!(" {value}");
        }
        text += "\n";
    }
    text += "then:\n";
    for call in &launch.calls {
        text += &format!("  {call}\n");
    }
    Ok(text)
}
