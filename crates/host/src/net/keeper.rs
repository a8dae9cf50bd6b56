//! The network keeper (`lodge netd`): one process per network that lives in its namespace, makes
//! taps, answers DHCP and names, and hands out sockets. Like a warden it outlives the daemon.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use lodge_spec::machine::{Protocol, Segment};
use lodge_spec::names::{Mac, NetName};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};

use super::client::{self, NetAsk, Notice};
use super::dhcp::{self, Place};
use super::gateways::Gateways;
use super::names::{World, enter};
use super::plan::{BRIDGE, METADATA, NetPlan, SCRIPT};
use super::segments::{self, Segments};
use super::wires::{self, Wires};
use super::{dns, guard, names, setup, tap};
use crate::backend::Tap;
use crate::fdpass::{self, Lines};

/// A network without machines ends after this.
const IDLE: Duration = Duration::from_secs(600);
/// A machine that starts again waits so long for its old self to be gone.
const HANDOVER: Duration = Duration::from_secs(3);

struct Member {
    place: Place,
    notices: mpsc::UnboundedSender<(Notice, Option<OwnedFd>)>,
}

struct Network {
    plan: NetPlan,
    members: RefCell<HashMap<Mac, Member>>,
    /// Something has attached or left.
    changed: Notify,
    /// Something has left.
    left: Notify,
    /// Asked to end as soon as nobody is attached.
    leaving: Cell<bool>,
    /// Routers that machines count on and that are not of the plan.
    gateways: RefCell<Gateways>,
    segments: Segments,
    wires: Wires,
    /// Asked to stay although nobody is attached.
    held: Cell<bool>,
    world: Rc<World>,
}

impl Network {
    fn holds(&self, mac: Mac, address: Ipv4Addr) -> bool {
        let members = self.members.borrow();
        // What is wired to a link of the host has none of ours.
        let same = |m: &Member| m.place.address == address && !address.is_unspecified();
        members.contains_key(&mac) || members.values().any(same)
    }
}

/// The program `lodge netd DIR NAME`. Says `ready` or an error on standard output.
pub fn main(dir: &Path, name: &str) -> std::process::ExitCode {
    let result = name.parse::<NetName>().map_err(|e| e.to_string());
    let result = result.and_then(|name| run(dir.to_owned(), NetPlan::of(&name, dir)));
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stdout(), "{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(dir: PathBuf, plan: NetPlan) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    rustix::process::setsid().map_err(|e| e.to_string())?;
    let rootless = !rustix::process::geteuid().is_root();
    let host_pid = rustix::process::getppid().map(|p| p.as_raw_nonzero().get() as u32);
    // Made in the host's namespace, where its resolvers can be reached whatever they are.
    let outside = std::net::UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    let host = std::fs::File::open("/proc/self/ns/net").map_err(text)?;
    setup::enter_namespace(rootless).map_err(|e| e.to_string())?;
    let own = std::fs::File::open("/proc/self/ns/net").map_err(text)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(text)?;
    let local = tokio::task::LocalSet::new();
    let setup = async {
        setup::inside(&plan, host_pid.filter(|_| !rootless)).await?;
        if !rootless {
            enter(&host);
            let done = setup::host_side(&plan).await;
            enter(&own);
            done?;
        }
        Ok::<_, setup::SetupError>(())
    };
    let done = local.block_on(&runtime, setup).map_err(|e| e.to_string());
    let resolvers = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let resolvers = dns::upstream(&resolvers);
    let namespaces = (!rootless).then_some((host, own));
    let world = Rc::new(World { namespaces, resolvers });
    let serving = serve(&dir, plan.clone(), world.clone(), outside);
    let served = done.and_then(|()| local.block_on(&runtime, serving));
    if let Some((host, _)) = &world.namespaces {
        enter(host);
        local.block_on(&runtime, setup::forget_host_side(&plan));
    }
    let _ = std::fs::remove_file(client::socket(&dir));
    served
}

