//! The network's DHCP server: answers the machines it knows with the addresses that were chosen
//! for them, and nobody else. Pure: a packet in, perhaps a packet out.

use std::net::Ipv4Addr;

use dhcproto::v4::{Decodable, Decoder, DhcpOption, Message, MessageType, Opcode, OptionCode};
use lodge_spec::extras::Lease;
use lodge_spec::names::Mac;

use super::plan::{METADATA, NetPlan, PREFIX, mask};

/// Seconds.
const LEASE: u32 = 86_400;
/// More name servers than these are not told.
const RESOLVERS: usize = 4;

/// A machine's place on the network.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) address: Ipv4Addr,
    /// Prefix and router, where the address is not of the network's own plan.
    pub(super) subnet: Option<(u8, Option<Ipv4Addr>)>,
    /// Bytes, where not 1500.
    pub(super) mtu: Option<u16>,
    pub(super) lease: Lease,
    pub(super) hostname: String,
    /// Name servers of its own choice; the network's where there are none.
    pub(super) resolvers: Vec<Ipv4Addr>,
}

/// What to send, and whether the machine has now taken its address.
pub(super) struct Answer {
    pub(super) packet: Vec<u8>,
    pub(super) taken: Option<Mac>,
    /// From which of our addresses.
    pub(super) server: Ipv4Addr,
}

pub(super) fn answer(
    plan: &NetPlan,
    find: impl Fn(Mac) -> Option<Place>,
    packet: &[u8],
) -> Option<Answer> {
    let request = Message::decode(&mut Decoder::new(packet)).ok()?;
    if request.opcode() != Opcode::BootRequest {
        return None;
    }
    let mac = Mac(request.chaddr().try_into().ok()?);
    let place = find(mac).filter(|place| place.lease != Lease::None)?;
    let kind = request.opts().msg_type()?;
    let reply = match kind {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => match wanted(&request) {
            Some(address) if address != place.address => MessageType::Nak,
            Some(_) | None => MessageType::Ack,
        },
        MessageType::Inform => MessageType::Ack,
        _ => return None,
    };
    let taken = (reply == MessageType::Ack).then_some(mac);
    let packet = compose(plan, &place, &request, reply, kind == MessageType::Inform);
    let server = server(plan, &place);
    Some(Answer { packet, taken, server })
}

/// Who answers: a machine whose address is of another plan is served from where there is no plan.
fn server(plan: &NetPlan, place: &Place) -> Ipv4Addr {
    if place.subnet.is_some() { METADATA } else { plan.gateway() }
}

fn wanted(request: &Message) -> Option<Ipv4Addr> {
    match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
        Some(_) | None => Some(request.ciaddr()).filter(|a| !a.is_unspecified()),
    }
}

/// Options of a reply, in the order in which they are given.
#[derive(Default)]
struct Options(Vec<u8>);

impl Options {
    fn add(&mut self, code: u8, content: &[u8]) {
        let content = &content[..content.len().min(255)];
        self.0.extend([code, content.len() as u8]);
        self.0.extend(content);
    }

    fn add_addresses(&mut self, code: u8, list: &[Ipv4Addr]) {
        if !list.is_empty() {
            self.add(code, &list.iter().flat_map(Ipv4Addr::octets).collect::<Vec<u8>>());
        }
    }
}

