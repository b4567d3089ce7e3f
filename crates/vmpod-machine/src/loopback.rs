//! Loopback addresses, one per machine, from 127.64.0.0/10.
//!
//! Every address of 127.0.0.0/8 answers on Linux without being configured, so a machine on the hypervisor's own
//! network can still have an address of its own, reachable from this host only. The upper half-open block
//! 127.64.0.0–127.127.255.255 is far from 127.0.0.1 and from 127.0.1.1 and 127.0.0.53, which distributions use.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::id::MachineId;

/// Addresses in 127.64.0.0/10.
const SIZE: u32 = 1 << 22;
const BASE: u32 = u32::from_be_bytes([127, 64, 0, 0]);

/// An address for `id` that isn't in `used`; the same one for the same machine where it is free. `None` when all four
/// million are used.
///
/// It starts at a place that depends on the name, so that an address isn't given to the next machine at once, and so
/// that two agents on one host seldom meet. Should they: the hypervisor can't bind it, and says so.
#[must_use]
pub fn allocate(id: &MachineId, used: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let [a, b, c, d, ..] = *id.uuid().as_bytes();
    let start = u32::from_be_bytes([a, b, c, d]) % SIZE;
    (0..SIZE)
        .map(|step| Ipv4Addr::from(BASE + (start + step) % SIZE))
        // First and last of a /24 look like a network's and a broadcast address to people and some programs.
        .filter(|address| !matches!(address.octets()[3], 0 | 255))
        .find(|address| !used.contains(address))
}

/// Whether `address` is one of ours.
#[must_use]
pub fn is_ours(address: Ipv4Addr) -> bool {
    u32::from(address) & !(SIZE - 1) == BASE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_two_machines_share_an_address(names in proptest::collection::hash_set("[a-z]{1,6}", 1..60)) {
            let mut used = BTreeSet::new();
            for name in names {
                let address = allocate(&MachineId::parse(name).unwrap(), &used).unwrap();
                prop_assert!(is_ours(address));
                prop_assert!(used.insert(address));
            }
        }
    }

    #[test]
    fn a_machine_keeps_its_address_unless_it_is_taken() {
        let id = MachineId::parse("a").unwrap();
        let first = allocate(&id, &BTreeSet::new()).unwrap();
        assert_eq!(allocate(&id, &BTreeSet::new()).unwrap(), first);
        assert_ne!(allocate(&id, &BTreeSet::from([first])).unwrap(), first);
        assert!(!is_ours(Ipv4Addr::LOCALHOST) && !is_ours(Ipv4Addr::new(127, 128, 0, 0)));
    }
}
