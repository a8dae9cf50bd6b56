//! Router addresses that machines bring with them: given to the bridge while somebody counts on
//! them. Works in the namespace of its caller.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use super::plan::{BRIDGE, mask};
use super::tap::{ioctl, request};

const SIOCSIFADDR: libc::c_ulong = 0x8916;
const SIOCSIFNETMASK: libc::c_ulong = 0x891c;

/// Each with its label on the bridge and how many count on it.
#[derive(Default)]
pub(super) struct Gateways(BTreeMap<Ipv4Addr, (u32, usize)>);

impl Gateways {
    pub(super) fn take(&mut self, gateway: Ipv4Addr, prefix: u8) {
        if let Some((_, users)) = self.0.get_mut(&gateway) {
            *users += 1;
            return;
        }
        let label = (1..).find(|n| self.0.values().all(|(label, _)| label != n)).unwrap_or(1);
        // One that cannot be taken is missed by those who route, and by nobody else.
        if assign(label, gateway, Some(prefix)).is_ok() {
            self.0.insert(gateway, (label, 1));
        }
    }

    pub(super) fn give_back(&mut self, gateway: Ipv4Addr) {
        let Some((label, users)) = self.0.get_mut(&gateway) else { return };
        *users -= 1;
        if *users == 0 {
            let _ = assign(*label, Ipv4Addr::UNSPECIFIED, None);
            self.0.remove(&gateway);
        }
    }
}

/// Gives an address to a label of the bridge; the unspecified one takes the label away.
fn assign(label: u32, address: Ipv4Addr, prefix: Option<u8>) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let name = format!("{BRIDGE}:{label}");
    let set = |code, address: Ipv4Addr| {
        let mut wanted = request(&name)?;
        // SAFETY: all bytes zero is a valid `sockaddr_in`, and it is as large as the member.
        let mut sockaddr: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        sockaddr.sin_family = libc::AF_INET as libc::sa_family_t;
        sockaddr.sin_addr.s_addr = u32::from(address).to_be();
        // SAFETY: both are socket addresses of 16 bytes of plain numbers.
        wanted.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(sockaddr) };
        ioctl(socket.as_raw_fd(), code, (&raw mut wanted).cast())
    };
    set(SIOCSIFADDR, address)?;
    match prefix {
        Some(prefix) => set(SIOCSIFNETMASK, mask(prefix)),
        None => Ok(()),
    }
}
