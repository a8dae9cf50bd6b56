//! Numbers of nodes and what follows from them: roles, names, nets and addresses. Pure.

use std::net::Ipv4Addr;

use super::settings::Settings;

/// What a node is for; its number says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Node,
    Router,
    Tester,
}

/// The host's side of every net.
pub const HOST: u8 = 250;

/// A VM of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    pub id: u8,
    /// In the order of its interfaces.
    pub nets: Vec<u8>,
    /// Of all its interfaces.
    pub mtu: u32,
    /// MiB.
    pub memory: u64,
    pub cpus: u32,
    /// Kernel arguments besides those that all have.
    pub append: Vec<String>,
}

impl Role {
    pub fn of(id: u8) -> Option<Self> {
        match id {
            1..=200 => Some(Role::Node),
            201..=220 => Some(Role::Router),
            221..=240 => Some(Role::Tester),
            _ => None,
        }
    }
}

/// A node's number as people write it.
pub fn id(text: &str) -> Result<u8, String> {
    let id = text.trim_start_matches("vm-").trim_start_matches('0').parse().ok();
    id.filter(|id| Role::of(*id).is_some()).ok_or_else(|| {
        format!("[{text}] is not a VM; nodes are 1-200, routers 201-220, testers 221-240")
    })
}

pub fn hostname(id: u8) -> String {
    format!("vm-{id:03}")
}

pub fn mac(net: u8, id: u8) -> String {
    format!("00:00:00:01:{net:02x}:{id:02x}")
}

pub fn address(net: u8, id: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, net, id)
}

/// All numbers of the cluster, in the order of their start.
pub fn all(settings: &Settings) -> Result<Vec<u8>, String> {
    let mut ids = Vec::new();
    for (name, default, first, most) in
        [("__nvm", 4, 1, 200), ("__nrouters", 2, 201, 20), ("__ntesters", 0, 221, 20)]
    {
        let count = settings.number(name, default)?;
        if count > most {
            let option = name.trim_start_matches('_');
            return Err(format!("--{option}: {count} are too many; {most} are possible"));
        }
        ids.extend((0..count).map(|n| first + n as u8));
    }
    Ok(ids)
}

/// A VM as the settings want it; `words` are more kernel arguments.
pub fn vm(settings: &Settings, id: u8, words: &[String]) -> Result<Vm, String> {
    let own = |name: &str| format!("__{name}{id}");
    let number = |name: &str, default: u64| {
        let common = settings.number(&format!("__{name}"), default)?;
        settings.number(&own(name), common)
    };
    let nets = match Role::of(id) {
        Some(Role::Node) => settings.text("__nets_vm").unwrap_or("0,1"),
        Some(Role::Router) => settings.text("__nets_router").unwrap_or("0,1,2"),
        Some(Role::Tester) => "0,2",
        None => return Err(format!("[{id}] is not a VM")),
    };
    let nets = settings.text(&own("nets")).or(settings.text("__nets")).unwrap_or(nets);
    let nets = nets.split([',', ' ']).filter(|n| !n.is_empty()).map(|n| {
        n.parse().map_err(|_| format!("--nets: {n:?} is not the number of a net (0 to 255)"))
    });
    let nets: Vec<u8> = nets.collect::<Result<_, String>>()?;
    let mut append = Vec::new();
    let mtu = settings.number("__mtu", 1500)?;
    if !(576..=9000).contains(&mtu) {
        return Err(format!("--mtu: {mtu} is out of range; 576 to 9000 is possible"));
    }
    if mtu != 1500 {
        append.extend(nets.iter().map(|net| format!("mtu{net}={mtu}")));
    }
    append.extend(words.iter().cloned());
    for more in [settings.text("__append"), settings.text(&own("append"))].into_iter().flatten() {
        append.push(more.to_owned());
    }
    let cpus = number("smp", 2)? as u32;
    Ok(Vm { id, nets, mtu: mtu as u32, memory: number("mem", 128)?, cpus, append })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn settings(list: &[(&str, &str)]) -> Settings {
        let vars: Vec<(String, String)> =
            list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::new(vars, BTreeMap::new(), Path::new("/xc"), Path::new("/share"))
    }

    #[test]
    fn case_30_numbers_names_and_addresses() {
        let own = settings(&[("__ntesters", "1")]);
        assert_eq!(all(&own).unwrap(), [1, 2, 3, 4, 201, 202, 221]);
        assert_eq!((hostname(7), hostname(201)), ("vm-007".into(), "vm-201".into()));
        assert_eq!(mac(1, 201), "00:00:00:01:01:c9");
        assert_eq!(address(2, 221).to_string(), "192.168.2.221");
        let nets = |id| vm(&own, id, &[]).unwrap().nets;
        assert_eq!((nets(1), nets(201), nets(221)), (vec![0, 1], vec![0, 1, 2], vec![0, 2]));
        assert!(all(&settings(&[("__nvm", "201")])).is_err());
        for text in ["0", "241", "250", "x", "-1", ""] {
            assert!(id(text).is_err(), "{text}");
        }
        assert_eq!((id("1"), id("vm-003")), (Ok(1), Ok(3)));
    }

    #[test]
    fn case_28_each_vm_may_have_its_own() {
        let own = settings(&[
            ("__mem1", "256"),
            ("__smp3", "1"),
            ("__nets2", "0,1,3"),
            ("__append", "quiet"),
            ("__append4", "foo=1"),
        ]);
        let all = |id| vm(&own, id, &[]).unwrap();
        assert_eq!((all(1).memory, all(2).memory), (256, 128));
        assert_eq!((all(3).cpus, all(1).cpus), (1, 2));
        assert_eq!(all(2).nets, [0, 1, 3]);
        assert_eq!(all(4).append, ["quiet", "foo=1"]);
    }

    #[test]
    fn case_29_another_mtu_is_told_for_each_net() {
        let own = settings(&[("__mtu", "1400")]);
        let vm = vm(&own, 1, &["extra".to_owned()]).unwrap();
        assert_eq!(vm.append, ["mtu0=1400", "mtu1=1400", "extra"]);
        assert_eq!(vm.mtu, 1400);
        assert!(super::vm(&settings(&[("__mtu", "9001")]), 1, &[]).is_err());
    }
}
