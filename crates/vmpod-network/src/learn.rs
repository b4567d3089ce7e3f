//! Which address a guest has, told from what passes its interface. Pure.
//!
//! Two things count. A DHCP server's grant counts when it answers the guest's own last request: the guest takes that address and
//! keeps it as long as the lease says. And whom the guest says it is when it asks for its neighbours (ARP, RFC 826) counts: that
//! is so for guests that were configured by hand, and it shows that a lease was given up. What others on the bridge claim about
//! the guest counts for nothing, because only frames with the guest's own hardware address as sender are read, and grants
//! without the guest's request are dropped.

use std::net::Ipv4Addr;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::address::MacAddr;

/// An address that was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learnt {
    /// The address.
    pub address: Ipv4Addr,
    /// What it was learnt from.
    pub from: Source,
    /// When.
    pub at: Timestamp,
}

/// What an address was learnt from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A lease of this DHCP server.
    Dhcp(Ipv4Addr),
    /// The guest's own word to its neighbours.
    Arp,
    /// A lease of this host's own DHCP server.
    Lease,
    /// This host's table of its neighbours.
    Neighbour,
}

/// Something that passed the guest's interface and tells of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The guest asks for a lease.
    Asks {
        /// The number of its request, which an answer repeats.
        request: u32,
    },
    /// A server grants one.
    Grants {
        /// The number of the request that it answers.
        request: u32,
        /// The address.
        address: Ipv4Addr,
        /// The server.
        server: Ipv4Addr,
        /// For how long.
        lease: SignedDuration,
    },
    /// The guest gives its lease back.
    Releases,
    /// The guest speaks under this address.
    Speaks(Ipv4Addr),
}

/// Understands an Ethernet frame that passed the interface of the guest with this hardware address; none for what tells nothing.
#[must_use]
pub fn parse(frame: &[u8], guest: MacAddr) -> Option<Seen> {
    let (sender, kind) = (frame.get(6..12)?, frame.get(12..14)?);
    let ours = sender == guest.octets();
    let body = frame.get(14..)?;
    match kind {
        // ARP, over Ethernet and IPv4.
        [0x08, 0x06] if ours => {
            let sender = body.get(8..14)?;
            let address = Ipv4Addr::from(<[u8; 4]>::try_from(body.get(14..18)?).ok()?);
            (body.get(..6)? == [0, 1, 8, 0, 6, 4] && sender == guest.octets()).then_some(Seen::Speaks(address))
        }
        [0x08, 0x00] => parse_dhcp(udp(body)?, guest, ours),
        _ => None,
    }
}

/// The ports and payload of an unfragmented UDP packet.
fn udp(packet: &[u8]) -> Option<(u16, u16, &[u8])> {
    let first = *packet.first()?;
    let header = usize::from(first & 0x0f) * 4;
    let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff;
    if first >> 4 != 4 || header < 20 || *packet.get(9)? != 17 || fragment != 0 {
        return None;
    }
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(header + at..header + at + 2)?.try_into().ok()?));
    Some((port(0)?, port(2)?, packet.get(header + 8..)?))
}

fn parse_dhcp((from, to, payload): (u16, u16, &[u8]), guest: MacAddr, ours: bool) -> Option<Seen> {
    use crate::dhcp::{CLIENT_PORT, Packet, SERVER_PORT, option};
    let packet = Packet::parse(payload)?;
    if packet.mac != guest {
        return None;
    }
    let kind = packet.option(option::MESSAGE_TYPE)?;
    match (from, to, packet.reply, kind) {
        (CLIENT_PORT, SERVER_PORT, false, [3]) if ours => Some(Seen::Asks { request: u32::from_be_bytes(packet.xid) }),
        (CLIENT_PORT, SERVER_PORT, false, [7]) if ours => Some(Seen::Releases),
        (SERVER_PORT, _, true, [5]) if !ours => {
            let seconds = packet.option(option::LEASE_TIME)?;
            let seconds = u32::from_be_bytes(seconds.try_into().ok()?);
            Some(Seen::Grants {
                request: u32::from_be_bytes(packet.xid),
                address: packet.yours,
                server: packet.address(option::SERVER)?,
                lease: SignedDuration::from_secs(i64::from(seconds)),
            })
        }
        _ => None,
    }
}