async fn serve(
    dir: &Path,
    plan: NetPlan,
    world: Rc<World>,
    outside: std::net::UdpSocket,
) -> Result<(), String> {
    let text = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    let path = client::socket(dir);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(text("listening"))?;
    let (any, from_metadata) = (dhcp_socket(Ipv4Addr::UNSPECIFIED), dhcp_socket(METADATA));
    let dhcp = (any.map_err(text("DHCP"))?, from_metadata.map_err(text("DHCP"))?);
    let udp = UdpSocket::bind((plan.names(), 53)).await.map_err(text("names"))?;
    let streams = TcpListener::bind((plan.names(), 53)).await.map_err(text("names"))?;
    let visitors = TcpListener::bind((SCRIPT, 80)).await.map_err(text("first-boot scripts"))?;
    outside.set_nonblocking(true).map_err(text("names"))?;
    let outside = UdpSocket::from_std(outside).map_err(text("names"))?;
    let network = Rc::new(Network {
        plan,
        members: RefCell::default(),
        changed: Notify::new(),
        left: Notify::new(),
        leaving: Cell::new(false),
        gateways: RefCell::default(),
        segments: Segments::default(),
        wires: Wires::default(),
        held: Cell::new(false),
        world: world.clone(),
    });
    tokio::task::spawn_local(serve_dhcp(network.clone(), dhcp));
    tokio::task::spawn_local(show_in(network.clone(), visitors));
    let find = finder(&network);
    tokio::task::spawn_local(names::serve_tcp(world.clone(), find.clone(), streams));
    tokio::task::spawn_local(names::serve_udp(world, find, udp, outside));
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "ready");
    let _ = stdout.flush();
    loop {
        let idle = network.members.borrow().is_empty();
        if idle && network.leaving.get() {
            return Ok(());
        }
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.map_err(text("listening"))?;
                tokio::task::spawn_local(converse(network.clone(), stream));
            }
            () = network.changed.notified() => {}
            () = tokio::time::sleep(IDLE), if idle && !network.held.get() => return Ok(()),
        }
    }
}

async fn converse(network: Rc<Network>, stream: UnixStream) {
    let mut lines = Lines::default();
    while let Ok(Some((ask, _))) = lines.next::<NetAsk>(&stream).await {
        match ask {
            NetAsk::Attach { tap } => return attached(network, stream, *tap).await,
            NetAsk::Guard { tap } => {
                let notice = match guard::set(&tap).await {
                    Ok(()) => Notice::Guarded,
                    Err(e) => Notice::Refused { why: e.to_string() },
                };
                if fdpass::send(&stream, &notice, None).await.is_err() {
                    return;
                }
            }
            NetAsk::Dial { address, protocol } => {
                let dialled = dial(address, protocol).await;
                let notice = match &dialled {
                    Ok(_) => Notice::Dialled,
                    Err(e) => Notice::Refused { why: e.to_string() },
                };
                let fd = dialled.as_ref().ok().map(AsFd::as_fd);
                if fdpass::send(&stream, &notice, fd).await.is_err() {
                    return;
                }
            }
            NetAsk::Count { interface } => {
                let table = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
                let traffic = tap::traffic(&table, &interface);
                if fdpass::send(&stream, &Notice::Counted { traffic }, None).await.is_err() {
                    return;
                }
            }
            NetAsk::Hold { stay } => {
                network.held.set(stay);
                network.changed.notify_one();
                if fdpass::send(&stream, &Notice::Done, None).await.is_err() {
                    return;
                }
            }
            NetAsk::Segment { segment, gateway } => {
                let notice = match ensure_segment(&network, segment, gateway).await {
                    Ok(()) => Notice::Done,
                    Err(why) => Notice::Refused { why },
                };
                if fdpass::send(&stream, &notice, None).await.is_err() {
                    return;
                }
            }
            NetAsk::Leave => {
                network.leaving.set(!network.held.get());
                network.changed.notify_one();
            }
        }
    }
}

/// A machine's interface, for as long as its warden holds the connection.
async fn attached(network: Rc<Network>, stream: UnixStream, tap: Tap) {
    let refuse = async |why: String| {
        let _ = fdpass::send(&stream, &Notice::Refused { why }, None).await;
    };
    // Whoever had this place may be just about to leave it.
    let free = async {
        while network.holds(tap.mac, tap.address) {
            network.left.notified().await;
        }
    };
    if tokio::time::timeout(HANDOVER, free).await.is_err() {
        return refuse(format!("{} or {} is already on the network", tap.mac, tap.address)).await;
    }
    let wired = match &tap.wire {
        None => None,
        Some(wire) => {
            match network.wires.take(wire, tap.mac, &network.plan, &network.world).await {
                Ok(place) => Some((wire, place)),
                Err(why) => return refuse(format!("{wire}: {why}")).await,
            }
        }
    };
    match bring_in(&network, &tap, wired.as_ref().map(|(_, place)| place)).await {
        Ok(fd) => stay(&network, &stream, &tap, fd).await,
        Err(why) => refuse(why).await,
    }
    if let Some((wire, place)) = wired {
        network.wires.give_back(wire, &place).await;
    }
}

