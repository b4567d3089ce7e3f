//! Addresses of guests on macOS's own networks, as the host tells of them. Pure: texts in, addresses out.
//!
//! `bootpd`, which serves the guests of vmnet, keeps its leases in `/var/db/dhcpd_leases`, one block a lease:
//!
//! ```text
//! {
//!         name=runner
//!         ip_address=192.168.64.7
//!         hw_address=1,2:cf:58:3b:87:a6
//!         identifier=1,2:cf:58:3b:87:a6
//!         lease=0x6748f0c1
//! }
//! ```
//!
//! `hw_address` is the type of hardware and the address, whose octets have no leading zeros. A client that identifies itself
//! by a DUID (RFC 4361, what systemd-networkd and recent macOS guests do) has type `ff`, and no hardware address in the file: it
//! is told by its name only. `lease` is when the lease ends, in seconds since 1970. One guest may have several blocks, old ones among
//! them, and old ones of other guests may name the same address.
//!
//! `arp -an` prints the neighbour table, with unpadded octets as well:
//!
//! ```text
//! ? (192.168.64.7) at 2:cf:58:3b:87:a6 on bridge100 ifscope [bridge]
//! ? (192.168.64.9) at (incomplete) on bridge100 ifscope [bridge]
//! ```

use std::net::Ipv4Addr;

use jiff::Timestamp;

use crate::spec::MacAddr;

/// One block of the leases file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The name that the guest gave itself.
    pub name: Option<String>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Who has it.
    pub client: Client,
    /// When it ends; none when the file doesn't say.
    pub ends: Option<Timestamp>,
}

/// What a lease knows of its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// A hardware address.
    Mac(MacAddr),
    /// An identifier of another kind, as it stands in the file.
    Identifier(String),
}

/// The leases in a file. Blocks that aren't whole, which a file that is being written may have, are left out.
#[must_use]
pub fn leases(text: &str) -> Vec<Lease> {
    let mut all = Vec::new();
    let mut block: Option<Vec<(&str, &str)>> = None;
    for line in text.lines().map(str::trim) {
        match (line, &mut block) {
            // A block that was cut short ends where the next begins.
            ("{", _) => block = Some(Vec::new()),
            ("}", _) => all.extend(block.take().and_then(|fields| lease(&fields))),
            (line, Some(fields)) => fields.extend(line.split_once('=')),
            (_, None) => {}
        }
    }
    all
}

fn lease(fields: &[(&str, &str)]) -> Option<Lease> {
    let field = |name: &str| fields.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
    let hardware = field("hw_address")?;
    let (kind, rest) = hardware.split_once(',')?;
    let client = match unpadded(rest) {
        // 1 is Ethernet (RFC 1700, "Hardware Type").
        Some(mac) if kind == "1" => Client::Mac(mac),
        _ => Client::Identifier(hardware.to_owned()),
    };
    let ends = field("lease").and_then(|value| {
        let digits = value.strip_prefix("0x").unwrap_or(value);
        Timestamp::from_second(i64::from_str_radix(digits, 16).ok()?).ok()
    });
    let name = field("name").filter(|name| !name.is_empty()).map(ToOwned::to_owned);
    Some(Lease { name, address: field("ip_address")?.parse().ok()?, client, ends })
}