/// How long a guest that speaks under another address has to say that it has the first one still. It is asked, so that one with two
/// addresses doesn't seem to change all the time, and one that changed is found within seconds.
const ANSWER: SignedDuration = SignedDuration::from_secs(2);

/// What is known of a guest's address.
#[derive(Clone, Debug, Default)]
pub struct Learner {
    /// The guest's last request.
    asked: Option<u32>,
    /// Until when the lease of `learnt` is good.
    until: Option<Timestamp>,
    learnt: Option<Learnt>,
    /// Another address under which it spoke, and until when it has to speak under the first.
    other: Option<(Ipv4Addr, Timestamp)>,
}

impl Learner {
    /// One that goes on from what an earlier one learnt.
    #[must_use]
    pub fn resume(learnt: Option<Learnt>) -> Self {
        Self { learnt, ..Self::default() }
    }

    /// The address, once there is one.
    #[must_use]
    pub fn learnt(&self) -> Option<Learnt> {
        self.learnt
    }

    /// Takes something in. The guest is to be asked whether it has the address still that is given back.
    pub fn step(&mut self, seen: Seen, now: Timestamp) -> Option<Ipv4Addr> {
        match seen {
            Seen::Asks { request } => self.asked = Some(request),
            Seen::Grants { request, address, server, lease } if self.asked == Some(request) && usable(address) => {
                (self.until, self.other) = (now.checked_add(lease).ok(), None);
                if self.learnt.is_none_or(|learnt| learnt.address != address || learnt.from != Source::Dhcp(server)) {
                    self.learnt = Some(Learnt { address, from: Source::Dhcp(server), at: now });
                }
            }
            Seen::Releases => *self = Self::default(),
            Seen::Speaks(address) if usable(address) => match self.learnt {
                None => self.takes(address, now),
                Some(learnt) if learnt.address == address => self.other = None,
                Some(learnt) if self.other.is_none() => {
                    self.other = Some((address, now.checked_add(ANSWER).unwrap_or(now)));
                    return Some(learnt.address);
                }
                Some(_) => {}
            },
            Seen::Grants { .. } | Seen::Speaks(_) => {}
        }
        None
    }

    fn takes(&mut self, address: Ipv4Addr, now: Timestamp) {
        let learnt = Some(Learnt { address, from: Source::Arp, at: now });
        *self = Self { asked: self.asked, learnt, ..Self::default() };
    }

    /// Takes in that time has passed: a lease that ran out is one no more, and neither is an address that the guest didn't answer
    /// for.
    pub fn pass(&mut self, now: Timestamp) {
        if self.until.is_some_and(|until| until <= now) {
            *self = Self { asked: self.asked, other: self.other, ..Self::default() };
        }
        if let Some((address, until)) = self.other
            && (until <= now || self.learnt.is_none())
        {
            self.takes(address, now);
        }
    }

    /// When [`pass`](Self::pass) is to be called next.
    #[must_use]
    pub fn wake(&self) -> Option<Timestamp> {
        [self.until, self.other.map(|(_, until)| until)].into_iter().flatten().min()
    }
}

/// A frame that asks the guest with this hardware address whether it has an address: a probe (RFC 5227, section 2.1.1), which names
/// nobody as the one who asks and so changes nobody's tables.
#[must_use]
pub fn probe(address: Ipv4Addr, guest: MacAddr) -> Vec<u8> {
    let asks = MacAddr::derive(&format!("probe/{guest}")).octets();
    let mut frame = Vec::with_capacity(42);
    frame.extend(guest.octets());
    frame.extend(asks);
    // ARP over Ethernet and IPv4: a request.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(asks);
    frame.extend([0; 10]);
    frame.extend(address.octets());
    frame
}

