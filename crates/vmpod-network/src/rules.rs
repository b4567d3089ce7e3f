//! The firewall of a network, as one text for `nft`. Pure.
//!
//! The whole of it is always made anew, in one transaction of the kernel: there is no moment without rules and no rule that
//! somebody forgot. Two tables carry our name and the bridge's; nothing outside of them is read or touched.

use std::net::{Ipv4Addr, Ipv6Addr};

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
    [removal(bridge), routed(bridge, subnet, prefix, machines), "\n".to_owned(), bridged(bridge, machines)].concat()
}

/// Removes the tables, whether they exist or not.
#[must_use]
pub fn removal(bridge: &str) -> String {
    let table = table(bridge);
    // A table must exist to be removed.
    ["inet", "bridge"].map(|family| format!("table {family} {table}\ndelete table {family} {table}\n")).concat()
}

/// What passes through the host: masquerading outwards, ports inwards, isolation.
fn routed(bridge: &str, subnet: Subnet, prefix: Ipv6Addr, machines: &[Reservation]) -> String {
    let isolated = |v6: bool| {
        let elements = machines.iter().filter(|machine| machine.isolated);
        set(elements.map(|machine| {
            if v6 { crate::advert::address(prefix, machine.mac).to_string() } else { machine.address.to_string() }
        }))
    };
    let ports = |protocol: Protocol, everywhere: bool| {
        let all = machines.iter().flat_map(|machine| machine.ports.iter().map(move |port| (machine.address, port)));
        let wanted = all.filter(|(_, port)| port.protocol == protocol && port.host.is_none() == everywhere);
        set(wanted.map(|(address, port)| forward(address, port)))
    };
    let table = table(bridge);
    let maps = [(Protocol::Tcp, "tcp"), (Protocol::Udp, "udp")]
        .map(|(protocol, name)| {
            format!(
                "\tmap {name}_ports {{\n\t\ttype inet_service : ipv4_addr . inet_service\n{}\t}}\n\
                 \tmap {name}_ports_at {{\n\t\ttype ipv4_addr . inet_service : ipv4_addr . inet_service\n{}\t}}\n",
                ports(protocol, true),
                ports(protocol, false),
            )
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
         \t\tiifname != \"{bridge}\" accept\n\t\toifname != \"{bridge}\" accept\n\t\tct status dnat accept\n\
         \t\tip saddr @isolated drop\n\t\tip daddr @isolated drop\n\
         \t\tip6 saddr @isolated6 drop\n\t\tip6 daddr @isolated6 drop\n\t}}\n}}\n",
        isolated = isolated(false),
        isolated6 = isolated(true),
    )
}

fn forward(address: Ipv4Addr, port: &HostPort) -> String {
    let at = port.host.map_or_else(String::new, |host| format!("{host} . "));
    format!("{at}{} : {address} . {}", port.host_port, port.guest_port)
}

/// What passes between the bridge's ports: each machine speaks under its own addresses only.
fn bridged(bridge: &str, machines: &[Reservation]) -> String {
    let of = |machine: &Reservation| format!("\"{}\" . {}", machine.interface, machine.mac);
    let ports = set(machines.iter().map(|machine| format!("\"{}\"", machine.interface)));
    let isolated = set(machines.iter().filter(|m| m.isolated).map(|machine| format!("\"{}\"", machine.interface)));
    let macs = set(machines.iter().map(of));
    let addresses = set(machines.iter().map(|machine| format!("{} . {}", of(machine), machine.address)));
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

/// The elements of a set or map; nothing when there are none.
fn set(elements: impl Iterator<Item = String>) -> String {
    let mut elements: Vec<_> = elements.collect();
    elements.sort();
    elements.dedup();
    if elements.is_empty() { String::new() } else { format!("\t\telements = {{ {} }}\n", elements.join(", ")) }
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
