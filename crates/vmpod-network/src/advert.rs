//! Router advertisements: how guests come to IPv6 addresses of their own (RFC 4861, section 4.2; RFC 4862).
//!
//! The prefix is for this host only, so the advertisement says that nobody is to send what goes elsewhere this way: its router
//! lifetime is zero, and guests keep to IPv4 for the world.

use std::net::Ipv6Addr;

use crate::address::MacAddr;

/// Type of a router solicitation.
const SOLICITATION: u8 = 133;
/// Type of a router advertisement.
const ADVERTISEMENT: u8 = 134;
/// Seconds for which addresses of the prefix are valid, and preferred.
const LIFETIME: u32 = 86_400;

/// Whether an `ICMPv6` packet asks for an advertisement.
#[must_use]
pub fn is_solicitation(packet: &[u8]) -> bool {
    // Type, code, checksum, four reserved bytes; options may follow.
    matches!(packet, [SOLICITATION, 0, _, _, _, _, _, _, ..])
}

/// An advertisement for a prefix of 64 bits, as `ICMPv6`; the kernel fills in the checksum.
#[must_use]
pub fn advertisement(prefix: Ipv6Addr, router: MacAddr) -> Vec<u8> {
    let mut bytes = vec![ADVERTISEMENT, 0, 0, 0];
    // Hop limit 64, no flags, router lifetime zero, reachable and retransmission times unspecified.
    bytes.extend([64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Prefix information: four units of eight bytes, on-link and autonomous.
    bytes.extend([3, 4, 64, 0xc0]);
    bytes.extend(LIFETIME.to_be_bytes());
    bytes.extend(LIFETIME.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(prefix.octets());
    // Source link-layer address.
    bytes.extend([1, 1]);
    bytes.extend(router.octets());
    bytes
}

/// The address that a guest makes from a prefix and its hardware address (RFC 4291, appendix A), unless it prefers others.
#[must_use]
pub fn address(prefix: Ipv6Addr, mac: MacAddr) -> Ipv6Addr {
    let (mac, mut octets) = (mac.octets(), prefix.octets());
    octets[8..11].copy_from_slice(&mac[..3]);
    octets[8] ^= 2;
    octets[11..13].copy_from_slice(&[0xff, 0xfe]);
    octets[13..].copy_from_slice(&mac[3..]);
    Ipv6Addr::from(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_is_as_the_standard_wants() {
        let prefix = "fd12:3456:789a:1::".parse().unwrap();
        let bytes = advertisement(prefix, MacAddr::new([2, 0, 0, 0, 0, 1]));
        assert_eq!(bytes.len(), 16 + 32 + 8);
        assert_eq!(bytes[6..8], [0, 0], "no default route");
        assert_eq!(bytes[16..20], [3, 4, 64, 0xc0]);
        assert_eq!(bytes[32..48], prefix.octets());
    }

    #[test]
    fn only_solicitations_are_answered() {
        assert!(is_solicitation(&[133, 0, 1, 2, 0, 0, 0, 0]));
        for other in [&[][..], &[133], &[133, 0, 0, 0], &[134, 0, 0, 0, 0, 0, 0, 0], &[133, 1, 0, 0, 0, 0, 0, 0]] {
            assert!(!is_solicitation(other), "{other:?}");
        }
    }

    #[test]
    fn a_guest_makes_its_address_from_its_hardware_address() {
        let address = address("fd00::".parse().unwrap(), MacAddr::new([0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]));
        assert_eq!(address.to_string(), "fd00::aa:bbff:fecc:ddee");
    }
}
