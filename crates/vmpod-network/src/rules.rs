//! The firewall of a network, as one text for `nft`. Pure.
//!
//! The rules never change, only the elements of the sets that they ask. All of it can be made anew in one transaction of the kernel, so
//! that there is no moment without rules and no rule that somebody forgot; a machine that comes or goes is a [`change`] of a few
//! elements, because the kernel takes some 20 ms to replace a table and 5 ms to add to one. Two tables carry our name and the bridge's;
//! nothing outside of them is read or touched.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::{
    address::Subnet,
    nat::{HostPort, Protocol, Reservation},
};

/// The name of both tables.
#[must_use]
pub fn table(bridge: &str) -> String {
    format!("vmpod_{bridge}")
}

/// Makes the tables what they are to be, whether they exist or not.
#[must_use]
pub fn ruleset(bridge: &str, subnet: Subnet, prefix: Ipv6Addr, machines: &[Reservation]) -> String {
    let elements = Elements::of(prefix, machines);
    [removal(bridge), routed(bridge, subnet, &elements), "\n".to_owned(), bridged(bridge, &elements)].concat()
}

/// Makes tables that are right for some machines right for others; none when they are.
#[must_use]
pub fn change(bridge: &str, prefix: Ipv6Addr, before: &[Reservation], after: &[Reservation]) -> Option<String> {
    let (before, after) = (Elements::of(prefix, before), Elements::of(prefix, after));
    let mut lines = Vec::new();
    // Removals first: a port of the host may lead elsewhere now.
    for (verb, from, to) in [("delete", &after, &before), ("add", &before, &after)] {
        for ((family, set), elements) in &to.0 {
            let none = BTreeSet::new();
            let there = from.0.get(&(*family, *set)).unwrap_or(&none);
            let wanted: Vec<_> = elements.difference(there).map(String::as_str).collect();
            if !wanted.is_empty() {
                lines.push(format!("{verb} element {family} {} {set} {{ {} }}\n", table(bridge), wanted.join(", ")));
            }
        }
    }
    (!lines.is_empty()).then(|| lines.concat())
}

/// Removes the tables, whether they exist or not.
#[must_use]
pub fn removal(bridge: &str) -> String {
    let table = table(bridge);
    // A table must exist to be removed.
    ["inet", "bridge"].map(|family| format!("table {family} {table}\ndelete table {family} {table}\n")).concat()
}

/// The elements of each set and map, by the table's family and the set's name.
struct Elements(BTreeMap<(&'static str, &'static str), BTreeSet<String>>);

impl Elements {
    fn of(prefix: Ipv6Addr, machines: &[Reservation]) -> Self {
        let mut all = Self(BTreeMap::new());
        for machine in machines {
            let (interface, mac, address) = (format!("\"{}\"", machine.interface), machine.mac, machine.address);
            for port in &machine.ports {
                let (everywhere, at) = match port.protocol {
                    Protocol::Tcp => ("tcp_ports", "tcp_ports_at"),
                    Protocol::Udp => ("udp_ports", "udp_ports_at"),
                };
                all.add("inet", if port.host.is_some() { at } else { everywhere }, forward(address, port));
            }
            if machine.isolated {
                all.add("inet", "isolated", address.to_string());
                all.add("inet", "isolated6", crate::advert::address(prefix, mac).to_string());
                all.add("bridge", "isolated", interface.clone());
            }
            all.add("bridge", "macs", format!("{interface} . {mac}"));
            all.add("bridge", "addresses", format!("{interface} . {mac} . {address}"));
            all.add("bridge", "ports", interface);
        }
        all
    }

    fn add(&mut self, family: &'static str, set: &'static str, element: String) {
        self.0.entry((family, set)).or_default().insert(element);
    }

    /// The line of a set's definition with its elements; nothing when there are none.
    fn line(&self, family: &'static str, set: &'static str) -> String {
        let Some(elements) = self.0.get(&(family, set)) else { return String::new() };
        let elements: Vec<_> = elements.iter().map(String::as_str).collect();
        format!("\t\telements = {{ {} }}\n", elements.join(", "))
    }
}

/// What passes through the host: masquerading outwards, ports inwards, isolation.
fn routed(bridge: &str, subnet: Subnet, elements: &Elements) -> String {
    let table = table(bridge);
    let maps = [
        ("tcp_ports", "inet_service"),
        ("tcp_ports_at", "ipv4_addr . inet_service"),
        ("udp_ports", "inet_service"),
        ("udp_ports_at", "ipv4_addr . inet_service"),
    ]
    .map(|(map, key)| {
        let elements = elements.line("inet", map);
        format!("\tmap {map} {{\n\t\ttype {key} : ipv4_addr . inet_service\n{elements}\t}}\n")
    })
    .concat();
    // To the host's own addresses, but for loopback: what comes from there can't be answered from elsewhere.
    let inwards: String = ["tcp", "udp"]
        .map(|name| {
            format!(
                "\t\tip daddr != 127.0.0.0/8 fib daddr type local dnat ip to ip daddr . {name} dport map @{name}_ports_at\n\
                 \t\tip daddr != 127.0.0.0/8 fib daddr type local dnat ip to {name} dport map @{name}_ports\n"
            )
        })
        .concat();
    format!(
        "table inet {table} {{\n{maps}\
         \tset isolated {{\n\t\ttype ipv4_addr\n{isolated}\t}}\n\
         \tset isolated6 {{\n\t\ttype ipv6_addr\n{isolated6}\t}}\n\
         \tchain outwards {{\n\t\ttype nat hook postrouting priority 100\n\
         \t\tip saddr {subnet} oifname != \"{bridge}\" masquerade\n\
         \t\tip saddr {subnet} ip daddr {subnet} ct status dnat masquerade\n\t}}\n\
         \tchain inwards {{\n\t\ttype nat hook prerouting priority -100\n{inwards}\t}}\n\
         \tchain inwards_from_host {{\n\t\ttype nat hook output priority -100\n{inwards}\t}}\n\
         \tchain between {{\n\t\ttype filter hook forward priority 0\n\
         \t\tiifname != \"{bridge}\" oifname != \"{bridge}\" accept\n\
         \t\tct status dnat accept\n\t\tct state established,related accept\n\
         \t\tiifname != \"{bridge}\" drop\n\t\toifname != \"{bridge}\" accept\n\
         \t\tip saddr @isolated drop\n\t\tip daddr @isolated drop\n\
         \t\tip6 saddr @isolated6 drop\n\t\tip6 daddr @isolated6 drop\n\t}}\n}}\n",
        isolated = elements.line("inet", "isolated"),
        isolated6 = elements.line("inet", "isolated6"),
    )
}