/// The packet, written here because guests of some systems count on the options' order.
fn compose(
    plan: &NetPlan,
    place: &Place,
    request: &Message,
    reply: MessageType,
    inform: bool,
) -> Vec<u8> {
    let server = server(plan, place);
    let leases = reply != MessageType::Nak && !inform;
    let yours = if leases { place.address } else { Ipv4Addr::UNSPECIFIED };
    let mut packet = vec![2, 1, 6, 0];
    packet.extend(request.xid().to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(0x8000_u16.to_be_bytes());
    packet.extend(if inform { request.ciaddr() } else { Ipv4Addr::UNSPECIFIED }.octets());
    packet.extend(yours.octets());
    packet.extend(server.octets());
    packet.extend([0; 4]);
    packet.extend(request.chaddr());
    packet.resize(236, 0);
    packet.extend([99, 130, 83, 99]);
    let mut options = Options::default();
    options.add(53, &[u8::from(reply)]);
    options.add(54, &server.octets());
    if reply != MessageType::Nak {
        tell(&mut options, plan, place, inform);
    }
    packet.extend(options.0);
    packet.push(255);
    // Shorter ones are refused by old clients.
    packet.resize(packet.len().max(300), 0);
    packet
}

fn tell(options: &mut Options, plan: &NetPlan, place: &Place, inform: bool) {
    let full = place.lease == Lease::Full;
    let (prefix, router) = place.subnet.unwrap_or((PREFIX, Some(plan.gateway())));
    options.add_addresses(1, &[mask(prefix)]);
    if let Some(router) = router.filter(|_| full) {
        options.add_addresses(3, &[router]);
    }
    if full {
        let own = match (place.resolvers.as_slice(), place.subnet) {
            ([], None) => vec![plan.names()],
            (list, _) => list.iter().copied().take(RESOLVERS).collect(),
        };
        options.add_addresses(6, &own);
    }
    if !inform {
        options.add(51, &LEASE.to_be_bytes());
    }
    if full {
        options.add(12, place.hostname.as_bytes());
    }
    if place.subnet.is_none() {
        options.add(15, b"lodge");
    }
    if let Some(mtu) = place.mtu {
        options.add(26, &mtu.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use dhcproto::v4::{Encodable, Encoder};

    use super::*;

    fn ask(kind: MessageType, mac: [u8; 6], wanted: Option<&str>) -> Option<Message> {
        let plan = NetPlan::of(&"default".parse().unwrap(), std::path::Path::new("/run"));
        let address = "10.0.2.15".parse().unwrap();
        let place = Place {
            address,
            subnet: None,
            mtu: None,
            lease: Lease::Full,
            hostname: "web".into(),
            resolvers: Vec::new(),
        };
        let find = |mac| (mac == Mac([2, 0, 0, 0, 0, 1])).then(|| place.clone());
        let mut request = Message::default();
        request.set_opcode(Opcode::BootRequest).set_xid(77).set_chaddr(&mac);
        request.opts_mut().insert(DhcpOption::MessageType(kind));
        if let Some(address) = wanted {
            let option = DhcpOption::RequestedIpAddress(address.parse().unwrap());
            request.opts_mut().insert(option);
        }
        let mut packet = Vec::new();
        request.encode(&mut Encoder::new(&mut packet)).unwrap();
        let answer = answer(&plan, find, &packet)?;
        Some(Message::decode(&mut Decoder::new(&answer.packet)).unwrap())
    }

    #[test]
    fn known_machines_get_their_address_and_no_other() {
        let mac = [2, 0, 0, 0, 0, 1];
        let offer = ask(MessageType::Discover, mac, None).unwrap();
        assert_eq!(offer.yiaddr().to_string(), "10.0.2.15");
        assert_eq!(offer.opts().msg_type(), Some(MessageType::Offer));
        assert_eq!(offer.xid(), 77);
        let ack = ask(MessageType::Request, mac, Some("10.0.2.15")).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        let nak = ask(MessageType::Request, mac, Some("10.0.2.16")).unwrap();
        assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
        assert!(ask(MessageType::Discover, [2, 0, 0, 0, 0, 2], None).is_none());
    }

    #[test]
    fn case_89_a_foreign_address_is_offered_in_the_expected_order() {
        let plan = NetPlan::of(&"admin".parse().unwrap(), std::path::Path::new("/run"));
        let addresses = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect();
        let mut place = Place {
            address: "10.88.88.51".parse().unwrap(),
            subnet: Some((24, Some("10.88.88.1".parse().unwrap()))),
            mtu: None,
            lease: Lease::Full,
            hostname: "b8ab5fc1-8576-45ef-bb51-9826b52a4651".into(),
            resolvers: addresses(&["208.67.222.222", "208.67.220.220"]),
        };
        let mut request = Message::default();
        request.set_opcode(Opcode::BootRequest).set_chaddr(&[2, 0, 0, 0, 0, 1]);
        request.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        let mut packet = Vec::new();
        request.encode(&mut Encoder::new(&mut packet)).unwrap();
        let codes = |packet: &[u8]| {
            let (mut at, mut list) = (240, Vec::new());
            while packet[at] != 255 {
                list.push(packet[at]);
                at += 2 + usize::from(packet[at + 1]);
            }
            list
        };
        let offer = answer(&plan, |_| Some(place.clone()), &packet).unwrap();
        assert_eq!(offer.server.to_string(), "169.254.169.254");
        assert_eq!(codes(&offer.packet), [53, 54, 1, 3, 6, 51, 12]);
        assert_eq!(offer.packet[16..20], [10, 88, 88, 51]);
        let read = Message::decode(&mut Decoder::new(&offer.packet)).unwrap();
        let option = |code| read.opts().get(code).cloned().unwrap();
        let router = vec!["10.88.88.1".parse().unwrap()];
        assert_eq!(option(OptionCode::Router), DhcpOption::Router(router));
        assert_eq!(option(OptionCode::AddressLeaseTime), DhcpOption::AddressLeaseTime(86_400));
        // Case 67: four of five.
        place.resolvers = addresses(&["0.0.0.1", "0.0.0.2", "0.0.0.3", "0.0.0.4", "0.0.0.5"]);
        let offer = answer(&plan, |_| Some(place.clone()), &packet).unwrap();
        let read = Message::decode(&mut Decoder::new(&offer.packet)).unwrap();
        let told = addresses(&["0.0.0.1", "0.0.0.2", "0.0.0.3", "0.0.0.4"]);
        let names = read.opts().get(OptionCode::DomainNameServer);
        assert_eq!(names, Some(&DhcpOption::DomainNameServer(told)));
        place.lease = Lease::Address;
        let offer = answer(&plan, |_| Some(place.clone()), &packet).unwrap();
        assert_eq!(codes(&offer.packet), [53, 54, 1, 51]);
        place.mtu = Some(9000);
        let offer = answer(&plan, |_| Some(place.clone()), &packet).unwrap();
        assert_eq!(codes(&offer.packet), [53, 54, 1, 51, 26]);
        place.lease = Lease::None;
        assert!(answer(&plan, |_| Some(place.clone()), &packet).is_none());
    }

    proptest::proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet: Vec<u8>) {
            let plan = NetPlan::of(&"default".parse().unwrap(), std::path::Path::new("/run"));
            let _ = answer(&plan, |_| None, &packet);
        }
    }
}