/// The address that a guest has by the leases: the one of the lease of its hardware address that ends last and isn't over.
///
/// A guest that identifies itself by a DUID is found by its name, and only when the name is nobody else's.
#[must_use]
pub fn leased(leases: &[Lease], mac: MacAddr, name: Option<&str>, now: Timestamp) -> Option<Ipv4Addr> {
    let valid = |lease: &&Lease| lease.ends.is_none_or(|ends| ends > now);
    let newest = |of: &mut dyn Iterator<Item = &Lease>| -> Option<Ipv4Addr> {
        let lease = of.max_by_key(|lease| lease.ends)?;
        // Whoever got the same address later has it now.
        let taken = leases
            .iter()
            .filter(valid)
            .any(|other| other.address == lease.address && other.client != lease.client && other.ends > lease.ends);
        (!taken).then_some(lease.address)
    };
    let by_mac = newest(&mut leases.iter().filter(valid).filter(|lease| lease.client == Client::Mac(mac)));
    if by_mac.is_some() {
        return by_mac.filter(|address| is_routable(*address));
    }
    let name = name?;
    let mut named = leases
        .iter()
        .filter(valid)
        .filter(|lease| matches!(lease.client, Client::Identifier(_)) && lease.name.as_deref() == Some(name));
    let first = named.next()?;
    let clients_agree = named.all(|lease| lease.client == first.client);
    let mut same = leases.iter().filter(valid).filter(|lease| lease.client == first.client);
    clients_agree.then(|| newest(&mut same)).flatten().filter(|address| is_routable(*address))
}

/// The address that the neighbour table, as `arp -an` prints it, gives for a hardware address. `interface` is where to look, when
/// that is known: one address may be in the table of several bridges.
#[must_use]
pub fn neighbour(arp: &str, mac: MacAddr, interface: Option<&str>) -> Option<Ipv4Addr> {
    arp.lines().find_map(|line| {
        // "? (ADDRESS) at MAC on INTERFACE …"
        let mut words = line.split_whitespace().skip(1);
        let address: Ipv4Addr = words.next()?.strip_prefix('(')?.strip_suffix(')')?.parse().ok()?;
        let (at, hardware, on, device) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let right = at == "at" && on == "on" && unpadded(hardware) == Some(mac);
        (right && interface.is_none_or(|wanted| wanted == device) && is_routable(address)).then_some(address)
    })
}

/// A hardware address whose octets may lack their leading zeros.
fn unpadded(text: &str) -> Option<MacAddr> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let part = parts.next().filter(|part| matches!(part.len(), 1 | 2))?;
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(MacAddr::new(octets))
}

