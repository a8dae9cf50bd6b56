//! The network's DHCP server: answers the machines it knows with the addresses that were chosen
//! for them, and nobody else. Pure: a packet in, perhaps a packet out.

use std::net::Ipv4Addr;

use dhcproto::v4::{
    Decodable, Decoder, DhcpOption, Encodable, Encoder, Flags, Message, MessageType, Opcode,
    OptionCode,
};
use lodge_spec::names::Mac;

use super::plan::NetPlan;

/// Seconds.
const LEASE: u32 = 86_400;

/// A machine's place on the network.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) address: Ipv4Addr,
    pub(super) hostname: String,
    /// Name servers of its own choice; the network's where there are none.
    pub(super) resolvers: Vec<Ipv4Addr>,
}

/// What to send, and whether the machine has now taken its address.
pub(super) struct Answer {
    pub(super) packet: Vec<u8>,
    pub(super) taken: Option<Mac>,
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
    let place = find(mac)?;
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
    let message = compose(plan, &place, &request, reply, kind == MessageType::Inform);
    let mut packet = Vec::new();
    message.encode(&mut Encoder::new(&mut packet)).ok()?;
    Some(Answer { packet, taken })
}

fn wanted(request: &Message) -> Option<Ipv4Addr> {
    match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
        Some(_) | None => Some(request.ciaddr()).filter(|a| !a.is_unspecified()),
    }
}

fn compose(
    plan: &NetPlan,
    place: &Place,
    request: &Message,
    reply: MessageType,
    inform: bool,
) -> Message {
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootReply)
        .set_xid(request.xid())
        .set_flags(Flags::default().set_broadcast())
        .set_chaddr(request.chaddr())
        .set_siaddr(plan.gateway());
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(reply));
    options.insert(DhcpOption::ServerIdentifier(plan.gateway()));
    if reply == MessageType::Nak {
        return message;
    }
    options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)));
    options.insert(DhcpOption::Router(vec![plan.gateway()]));
    let resolvers = match place.resolvers.as_slice() {
        [] => vec![plan.names()],
        own => own.to_vec(),
    };
    options.insert(DhcpOption::DomainNameServer(resolvers));
    options.insert(DhcpOption::DomainName("lodge".into()));
    options.insert(DhcpOption::Hostname(place.hostname.clone()));
    if !inform {
        options.insert(DhcpOption::AddressLeaseTime(LEASE));
        message.set_yiaddr(place.address);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(kind: MessageType, mac: [u8; 6], wanted: Option<&str>) -> Option<Message> {
        let plan = NetPlan::of(&"default".parse().unwrap(), std::path::Path::new("/run"));
        let address = "10.0.2.15".parse().unwrap();
        let place = Place { address, hostname: "web".into(), resolvers: Vec::new() };
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

    proptest::proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet: Vec<u8>) {
            let plan = NetPlan::of(&"default".parse().unwrap(), std::path::Path::new("/run"));
            let _ = answer(&plan, |_| None, &packet);
        }
    }
}
