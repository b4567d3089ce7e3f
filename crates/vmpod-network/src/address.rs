//! Hardware addresses and networks.

use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

/// Why a text is no [`MacAddr`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is no hardware address: six two-digit hexadecimal octets with ':' between are wanted")]
pub struct InvalidMac(String);

impl MacAddr {
    /// An address from its octets.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The address that belongs to `name` (a pod's UID, say): locally administered, unicast, always the same.
    #[must_use]
    pub fn derive(name: &str) -> Self {
        let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:mac:{name}").as_bytes());
        let mut octets = [0x02; 6];
        octets[1..].copy_from_slice(&id.as_bytes()[..5]);
        Self(octets)
    }

    /// The octets.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, octet) in self.0.iter().enumerate() {
            let colon = if index == 0 { "" } else { ":" };
            write!(f, "{colon}{octet:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || InvalidMac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part =
                parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit())).ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

/// An IPv4 network for machines: its first address is the gateway's, its last is broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

/// Why a text is no [`Subnet`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidSubnet {
    /// Not of the form.
    #[error("{0:?} is no IPv4 network: an address, a slash and 16 to 29 are wanted, such as 10.201.0.0/16")]
    Form(String),
    /// Bits beyond the prefix.
    #[error("{0} has bits beyond its prefix: did you mean {1}?")]
    Host(String, Subnet),
}

impl Subnet {
    /// What machines get unless another is chosen: seldom used by others, and room for 65 000 of them.
    pub const USUAL: Self = Self { network: Ipv4Addr::new(10, 201, 0, 0), prefix: 16 };

    /// The number of bits that all its addresses share.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first address, which the host has.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + 1)
    }

    /// The last address.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | !self.bits())
    }

    /// The mask of the shared bits.
    #[must_use]
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from(self.bits())
    }

    /// Whether it has this address.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.bits() == u32::from(self.network)
    }

    /// Whether the two have an address in common.
    #[must_use]
    pub fn overlaps(self, address: Ipv4Addr, prefix: u8) -> bool {
        let shared = mask(self.prefix.min(prefix));
        u32::from(address) & shared == u32::from(self.network) & shared
    }

    /// An address for a machine of this name that isn't in `used`; the same one for the same name where it is free.
    /// `None` when all are used.
    #[must_use]
    pub fn allocate(self, name: &str, used: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
        // Neither the network's own address, nor the gateway's, nor broadcast.
        let size = !self.bits() - 2;
        let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:nat:{name}").as_bytes());
        let [a, b, c, d, ..] = *id.as_bytes();
        let start = u32::from_be_bytes([a, b, c, d]) % size;
        (0..size)
            .map(|step| Ipv4Addr::from(u32::from(self.network) + 2 + (start + step) % size))
            .find(|address| !used.contains(address))
    }

    fn bits(self) -> u32 {
        mask(self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = InvalidSubnet;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || InvalidSubnet::Form(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(form)?;
        let address: Ipv4Addr = address.parse().map_err(|_| form())?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| (16..=29).contains(prefix)).ok_or_else(form)?;
        let subnet = Self { network: Ipv4Addr::from(u32::from(address) & mask(prefix)), prefix };
        if subnet.network == address { Ok(subnet) } else { Err(InvalidSubnet::Host(text.to_owned(), subnet)) }
    }
}

impl TryFrom<String> for Subnet {
    type Error = InvalidSubnet;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

/// The unique local IPv6 prefix of 64 bits that belongs to `name` (RFC 4193: `fd`, 40 bits nobody else has, a subnet).
#[must_use]
pub fn local_prefix(name: &str) -> Ipv6Addr {
    let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:ula:{name}").as_bytes());
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..8].copy_from_slice(&id.as_bytes()[..7]);
    Ipv6Addr::from(octets)
}

/// The first address of a prefix of 64 bits: the gateway's.
#[must_use]
pub fn first_of(prefix: Ipv6Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(prefix) | 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_mac_survives_its_text(octets in any::<[u8; 6]>()) {
            let mac = MacAddr::new(octets);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }

        #[test]
        fn a_derived_mac_is_local_and_unicast(name in "\\PC*") {
            prop_assert_eq!(MacAddr::derive(&name).octets()[0] & 0b11, 0b10);
            prop_assert_eq!(MacAddr::derive(&name), MacAddr::derive(&name));
        }

        #[test]
        fn no_two_machines_share_an_address(
            names in proptest::collection::hash_set("[a-z]{1,6}", 1..40), prefix in 16u8..=29
        ) {
            let subnet: Subnet = format!("10.9.0.0/{prefix}").parse().unwrap();
            let room = (1usize << (32 - prefix)) - 3;
            let mut used = BTreeSet::new();
            for name in names {
                let Some(address) = subnet.allocate(&name, &used) else {
                    prop_assert_eq!(used.len(), room, "refused while addresses were free");
                    continue;
                };
                prop_assert!(subnet.contains(address));
                prop_assert!(address != subnet.gateway() && address != subnet.broadcast());
                prop_assert!(address != Ipv4Addr::new(10, 9, 0, 0));
                prop_assert!(used.insert(address));
            }
        }
    }

    #[test]
    fn malformed_macs_are_refused() {
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "zz:00:00:00:00:00", "02-00-00-00-00-00"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn subnets_are_said_as_everywhere() {
        let subnet: Subnet = "10.201.0.0/16".parse().unwrap();
        assert_eq!(subnet, Subnet::USUAL);
        assert_eq!((subnet.gateway(), subnet.broadcast()), ([10, 201, 0, 1].into(), [10, 201, 255, 255].into()));
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 0, 0));
        assert!(subnet.overlaps([10, 0, 0, 1].into(), 8) && subnet.overlaps([10, 201, 3, 1].into(), 24));
        assert!(!subnet.overlaps([10, 202, 0, 1].into(), 16) && subnet.overlaps([0, 0, 0, 0].into(), 0));
        for bad in ["10.201.0.0", "10.201.0.0/8", "10.201.0.0/30", "x/16", "10.201.0.0/16/1", "fd00::/64"] {
            assert!(matches!(bad.parse::<Subnet>(), Err(InvalidSubnet::Form(_))), "{bad:?}");
        }
        let error = "10.201.3.0/16".parse::<Subnet>().unwrap_err().to_string();
        assert_eq!(error, "10.201.3.0/16 has bits beyond its prefix: did you mean 10.201.0.0/16?");
    }

    #[test]
    fn local_prefixes_are_unique_local() {
        let prefix = local_prefix("a");
        assert_eq!(prefix.octets()[0], 0xfd);
        assert_eq!(&prefix.octets()[8..], &[0; 8]);
        assert_ne!(prefix, local_prefix("b"));
        assert_eq!(first_of(prefix).octets()[15], 1);
    }
}