/// What a guest made up for itself (169.254.0.0/16) leads nowhere.
fn is_routable(address: Ipv4Addr) -> bool {
    !address.is_link_local() && !address.is_unspecified() && !address.is_loopback()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The form of a file on a host that had four guests: one came twice, one identifies itself by a DUID, one is over.
    const FILE: &str = "{
\tname=runner
\tip_address=192.168.64.7
\thw_address=1,2:cf:58:3b:87:a6
\tidentifier=1,2:cf:58:3b:87:a6
\tlease=0x6748f0c1
}
{
\tname=runner
\tip_address=192.168.64.5
\thw_address=1,2:cf:58:3b:87:a6
\tidentifier=1,2:cf:58:3b:87:a6
\tlease=0x67480000
}
{
\tname=ubuntu
\tip_address=192.168.64.8
\thw_address=ff,f1:f5:dd:7f:0:2:0:0:ab:11:c6:2e:7f:5a:21:f1:b2:4c
\tidentifier=ff,f1:f5:dd:7f:0:2:0:0:ab:11:c6:2e:7f:5a:21:f1:b2:4c
\tlease=0x6748f0d0
}
{
\tip_address=192.168.64.5
\thw_address=1,a:0:0:0:0:1
\tlease=0x6748f100
}
";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn mac(text: &str) -> MacAddr {
        text.parse().unwrap()
    }

    const NOW: i64 = 0x6748_0100;

    #[test]
    fn a_file_is_read() {
        let all = leases(FILE);
        assert_eq!(all.len(), 4);
        assert_eq!(all[0].client, Client::Mac(mac("02:cf:58:3b:87:a6")), "octets without leading zeros");
        assert_eq!(all[0].ends, Some(at(0x6748_f0c1)));
        assert!(matches!(&all[2].client, Client::Identifier(id) if id.starts_with("ff,f1:f5")));
        assert_eq!((all[3].name.as_deref(), all[3].address), (None, Ipv4Addr::new(192, 168, 64, 5)));
    }

    #[test]
    fn the_newest_lease_that_is_not_over_counts() {
        let all = leases(FILE);
        let runner = mac("02:cf:58:3b:87:a6");
        assert_eq!(leased(&all, runner, None, at(NOW)), Some(Ipv4Addr::new(192, 168, 64, 7)));
        assert_eq!(leased(&all, runner, None, at(0x6749_0000)), None, "all of them are over");
        assert_eq!(leased(&all, mac("02:00:00:00:00:01"), None, at(NOW)), None);
    }

    #[test]
    fn a_guest_with_a_duid_is_found_by_a_name_that_is_its_own() {
        let all = leases(FILE);
        let unknown = mac("02:00:00:00:00:02");
        assert_eq!(leased(&all, unknown, Some("ubuntu"), at(NOW)), Some(Ipv4Addr::new(192, 168, 64, 8)));
        assert_eq!(
            leased(&all, unknown, Some("runner"), at(NOW)),
            None,
            "another guest's name, with a hardware address"
        );
        let twice = FILE.replace("hw_address=1,a:0:0:0:0:1", "hw_address=ff,1:2:3\n\tname=ubuntu");
        assert_eq!(leased(&leases(&twice), unknown, Some("ubuntu"), at(NOW)), None, "two guests with that name");
    }

    #[test]
    fn an_address_that_went_to_another_guest_is_no_longer_the_first_ones() {
        let text = "{\nip_address=192.168.64.5\nhw_address=1,2:0:0:0:0:1\nlease=0x67490000\n}\n\
                    {\nip_address=192.168.64.5\nhw_address=1,2:0:0:0:0:2\nlease=0x67490001\n}\n";
        let all = leases(text);
        assert_eq!(leased(&all, mac("02:00:00:00:00:01"), None, at(NOW)), None);
        assert_eq!(leased(&all, mac("02:00:00:00:00:02"), None, at(NOW)), Some(Ipv4Addr::new(192, 168, 64, 5)));
    }

    #[test]
    fn a_block_that_is_cut_short_costs_only_itself() {
        let cut = format!("{{\n\tname=half\n\tip_addr\n{FILE}{{\n\tip_address=192.168.64.20\n");
        assert_eq!(leases(&cut), leases(FILE));
    }

    #[test]
    fn the_neighbour_table_is_read() {
        let arp = "? (192.168.64.1) at 3e:22:fb:5f:8c:64 on bridge100 ifscope permanent [bridge]
? (192.168.64.7) at 2:cf:58:3b:87:a6 on bridge100 ifscope [bridge]
? (192.168.64.9) at (incomplete) on bridge100 ifscope [bridge]
? (169.254.3.4) at 2:cf:58:3b:87:a7 on en0 [ethernet]
router.lan (10.0.0.1) at 2:cf:58:3b:87:a6 on en0 ifscope [ethernet]
";
        let runner = mac("02:cf:58:3b:87:a6");
        assert_eq!(neighbour(arp, runner, Some("bridge100")), Some(Ipv4Addr::new(192, 168, 64, 7)));
        assert_eq!(neighbour(arp, runner, Some("en0")), Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(neighbour(arp, mac("02:cf:58:3b:87:a7"), None), None, "an address that a guest made up");
        assert_eq!(neighbour("", runner, None), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_left_out(text in any::<String>(), octets in any::<[u8; 6]>()) {
            let mac = MacAddr::new(octets);
            let found = leased(&leases(&text), mac, Some("a"), at(NOW)).or_else(|| neighbour(&text, mac, None));
            prop_assert!(found.is_none_or(is_routable));
        }

        #[test]
        fn a_lease_is_found_whatever_its_octets(octets in any::<[u8; 6]>(), last in 2..255u8) {
            let written: Vec<String> = octets.iter().map(|octet| format!("{octet:x}")).collect();
            let address = Ipv4Addr::new(192, 168, 64, last);
            let text = format!("{{\nip_address={address}\nhw_address=1,{}\nlease=0x67490000\n}}\n", written.join(":"));
            prop_assert_eq!(leased(&leases(&text), MacAddr::new(octets), None, at(NOW)), Some(address));
        }
    }
}