/// Whether others can reach a guest there: link-local addresses and the like are nobody's way in.
fn usable(address: Ipv4Addr) -> bool {
    !(address.is_unspecified()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 7]);
    const A: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 20);
    const B: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 21);
    const SERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn grants(request: u32, address: Ipv4Addr) -> Seen {
        Seen::Grants { request, address, server: SERVER, lease: SignedDuration::from_secs(60) }
    }

    fn shown(learner: &Learner) -> Option<Ipv4Addr> {
        learner.learnt().map(|learnt| learnt.address)
    }

    #[test]
    fn a_grant_counts_when_the_guest_asked_for_it() {
        let mut learner = Learner::default();
        learner.step(grants(7, A), at(0));
        assert_eq!(shown(&learner), None, "nobody asked");
        learner.step(Seen::Asks { request: 7 }, at(1));
        learner.step(grants(6, B), at(1));
        assert_eq!(shown(&learner), None, "an answer to another request");
        learner.step(grants(7, A), at(1));
        assert_eq!(learner.learnt(), Some(Learnt { address: A, from: Source::Dhcp(SERVER), at: at(1) }));
        // A renewal changes nothing but the time.
        learner.step(Seen::Asks { request: 8 }, at(31));
        learner.step(grants(8, A), at(31));
        assert_eq!((learner.learnt().unwrap().at, learner.wake()), (at(1), Some(at(91))));
        learner.step(Seen::Asks { request: 9 }, at(61));
        learner.step(grants(9, B), at(61));
        assert_eq!(shown(&learner), Some(B), "a changed lease shows at once");
        learner.pass(at(121));
        assert_eq!(shown(&learner), None, "a lease that ran out");
    }

    #[test]
    fn a_guest_that_is_configured_by_hand_is_believed() {
        let mut learner = Learner::default();
        learner.step(Seen::Speaks(A), at(0));
        assert_eq!(learner.learnt().map(|learnt| (learnt.address, learnt.from)), Some((A, Source::Arp)));
        // Under a second address it is asked for the first, and changes nothing by answering.
        for time in [10, 500] {
            assert_eq!(learner.step(Seen::Speaks(B), at(time)), Some(A));
            assert_eq!(learner.step(Seen::Speaks(B), at(time)), None, "once is enough");
            assert_eq!((shown(&learner), learner.wake()), (Some(A), Some(at(time + 2))));
            learner.step(Seen::Speaks(A), at(time + 1));
            assert_eq!((shown(&learner), learner.wake()), (Some(A), None));
        }
        // A change is believed when there is no answer.
        learner.step(Seen::Speaks(B), at(600));
        learner.pass(at(602));
        assert_eq!((shown(&learner), learner.wake()), (Some(B), None));
    }

    #[test]
    fn a_lease_that_the_guest_leaves_for_an_address_of_its_own_is_forgotten() {
        let mut learner = Learner::default();
        learner.step(Seen::Asks { request: 7 }, at(0));
        learner.step(grants(7, A), at(0));
        assert_eq!(learner.step(Seen::Speaks(B), at(10)), Some(A));
        learner.pass(at(12));
        assert_eq!((shown(&learner), learner.wake()), (Some(B), None));
        learner.pass(at(100));
        assert_eq!(shown(&learner), Some(B), "the lease's end doesn't matter any more");
        learner.step(Seen::Releases, at(101));
        assert_eq!(shown(&learner), None);
    }

    #[test]
    fn an_address_that_nobody_reaches_is_none() {
        let mut learner = Learner::default();
        for address in [[169, 254, 3, 4], [0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            learner.step(Seen::Speaks(address.into()), at(0));
            learner.step(Seen::Asks { request: 7 }, at(0));
            learner.step(grants(7, address.into()), at(0));
        }
        assert_eq!(learner.learnt(), None);
    }

    #[test]
    fn an_agent_that_comes_back_goes_on_with_what_was_known() {
        let before = Learnt { address: A, from: Source::Dhcp(SERVER), at: at(0) };
        let mut learner = Learner::resume(Some(before));
        assert_eq!((learner.learnt(), learner.wake()), (Some(before), None));
        assert_eq!(learner.step(Seen::Speaks(B), at(500)), Some(A));
        learner.pass(at(502));
        assert_eq!(shown(&learner), Some(B));
    }

    #[test]
    fn a_probe_is_nobodys_word() {
        let frame = probe(A, MAC);
        assert_eq!((frame.len(), &frame[..6]), (42, MAC.octets().as_slice()));
        assert_eq!((&frame[28..32], &frame[38..]), ([0; 4].as_slice(), A.octets().as_slice()));
        assert_eq!(parse(&frame, MAC), None);
    }

    fn arp(sender: MacAddr, address: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(sender.octets());
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(sender.octets());
        frame.extend(address.octets());
        frame.extend([0; 6]);
        frame.extend([192, 168, 1, 1]);
        frame
    }

    /// A frame with DHCP in it, by an independent encoder.
    fn dhcp(sender: MacAddr, kind: dhcproto::v4::MessageType, ports: (u16, u16)) -> Vec<u8> {
        use dhcproto::{
            Encodable as _,
            v4::{DhcpOption, Message, MessageType, Opcode},
        };
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(7, none, none, none, none, &MAC.octets());
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        if kind == MessageType::Ack {
            message.set_opcode(Opcode::BootReply).set_yiaddr(A);
            message.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
            message.opts_mut().insert(DhcpOption::AddressLeaseTime(60));
        }
        let payload = message.to_vec().unwrap();
        let mut frame = vec![0xff; 6];
        frame.extend(sender.octets());
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend([0; 8]);
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn frames_tell_what_the_guest_and_its_server_say() {
        use dhcproto::v4::MessageType;
        let server = MacAddr::new([2, 0, 0, 0, 0, 1]);
        assert_eq!(parse(&arp(MAC, A), MAC), Some(Seen::Speaks(A)));
        assert_eq!(parse(&arp(server, A), MAC), None, "somebody else's word");
        assert_eq!(parse(&dhcp(MAC, MessageType::Request, (68, 67)), MAC), Some(Seen::Asks { request: 7 }));
        assert_eq!(parse(&dhcp(MAC, MessageType::Release, (68, 67)), MAC), Some(Seen::Releases));
        assert_eq!(parse(&dhcp(server, MessageType::Ack, (67, 68)), MAC), Some(grants(7, A)));
        assert_eq!(parse(&dhcp(server, MessageType::Request, (68, 67)), MAC), None, "a request that isn't the guest's");
        assert_eq!(parse(&dhcp(MAC, MessageType::Ack, (67, 68)), MAC), None, "a guest that grants itself something");
        let mut fragment = dhcp(server, MessageType::Ack, (67, 68));
        fragment[21] = 1;
        assert_eq!(parse(&fragment, MAC), None);
    }

    proptest! {
        #[test]
        fn no_frame_breaks_it(
            noise in proptest::collection::vec(any::<u8>(), 0..700),
            flips in proptest::collection::vec((0usize..320, any::<u8>()), 0..12), cut in 0usize..400
        ) {
            use dhcproto::v4::MessageType;
            let told = |frame: &[u8]| match parse(frame, MAC) {
                Some(Seen::Grants { .. }) => frame[6..12] != MAC.octets(),
                Some(_) => frame[6..12] == MAC.octets(),
                None => true,
            };
            prop_assert!(told(&noise));
            for mut frame in [arp(MAC, A), dhcp(MacAddr::new([1; 6]), MessageType::Ack, (67, 68))] {
                for (at, value) in &flips {
                    if let Some(byte) = frame.get_mut(*at) {
                        *byte = *value;
                    }
                }
                frame.truncate(cut);
                prop_assert!(told(&frame));
            }
        }

        #[test]
        fn what_is_shown_was_granted_or_said_and_can_be_reached(
            steps in proptest::collection::vec((0u8..5, 0u32..3, any::<[u8; 4]>(), 0i64..40), 0..60)
        ) {
            let (mut learner, mut now, mut known) = (Learner::default(), 0, std::collections::BTreeSet::new());
            for (kind, request, address, later) in steps {
                now += later;
                let address = Ipv4Addr::from(address);
                let before = shown(&learner);
                let seen = match kind {
                    0 => Some(Seen::Asks { request }),
                    1 => Some(grants(request, address)),
                    2 => Some(Seen::Speaks(address)),
                    3 => Some(Seen::Releases),
                    _ => None,
                };
                match seen {
                    Some(seen) => {
                        let asks = learner.step(seen, at(now));
                        prop_assert!(asks.is_none() || asks == before, "it asks for what it doesn't show");
                    }
                    None => learner.pass(at(now)),
                }
                prop_assert!(kind == 4 || learner.wake().is_some() || learner.other.is_none());
                known.insert(address);
                if let Some(learnt) = learner.learnt() {
                    prop_assert!(known.contains(&learnt.address) && usable(learnt.address));
                    prop_assert!(learnt.at <= at(now));
                }
            }
        }
    }
}
