//! What a DHCP server says, decided from one packet. Pure.
//!
//! Each machine's address is reserved under its hardware address before it boots, so there is no pool, nothing to write down
//! and nothing that runs out: whoever isn't known gets no answer, and whoever is known gets its own address in the first
//! round. See RFC 2131 (section 2 for the packet, 4.3 for what a server says, 4.1 for where an answer goes) and RFC 2132.
//!
//! The few fields that matter are read here, and not by a library: one that was tried panics on what guests may send.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use crate::address::{MacAddr, Subnet};

/// The port that servers listen on.
pub const SERVER_PORT: u16 = 67;
/// The port that clients listen on.
pub const CLIENT_PORT: u16 = 68;
/// How long a lease is. A guest asks again after half of it, so an agent that is away for hours is missed by nobody.
pub const LEASE: Duration = Duration::from_hours(24);

/// What one machine gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its address.
    pub address: Ipv4Addr,
    /// The name it is told to have.
    pub hostname: Option<String>,
}

/// A packet to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The bytes of its UDP payload.
    pub bytes: Vec<u8>,
    /// Where to.
    pub to: SocketAddrV4,
    /// What it says.
    pub kind: Kind,
}

/// What a server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This address could be yours.
    Offer = 2,
    /// It is yours.
    Ack = 5,
    /// It isn't.
    Nak = 6,
}

/// Sizes and places of the fields that come before the options.
const HEADER: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The first bit of the flags: the client hears broadcasts only.
const BROADCAST: u16 = 0x8000;

/// Options by number (RFC 2132, RFC 6842).
pub(crate) mod option {
    pub(crate) const SUBNET_MASK: u8 = 1;
    pub(crate) const ROUTER: u8 = 3;
    pub(crate) const NAME_SERVER: u8 = 6;
    pub(crate) const HOST_NAME: u8 = 12;
    pub(crate) const BROADCAST_ADDRESS: u8 = 28;
    pub(crate) const REQUESTED_ADDRESS: u8 = 50;
    pub(crate) const LEASE_TIME: u8 = 51;
    pub(crate) const MESSAGE_TYPE: u8 = 53;
    pub(crate) const SERVER: u8 = 54;
    pub(crate) const RENEWAL_TIME: u8 = 58;
    pub(crate) const REBINDING_TIME: u8 = 59;
    pub(crate) const CLIENT_ID: u8 = 61;
    pub(crate) const END: u8 = 255;
}

/// A packet of a client or a server, as far as it matters.
pub(crate) struct Packet<'a> {
    /// A server says it.
    pub(crate) reply: bool,
    pub(crate) xid: [u8; 4],
    flags: u16,
    client: Ipv4Addr,
    pub(crate) yours: Ipv4Addr,
    relay: Ipv4Addr,
    pub(crate) mac: MacAddr,
    options: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Understands a packet over Ethernet; none for everything else.
    pub(crate) fn parse(packet: &'a [u8]) -> Option<Self> {
        let (header, options) = packet.split_at_checked(HEADER)?;
        let field = |at: usize| <[u8; 4]>::try_from(header.get(at..at + 4)?).ok();
        let address = |at: usize| field(at).map(Ipv4Addr::from);
        // Ethernet has addresses of six bytes.
        if header.get(1..3)? != [1, 6] || field(236)? != COOKIE {
            return None;
        }
        Some(Self {
            reply: match header.first()? {
                1 => false,
                2 => true,
                _ => return None,
            },
            xid: field(4)?,
            flags: u16::from_be_bytes(header.get(10..12)?.try_into().ok()?),
            client: address(12)?,
            yours: address(16)?,
            relay: address(24)?,
            mac: MacAddr::new(header.get(28..34)?.try_into().ok()?),
            options,
        })
    }

    /// The first option of this number. Options that run over the packet's end are none.
    pub(crate) fn option(&self, number: u8) -> Option<&'a [u8]> {
        let mut rest = self.options;
        loop {
            let (kind, after) = rest.split_first()?;
            match *kind {
                0 => rest = after,
                option::END => return None,
                kind => {
                    let (length, after) = after.split_first()?;
                    let (value, after) = after.split_at_checked(usize::from(*length))?;
                    if kind == number {
                        return Some(value);
                    }
                    rest = after;
                }
            }
        }
    }

    /// The first option of this number, when it is an address.
    pub(crate) fn address(&self, number: u8) -> Option<Ipv4Addr> {
        Some(Ipv4Addr::from(<[u8; 4]>::try_from(self.option(number)?).ok()?))
    }
}

