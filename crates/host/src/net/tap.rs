//! Tap interfaces: made, put on the bridge, up. Works in the namespace of its caller.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use lodge_spec::state::Traffic;

const SIOCSIFFLAGS: libc::c_ulong = 0x8914;
const SIOCSIFMTU: libc::c_ulong = 0x8922;
const SIOCGIFINDEX: libc::c_ulong = 0x8933;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: i32 = 0x2;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;
/// The header of virtio 1.0, with the count of merged buffers.
const VNET_HEADER: i32 = 12;

pub(super) fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all bytes zero is a valid `ifreq`: a name and plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

pub(super) fn ioctl(fd: i32, code: libc::c_ulong, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: every caller passes the structure that its code takes, alive through the call.
    match unsafe { libc::ioctl(fd, code, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What a tap has carried, from the kernel's table of interfaces. What the host's end received
/// is what the guest sent.
pub(crate) fn traffic(table: &str, name: &str) -> Traffic {
    let line = table.lines().find_map(|l| l.trim_start().strip_prefix(name)?.strip_prefix(':'));
    let numbers: Vec<u64> =
        line.unwrap_or("").split_whitespace().map_while(|n| n.parse().ok()).collect();
    match numbers.as_slice() {
        [received, packets_received, _, _, _, _, _, _, sent, packets_sent, ..] => Traffic {
            in_bytes: *sent,
            out_bytes: *received,
            in_operations: *packets_sent,
            out_operations: *packets_received,
        },
        _ => Traffic::default(),
    }
}

/// A new tap that a user may open by its name. It stays until `remove`.
pub(crate) fn make_for(
    name: &str,
    bridge: Option<&str>,
    mtu: Option<u16>,
    user: u32,
) -> io::Result<()> {
    let tap = make(name, bridge, mtu)?;
    let value = |n: u32| n as usize as *mut libc::c_void;
    ioctl(tap.as_raw_fd(), TUNSETOWNER, value(user))?;
    ioctl(tap.as_raw_fd(), TUNSETPERSIST, value(1))
}

/// Takes a tap of `make_for` away; it goes with the last descriptor.
pub(crate) fn remove(name: &str) -> io::Result<()> {
    let tun = open(name)?;
    ioctl(tun.as_raw_fd(), TUNSETPERSIST, std::ptr::null_mut())
}

fn open(name: &str) -> io::Result<File> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut wanted = request(name)?;
    wanted.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as i16;
    ioctl(tun.as_raw_fd(), TUNSETIFF, (&raw mut wanted).cast())?;
    Ok(tun)
}

/// A new tap, on a bridge or on none. It goes when the last copy of the descriptor closes.
pub(crate) fn make(name: &str, bridge: Option<&str>, mtu: Option<u16>) -> io::Result<OwnedFd> {
    let tun = open(name)?;
    let mut header = VNET_HEADER;
    ioctl(tun.as_raw_fd(), TUNSETVNETHDRSZ, (&raw mut header).cast())?;
    // Any socket serves to talk to the interfaces of this namespace.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let socket = socket.as_raw_fd();
    if let Some(mtu) = mtu {
        let mut size = request(name)?;
        size.ifr_ifru.ifru_mtu = i32::from(mtu);
        ioctl(socket, SIOCSIFMTU, (&raw mut size).cast())?;
    }
    if let Some(bridge) = bridge {
        let mut index = request(name)?;
        ioctl(socket, SIOCGIFINDEX, (&raw mut index).cast())?;
        // SAFETY: the call above has just filled this member.
        let number = unsafe { index.ifr_ifru.ifru_ifindex };
        let mut bridge = request(bridge)?;
        bridge.ifr_ifru.ifru_ifindex = number;
        ioctl(socket, SIOCBRADDIF, (&raw mut bridge).cast())?;
    }
    let mut up = request(name)?;
    up.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    ioctl(socket, SIOCSIFFLAGS, (&raw mut up).cast())?;
    Ok(tun.into())
}
