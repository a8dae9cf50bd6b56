//! The network's name server: knows the machines on it, passes the rest to the host's resolver.
//! Pure: a query in, an answer out or the word that it must be passed on.

use std::net::{Ipv4Addr, SocketAddr};

use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};

/// Seconds; neighbours come and go.
const TTL: u32 = 5;
const DOMAIN: &str = "lodge";

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Answer(Vec<u8>),
    PassOn,
    Ignore,
}

pub(super) fn judge(packet: &[u8], find: impl Fn(&str) -> Option<Ipv4Addr>) -> Verdict {
    let Ok(query) = Packet::parse(packet) else { return Verdict::Ignore };
    let [question] = query.questions.as_slice() else { return Verdict::Ignore };
    if query.has_flags(PacketFlag::RESPONSE) {
        return Verdict::Ignore;
    }
    let name = question.qname.to_string().to_ascii_lowercase();
    let label = match name.split_once('.') {
        None => name.as_str(),
        Some((label, DOMAIN)) => label,
        Some(_) => return Verdict::PassOn,
    };
    let mut reply = query.clone().into_reply();
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER | PacketFlag::RECURSION_AVAILABLE);
    match find(label) {
        Some(address) => {
            if matches!(question.qtype, QTYPE::TYPE(TYPE::A) | QTYPE::ANY) {
                let data = RData::A(A { address: address.into() });
                let record = ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, data);
                reply.answers.push(record);
            }
        }
        // A single label or our own domain is never the world's business.
        None => *reply.rcode_mut() = RCODE::NameError,
    }
    reply.questions = vec![question.clone()];
    reply.build_bytes_vec().map_or(Verdict::Ignore, Verdict::Answer)
}

/// The host's resolvers.
pub(super) fn upstream(resolv_conf: &str) -> Vec<SocketAddr> {
    let lines = resolv_conf.lines().filter_map(|l| l.trim().strip_prefix("nameserver"));
    lines.filter_map(|a| Some(SocketAddr::new(a.trim().parse().ok()?, 53))).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::{Name, QCLASS, Question};

    fn query(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(9);
        let name = Name::new_unchecked(name).into_owned();
        packet.questions.push(Question::new(name, kind.into(), QCLASS::CLASS(CLASS::IN), false));
        packet.build_bytes_vec().unwrap()
    }

    fn find(name: &str) -> Option<Ipv4Addr> {
        (name == "web").then_some(Ipv4Addr::new(10, 0, 2, 15))
    }

    #[test]
    fn neighbours_are_known_strangers_are_not_and_the_world_is_asked() {
        for name in ["web", "WEB", "web.lodge"] {
            let Verdict::Answer(bytes) = judge(&query(name, TYPE::A), find) else {
                panic!("{name}")
            };
            let answer = Packet::parse(&bytes).unwrap();
            assert_eq!(answer.answers.len(), 1, "{name}");
            assert_eq!(answer.id(), 9);
        }
        let Verdict::Answer(bytes) = judge(&query("web", TYPE::AAAA), find) else { panic!() };
        assert!(Packet::parse(&bytes).unwrap().answers.is_empty());
        let Verdict::Answer(bytes) = judge(&query("nobody", TYPE::A), find) else { panic!() };
        assert_eq!(Packet::parse(&bytes).unwrap().rcode(), RCODE::NameError);
        assert_eq!(judge(&query("deb.debian.org", TYPE::A), find), Verdict::PassOn);
        assert_eq!(judge(b"nonsense", find), Verdict::Ignore);
    }

    #[test]
    fn resolvers_are_read_as_written() {
        let text = "# x\nnameserver 10.1.1.1\nsearch a b\nnameserver ::1\nnameserver bad\n";
        let list: Vec<_> = upstream(text).iter().map(ToString::to_string).collect();
        assert_eq!(list, ["10.1.1.1:53", "[::1]:53"]);
    }

    proptest::proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet: Vec<u8>) {
            let _ = judge(&packet, find);
        }
    }
}