/// The answer to a packet, when there is one.
///
/// Bytes that are no DHCP, requests of machines that `lease` doesn't know, those that came through a relay, and those meant
/// for another server get none.
pub fn answer(packet: &[u8], subnet: Subnet, lease: impl Fn(MacAddr) -> Option<Lease>) -> Option<Answer> {
    let request = Packet::parse(packet)?;
    if request.reply || !request.relay.is_unspecified() {
        return None;
    }
    let lease = lease(request.mac)?;
    let server = subnet.gateway();
    let for_us = request.address(option::SERVER).is_none_or(|wanted| wanted == server);
    let (kind, informs) = match request.option(option::MESSAGE_TYPE)? {
        // Discover.
        [1] => (Kind::Offer, false),
        // Request: selecting and rebooting clients name the address in an option, renewing ones in the header.
        [3] if for_us => {
            let named = request.address(option::REQUESTED_ADDRESS).unwrap_or(request.client);
            (if named == lease.address { Kind::Ack } else { Kind::Nak }, false)
        }
        // Inform.
        [8] => (Kind::Ack, true),
        // A release or a refusal changes nothing: the address stays this machine's.
        _ => return None,
    };
    let refused = kind == Kind::Nak;
    let to = match () {
        // Its address is wrong, so nothing but broadcast reaches it.
        () if refused => Ipv4Addr::BROADCAST,
        () if !request.client.is_unspecified() => request.client,
        () if request.flags & BROADCAST != 0 => Ipv4Addr::BROADCAST,
        () => lease.address,
    };
    let yours = if refused || informs { Ipv4Addr::UNSPECIFIED } else { lease.address };
    let mut reply = Reply::new(&request, if refused { BROADCAST } else { request.flags }, yours);
    reply.option(option::MESSAGE_TYPE, &[kind as u8]);
    reply.option(option::SERVER, &server.octets());
    if let Some(id) = request.option(option::CLIENT_ID) {
        reply.option(option::CLIENT_ID, id);
    }
    if !refused {
        if !informs {
            let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX).to_be_bytes();
            reply.option(option::LEASE_TIME, &seconds(LEASE));
            reply.option(option::RENEWAL_TIME, &seconds(LEASE / 2));
            reply.option(option::REBINDING_TIME, &seconds(LEASE / 8 * 7));
        }
        reply.option(option::SUBNET_MASK, &subnet.mask().octets());
        reply.option(option::BROADCAST_ADDRESS, &subnet.broadcast().octets());
        reply.option(option::ROUTER, &server.octets());
        reply.option(option::NAME_SERVER, &server.octets());
        if let Some(name) = &lease.hostname {
            reply.option(option::HOST_NAME, name.as_bytes());
        }
    }
    Some(Answer { bytes: reply.finish(), to: SocketAddrV4::new(to, CLIENT_PORT), kind })
}

/// A packet of a server.
struct Reply(Vec<u8>);

impl Reply {
    fn new(request: &Packet<'_>, flags: u16, yours: Ipv4Addr) -> Self {
        let mut bytes = vec![2, 1, 6, 0];
        bytes.extend(request.xid);
        bytes.extend([0; 2]);
        bytes.extend(flags.to_be_bytes());
        bytes.extend(request.client.octets());
        bytes.extend(yours.octets());
        // The next server and the relay: none.
        bytes.extend([0; 8]);
        bytes.extend(request.mac.octets());
        bytes.resize(HEADER - COOKIE.len(), 0);
        bytes.extend(COOKIE);
        Self(bytes)
    }

