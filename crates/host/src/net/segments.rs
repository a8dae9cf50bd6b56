//! Bridges of their own inside a network: made with their first member, gone with the network. The
//! host's side of each has the router's addresses and answers for names there. Works in the
//! namespace of its caller.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};

use lodge_spec::machine::Segment;
use tokio::sync::Mutex;

use super::setup::{SetupError, ask_often, ip};

/// Where names are asked for: as everywhere, and where cluster nodes' own servers forward to.
const NAME_PORTS: [u16; 2] = [53, 10053];

#[derive(Default)]
pub(super) struct Segments(Mutex<BTreeSet<u8>>);

/// The interface's name inside the network.
pub(super) fn bridge(number: u8) -> String {
    format!("xcbr{number}")
}

impl Segments {
    /// Makes sure that a segment is there; gives back where names are to be asked for if it is new.
    pub(super) async fn ensure(
        &self,
        segment: Segment,
        gateway: Option<(Ipv4Addr, u8)>,
    ) -> Result<Vec<SocketAddr>, SetupError> {
        let Segment { number, gateway6 } = segment;
        let mut known = self.0.lock().await;
        if known.contains(&number) {
            return Ok(Vec::new());
        }
        let bridge = bridge(number);
        // LLDP passes, as between machines that are wired together.
        let mut batch = format!(
            "link add {bridge} type bridge stp_state 0 forward_delay 0 group_fwd_mask 0x4000\n"
        );
        if let Some((address, prefix)) = gateway {
            batch += &format!("addr add {address}/{prefix} dev {bridge}\n");
        }
        if let Some((address, prefix)) = gateway6 {
            batch += &format!("addr add {address}/{prefix} dev {bridge} nodad\n");
        }
        batch += &format!("link set {bridge} up\n");
        batch += &ask_often(&bridge);
        ip(&batch).await?;
        known.insert(number);
        let address = gateway.map(|(address, _)| address);
        Ok(address.iter().flat_map(|a| NAME_PORTS.map(|p| SocketAddr::from((*a, p)))).collect())
    }
}