/// Makes a machine's interface where it belongs.
async fn bring_in(
    network: &Rc<Network>,
    tap: &Tap,
    wired: Option<&wires::Place>,
) -> Result<OwnedFd, String> {
    let Tap { interface, subnet, segment, mtu, opened_by, .. } = tap;
    let at = |error: &dyn std::fmt::Display| format!("interface {interface}: {error}");
    let bridge = match (wired, segment) {
        (Some(wires::Place::Bridge(bridge)), _) => Some(bridge.clone()),
        (Some(wires::Place::Own(_)), _) => None,
        (None, Some(segment)) => {
            let gateway = subnet.and_then(|(prefix, gateway)| Some((gateway?, prefix)));
            let ensured = ensure_segment(network, *segment, gateway).await;
            ensured.map_err(|why| format!("segment {}: {why}", segment.number))?;
            Some(segments::bridge(segment.number))
        }
        (None, None) => Some(BRIDGE.to_owned()),
    };
    let made = match *opened_by {
        None => tap::make(interface, bridge.as_deref(), *mtu),
        Some(user) => tap::make_for(interface, bridge.as_deref(), *mtu, user)
            .and_then(|()| std::fs::File::open("/proc/self/ns/net").map(OwnedFd::from)),
    };
    let fd = made.map_err(|e| at(&e))?;
    let joined = match wired {
        Some(wires::Place::Own(port)) => wires::splice(interface, port).await,
        Some(wires::Place::Bridge(_)) | None => Ok(()),
    };
    let set = match (joined, &tap.guard) {
        (Ok(()), Some(_)) => guard::set(tap).await.map_err(|e| e.to_string()),
        (joined, _) => joined,
    };
    if let Err(why) = set {
        if opened_by.is_some() {
            let _ = tap::remove(interface);
        }
        return Err(at(&why));
    }
    Ok(fd)
}

/// Keeps an interface on the network until its warden lets go of it.
async fn stay(network: &Rc<Network>, stream: &UnixStream, tap: &Tap, fd: OwnedFd) {
    let Tap { interface, mac, address, subnet, segment, mtu, lease, opened_by, .. } = tap;
    let (mac, hostname, resolvers) = (*mac, tap.hostname.clone(), tap.resolvers.clone());
    let (address, subnet, mtu, lease) = (*address, *subnet, *mtu, *lease);
    let place = Place { address, subnet, mtu, lease, hostname, resolvers };
    // Where no machine is the router itself.
    let gateway = subnet.and_then(|(prefix, gateway)| Some((gateway?, prefix)));
    let common = |gateway: &(Ipv4Addr, u8)| segment.is_none() && !network.holds(mac, gateway.0);
    let gateway = gateway.filter(common);
    if let Some((gateway, prefix)) = gateway {
        network.gateways.borrow_mut().take(gateway, prefix);
    }
    let (notices, mut heard) = mpsc::unbounded_channel();
    network.members.borrow_mut().insert(mac, Member { place, notices });
    network.changed.notify_one();
    let sent = fdpass::send(stream, &Notice::Attached, Some(fd.as_fd())).await;
    drop(fd);
    if sent.is_ok() {
        notify(stream, &mut heard).await;
    }
    if opened_by.is_some() {
        // It outlives whoever opened it; nobody else takes it away.
        let _ = tap::remove(interface);
    }
    if tap.guard.is_some() {
        guard::forget(interface).await;
    }
    if let Some((gateway, _)) = gateway {
        network.gateways.borrow_mut().give_back(gateway);
    }
    network.members.borrow_mut().remove(&mac);
    network.changed.notify_one();
    network.left.notify_waiters();
}

/// Tells a warden what concerns its interface, until it is gone.
async fn notify(
    stream: &UnixStream,
    heard: &mut mpsc::UnboundedReceiver<(Notice, Option<OwnedFd>)>,
) {
    let mut lines = Lines::default();
    loop {
        tokio::select! {
            notice = heard.recv() => match notice {
                Some((notice, fd)) => {
                    let fd = fd.as_ref().map(AsFd::as_fd);
                    if fdpass::send(stream, &notice, fd).await.is_err() { return }
                }
                None => return,
            },
            // Nothing more is asked on this connection; its end is the interface's.
            asked = lines.next::<NetAsk>(stream) => if !matches!(asked, Ok(Some(_))) { return },
        }
    }
}