    /// Adds an option; what is too long for one is left out.
    fn option(&mut self, number: u8, value: &[u8]) {
        if let Ok(length) = u8::try_from(value.len()) {
            self.0.extend([number, length]);
            self.0.extend(value);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.push(option::END);
        // Clients of the old protocol want at least this much (RFC 1542, section 2.1).
        self.0.resize(self.0.len().max(300), 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use dhcproto::{
        Decodable as _, Decoder, Encodable as _,
        v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode},
    };
    use proptest::prelude::*;

    use super::*;

    const MINE: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 201, 4, 7);

    fn known(mac: MacAddr) -> Option<Lease> {
        (mac.octets() == MINE).then(|| Lease { address: ADDRESS, hostname: Some("web".to_owned()) })
    }

    fn request(mac: [u8; 6], options: Vec<DhcpOption>) -> Message {
        let mut message = Message::new_with_id(
            7,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::UNSPECIFIED,
            &mac,
        );
        message.set_opts(options.into_iter().collect());
        message
    }

    fn ask(message: &Message) -> Option<(Answer, Message)> {
        let answer = answer(&message.to_vec().unwrap(), Subnet::USUAL, known)?;
        let said = Message::decode(&mut Decoder::new(&answer.bytes)).unwrap();
        Some((answer, said))
    }

    #[test]
    fn a_known_machine_is_offered_its_own_address() {
        let (answer, said) =
            ask(&request(MINE, vec![DhcpOption::MessageType(MessageType::Discover)])).expect("an offer");
        assert_eq!((answer.kind, answer.to), (Kind::Offer, SocketAddrV4::new(ADDRESS, 68)));
        assert_eq!((said.yiaddr(), said.xid(), said.chaddr()), (ADDRESS, 7, MINE.as_slice()));
        let options = said.opts();
        assert_eq!(options.get(OptionCode::Router), Some(&DhcpOption::Router(vec![Subnet::USUAL.gateway()])));
        assert_eq!(options.get(OptionCode::Hostname), Some(&DhcpOption::Hostname("web".to_owned())));
        assert_eq!(options.get(OptionCode::AddressLeaseTime), Some(&DhcpOption::AddressLeaseTime(86_400)));
        assert!(answer.bytes.len() >= 300);
        let mut named = request(MINE, vec![DhcpOption::MessageType(MessageType::Discover)]);
        named.opts_mut().insert(DhcpOption::ClientIdentifier(vec![255, 1, 2]));
        let (_, said) = ask(&named).expect("an offer");
        let id = said.opts().get(OptionCode::ClientIdentifier).cloned();
        assert_eq!(id, Some(DhcpOption::ClientIdentifier(vec![255, 1, 2])), "RFC 6842");
    }

    #[test]
    fn nobody_else_is_answered() {
        let discover = || vec![DhcpOption::MessageType(MessageType::Discover)];
        assert!(ask(&request([2, 0, 0, 0, 0, 8], discover())).is_none(), "an unknown machine");
        let mut relayed = request(MINE, discover());
        relayed.set_giaddr([10, 0, 0, 1]);
        assert!(ask(&relayed).is_none(), "a relay");
        let mut reply = request(MINE, discover());
        reply.set_opcode(Opcode::BootReply);
        assert!(ask(&reply).is_none(), "another server's answer");
        let elsewhere = vec![
            DhcpOption::MessageType(MessageType::Request),
            DhcpOption::ServerIdentifier([10, 9, 9, 9].into()),
            DhcpOption::RequestedIpAddress(ADDRESS),
        ];
        assert!(ask(&request(MINE, elsewhere)).is_none(), "a client that chose another server");
        assert!(ask(&request(MINE, vec![DhcpOption::MessageType(MessageType::Release)])).is_none());
        assert!(ask(&request(MINE, Vec::new())).is_none(), "BOOTP");
    }

    #[test]
    fn a_request_for_the_right_address_is_granted_and_for_another_refused() {
        let asks = |address| {
            let options = vec![DhcpOption::MessageType(MessageType::Request), DhcpOption::RequestedIpAddress(address)];
            ask(&request(MINE, options)).expect("an answer")
        };
        let (answer, said) = asks(ADDRESS);
        assert_eq!((answer.kind, said.yiaddr()), (Kind::Ack, ADDRESS));
        let (answer, said) = asks([192, 168, 1, 9].into());
        assert_eq!((answer.kind, *answer.to.ip()), (Kind::Nak, Ipv4Addr::BROADCAST));
        assert!(said.yiaddr().is_unspecified() && said.opts().get(OptionCode::AddressLeaseTime).is_none());
    }

    #[test]
    fn answers_go_where_the_client_can_hear_them() {
        let mut renewing = request(MINE, vec![DhcpOption::MessageType(MessageType::Request)]);
        renewing.set_ciaddr(ADDRESS);
        assert_eq!(ask(&renewing).map(|(answer, _)| (answer.kind, *answer.to.ip())), Some((Kind::Ack, ADDRESS)));
        let mut deaf = request(MINE, vec![DhcpOption::MessageType(MessageType::Discover)]);
        deaf.set_flags(Flags::default().set_broadcast());
        assert_eq!(ask(&deaf).map(|(answer, _)| *answer.to.ip()), Some(Ipv4Addr::BROADCAST));
        let mut informed = request(MINE, vec![DhcpOption::MessageType(MessageType::Inform)]);
        informed.set_ciaddr([10, 201, 9, 9]);
        let (answer, said) = ask(&informed).expect("an answer");
        assert_eq!((answer.kind, *answer.to.ip()), (Kind::Ack, Ipv4Addr::new(10, 201, 9, 9)));
        assert!(said.yiaddr().is_unspecified() && said.opts().get(OptionCode::AddressLeaseTime).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_crash_it_or_make_it_give_a_foreign_address(
            noise in proptest::collection::vec(any::<u8>(), 0..700), cut in 0usize..400, flips in proptest::collection::vec((0usize..300, any::<u8>()), 0..12)
        ) {
            // Both noise and almost-DHCP.
            drop(answer(&noise, Subnet::USUAL, known));
            let mut bytes = request(MINE, vec![DhcpOption::MessageType(MessageType::Discover)]).to_vec().unwrap();
            for (at, value) in flips {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(cut.max(1));
            if let Some(answer) = answer(&bytes, Subnet::USUAL, known) {
                // Its own options, which the library understands; what a client said may be anything.
                let said = Message::decode(&mut Decoder::new(&answer.bytes)).unwrap();
                prop_assert!(said.yiaddr().is_unspecified() || said.yiaddr() == ADDRESS);
                prop_assert_eq!(said.chaddr(), MINE.as_slice());
            }
        }
    }
}
