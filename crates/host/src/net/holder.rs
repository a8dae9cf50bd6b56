//! Who holds a port of the host, for error messages. Looks at `/proc` only after a bind failed.

use std::fs;

use lodge_spec::machine::Protocol;

/// A phrase such as `nginx (process 412)`.
pub fn of(port: u16, protocol: Protocol) -> String {
    find(port, protocol).unwrap_or_else(|| "another process".to_owned())
}

fn find(port: u16, protocol: Protocol) -> Option<String> {
    let inodes = socket_inodes(port, protocol);
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else { continue };
        let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        let holds = links.into_iter().any(|link| {
            let link = link.to_string_lossy();
            inodes.iter().any(|inode| link == format!("socket:[{inode}]"))
        });
        if holds {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (process {pid})", name.trim()));
        }
    }
    None
}

/// The inodes of sockets that listen on the port.
fn socket_inodes(port: u16, protocol: Protocol) -> Vec<String> {
    const LISTEN: &str = "0A";
    let mut list = Vec::new();
    for table in [format!("/proc/net/{protocol}"), format!("/proc/net/{protocol}6")] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, ..] = fields.as_slice() else { continue };
            let same = local.ends_with(&format!(":{port:04X}"));
            let bound = protocol == Protocol::Udp || *state == LISTEN;
            if same
                && bound
                && let Some(inode) = fields.get(9)
            {
                list.push((*inode).to_owned());
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = format!("(process {})", std::process::id());
        assert!(of(port, Protocol::Tcp).ends_with(&own), "{}", of(port, Protocol::Tcp));
        drop(listener);
        assert_eq!(of(port, Protocol::Tcp), "another process");
    }
}