fn forward(address: Ipv4Addr, port: &HostPort) -> String {
    let at = port.host.map_or_else(String::new, |host| format!("{host} . "));
    format!("{at}{} : {address} . {}", port.host_port, port.guest_port)
}

/// What passes between the bridge's ports: each machine speaks under its own addresses only.
fn bridged(bridge: &str, elements: &Elements) -> String {
    let [ports, isolated, macs, addresses] =
        ["ports", "isolated", "macs", "addresses"].map(|set| elements.line("bridge", set));
    format!(
        "table bridge {table} {{\n\
         \tset ports {{\n\t\ttype ifname\n{ports}\t}}\n\
         \tset isolated {{\n\t\ttype ifname\n{isolated}\t}}\n\
         \tset macs {{\n\t\ttype ifname . ether_addr\n{macs}\t}}\n\
         \tset addresses {{\n\t\ttype ifname . ether_addr . ipv4_addr\n{addresses}\t}}\n\
         \tchain honest {{\n\t\ttype filter hook prerouting priority -300\n\
         \t\tiifname != @ports accept\n\
         \t\tiifname . ether saddr != @macs drop\n\
         \t\tether type arp iifname . arp saddr ether . arp saddr ip @addresses accept\n\
         \t\tether type arp arp saddr ip 0.0.0.0 accept\n\
         \t\tether type arp drop\n\
         \t\tudp sport 67 drop\n\
         \t\ticmpv6 type {{ nd-router-advert, nd-redirect }} drop\n\
         \t\tudp sport 547 drop\n\
         \t\tether type ip iifname . ether saddr . ip saddr @addresses accept\n\
         \t\tether type ip ip saddr 0.0.0.0 udp dport 67 accept\n\
         \t\tether type ip drop\n\t}}\n\
         \tchain between {{\n\t\ttype filter hook forward priority 0\n\
         \t\tiifname @isolated drop\n\t\toifname @isolated drop\n\t}}\n}}\n",
        table = table(bridge),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{MacAddr, local_prefix};

    fn machine(name: &str, last: u8) -> Reservation {
        Reservation {
            owner: name.to_owned(),
            mac: MacAddr::new([2, 0, 0, 0, 0, last]),
            address: [10, 201, 0, last].into(),
            hostname: Some(name.to_owned()),
            interface: format!("vmp{last}"),
            isolated: false,
            ports: Vec::new(),
        }
    }

    #[test]
    fn the_firewall_of_two_machines() {
        let mut web = machine("web", 7);
        web.ports = vec![
            HostPort { protocol: Protocol::Tcp, host: None, host_port: 8080, guest_port: 80 },
            HostPort { protocol: Protocol::Udp, host: Some([192, 0, 2, 1].into()), host_port: 53, guest_port: 53 },
        ];
        let mut alone = machine("alone", 8);
        alone.isolated = true;
        insta::assert_snapshot!(ruleset("vmpod0", Subnet::USUAL, local_prefix("t"), &[web, alone]));
    }

    fn elements(machines: &[Reservation]) -> BTreeMap<(&'static str, &'static str), BTreeSet<String>> {
        Elements::of(local_prefix("t"), machines).0
    }

    #[test]
    fn a_change_names_what_differs_and_nothing_else() {
        let (a, b) = (machine("a", 7), machine("b", 8));
        let change = |before: &[Reservation], after: &[Reservation]| change("vmpod0", local_prefix("t"), before, after);
        assert_eq!(change(std::slice::from_ref(&a), std::slice::from_ref(&a)), None);
        let mut moved = b.clone();
        moved.ports = vec![HostPort { protocol: Protocol::Tcp, host: None, host_port: 80, guest_port: 80 }];
        let mut before = a.clone();
        before.ports = vec![HostPort { protocol: Protocol::Tcp, host: None, host_port: 80, guest_port: 8080 }];
        insta::assert_snapshot!(change(&[before], &[a, moved]).unwrap());
        assert!(elements(&[b]).values().all(|set| set.len() == 1));
    }

    #[test]
    fn nothing_but_our_tables_is_named() {
        for line in ruleset("vmpod0", Subnet::USUAL, local_prefix("t"), &[machine("a", 2)]).lines() {
            if line.contains("table") {
                assert!(line.contains("vmpod_vmpod0"), "{line}");
            }
            assert!(!line.contains("flush"), "{line}");
        }
    }
}