/// Leads guests that ask for the script of their first boot to their own wardens: who asks is told
/// by the address that it asks from.
async fn show_in(network: Rc<Network>, visitors: TcpListener) {
    loop {
        let Ok((stream, from)) = visitors.accept().await else {
            // Only where descriptors have run out.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let own = |m: &&Member| IpAddr::V4(m.place.address) == from.ip();
        let member = network.members.borrow().values().find(own).map(|m| m.notices.clone());
        let Some(notices) = member else {
            let answer = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.try_write(answer);
            continue;
        };
        if let Ok(fd) = stream.into_std().map(OwnedFd::from) {
            let _ = notices.send((Notice::Visitor, Some(fd)));
        }
    }
}

/// By what name a member is found: the address of its first segment.
fn finder(network: &Rc<Network>) -> names::Find {
    let network = network.clone();
    Rc::new(move |name: &str| {
        let members = network.members.borrow();
        let named = members.values().filter(|m| m.place.hostname.eq_ignore_ascii_case(name));
        named.map(|m| m.place.address).filter(|a| !a.is_unspecified()).min()
    })
}

async fn ensure_segment(
    network: &Rc<Network>,
    segment: Segment,
    gateway: Option<(Ipv4Addr, u8)>,
) -> Result<(), String> {
    let servers = network.segments.ensure(segment, gateway).await.map_err(|e| e.to_string())?;
    for address in servers {
        let (world, find) = (network.world.clone(), finder(network));
        // Without names a net is still a net.
        if let Ok(listener) = TcpListener::bind(address).await {
            tokio::task::spawn_local(names::serve_tcp(world.clone(), find.clone(), listener));
        }
        if let (Ok(inside), Ok(outside)) = (UdpSocket::bind(address).await, world.udp_socket()) {
            tokio::task::spawn_local(names::serve_udp(world, find, inside, outside));
        }
    }
    Ok(())
}

async fn dial(address: SocketAddr, protocol: Protocol) -> std::io::Result<OwnedFd> {
    match protocol {
        Protocol::Tcp => Ok(TcpStream::connect(address).await?.into_std()?.into()),
        Protocol::Udp => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
            socket.connect(address).await?;
            Ok(socket.into_std()?.into())
        }
    }
}

/// A socket for DHCP that answers from an address.
fn dhcp_socket(address: Ipv4Addr) -> std::io::Result<UdpSocket> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &std::net::SocketAddrV4::new(address, 67))?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.set_broadcast(true)?;
    socket.bind_device(Some(BRIDGE.as_bytes()))?;
    Ok(socket)
}

/// Hears on both sockets; answers from the one whose address the guest is told.
async fn serve_dhcp(network: Rc<Network>, (any, from_metadata): (UdpSocket, UdpSocket)) {
    let (mut first, mut second) = ([0; 1500], [0; 1500]);
    loop {
        let (heard, from) = tokio::select! {
            heard = any.recv_from(&mut first) => match heard {
                Ok((count, from)) => (&first[..count], from),
                Err(_) => continue,
            },
            heard = from_metadata.recv_from(&mut second) => match heard {
                Ok((count, from)) => (&second[..count], from),
                Err(_) => continue,
            },
        };
        let find = |mac: Mac| network.members.borrow().get(&mac).map(|m| m.place.clone());
        let Some(answer) = dhcp::answer(&network.plan, find, heard) else { continue };
        let own = answer.server == METADATA;
        let to = match from.ip() {
            IpAddr::V4(ip) if own && !ip.is_unspecified() => ip,
            IpAddr::V4(_) | IpAddr::V6(_) => Ipv4Addr::BROADCAST,
        };
        let socket = if own { &from_metadata } else { &any };
        let _ = socket.send_to(&answer.packet, (to, 68)).await;
        if let Some(member) = answer.taken.as_ref().and_then(|m| {
            network.members.borrow().get(m).map(|m| (m.notices.clone(), m.place.address))
        }) {
            let (notices, address) = member;
            let _ = notices.send((Notice::Leased { address }, None));
        }
    }
}
