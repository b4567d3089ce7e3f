//! Which network a pod's machine is on, and what it has of it.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::{Container, Pod};
use vmpod_api::annotations;
use vmpod_machine::{HostPort, MachineId, Network, Protocol};
use vmpod_network::nat::{Config, Reservation};

use crate::{
    pod::{self, PodUid},
    sidecars,
};

/// A kind of network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The hypervisor's own: needs no privilege; the machine has a loopback address of this host.
    #[default]
    User,
    /// A bridge of this host's own: the machine has an address that this host reaches, and others through forwarded ports.
    Nat,
    /// A bridge of this name that somebody else keeps: the machine is on that network as any other, and gets its address there.
    Bridge(String),
}

/// Why a text names no network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("it takes \"user\", \"nat\" or \"bridge:NAME\", with the name of a bridge of the host")]
pub struct InvalidNetwork;

impl std::str::FromStr for NetworkMode {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        match text.split_once(':') {
            None if text == "user" => Ok(Self::User),
            None if text == "nat" => Ok(Self::Nat),
            // What the kernel takes for a name, and no file's way out of a directory (net/core/dev.c, dev_valid_name).
            Some(("bridge", name))
                if (1..=15).contains(&name.len())
                    && !matches!(name, "." | "..")
                    && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) =>
            {
                Ok(Self::Bridge(name.to_owned()))
            }
            _ => Err(InvalidNetwork),
        }
    }
}

impl NetworkMode {
    /// What the pod asks for; an error is what it says instead.
    pub(crate) fn asked(pod: &Pod) -> Result<Option<Self>, &str> {
        match pod::annotation(pod, annotations::NETWORK) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| text),
        }
    }

    /// What the pod gets on a node whose pods are usually on `usual`. Containers beside a machine reach it at an address of
    /// their own network, which only the hypervisor's forwarding listens on.
    pub(crate) fn of(pod: &Pod, usual: &Self) -> Self {
        let usual = if sidecars::any(pod) { &Self::User } else { usual };
        Self::asked(pod).ok().flatten().unwrap_or_else(|| usual.clone())
    }
}

/// Where a pod's machine is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    /// On the hypervisor's network, at this loopback address.
    User(Ipv4Addr),
    /// On the host's own bridge.
    Nat(&'a Config, Ipv4Addr),
    /// On a bridge of this name.
    Bridge(String),
    /// On Apple's network, or bridged to this interface.
    Vmnet(Option<String>),
}

impl<'a> Place<'a> {
    /// Apple's framework has two kinds of networks: the host's own, and the one of an interface.
    pub(crate) fn of_apple(pod: &Pod, usual: &NetworkMode) -> Self {
        Self::Vmnet(match NetworkMode::of(pod, usual) {
            NetworkMode::User | NetworkMode::Nat => None,
            NetworkMode::Bridge(interface) => Some(interface),
        })
    }

    /// An address tells by itself which network it is of: what the pod says now may not be what it said when it got it.
    pub(crate) fn of(
        pod: &Pod,
        usual: &NetworkMode,
        nat: &'a Config,
        address: Option<Ipv4Addr>,
    ) -> Result<Self, String> {
        match (address, NetworkMode::of(pod, usual)) {
            (Some(address), _) if nat.subnet.contains(address) => Ok(Self::Nat(nat, address)),
            (Some(address), _) => Ok(Self::User(address)),
            (None, NetworkMode::Bridge(name)) => Ok(Self::Bridge(name)),
            (None, _) => {
                Err(format!("the pod was on a bridge, and its annotation {} has changed", annotations::NETWORK))
            }
        }
    }
}

/// Whether the pod keeps other machines of its network away.
pub(crate) fn isolated(pod: &Pod) -> bool {
    pod::annotation(pod, annotations::NETWORK_ISOLATED) == Some("true")
}

/// The ports of this host that lead to the pod's machine.
pub(crate) fn host_ports(container: &Container) -> Vec<HostPort> {
    let port = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some(_) => return None,
        };
        let number = |number: i32| u16::try_from(number).ok().filter(|number| *number > 0);
        Some(HostPort {
            protocol,
            host: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()).filter(|ip: &Ipv4Addr| !ip.is_unspecified()),
            host_port: number(port.host_port?)?,
            guest_port: number(port.container_port)?,
        })
    };
    container.ports.iter().flatten().filter_map(port).collect()
}

/// The network interface of a machine that has its own address; none for one that is behind the hypervisor's network.
pub(crate) fn interface(place: &Place<'_>, id: &MachineId, uid: &PodUid, pod: &Pod) -> Option<Network> {
    let (bridge, address) = match place {
        Place::User(_) => return None,
        Place::Vmnet(bridged) => {
            return Some(Network::Vmnet {
                bridged: bridged.clone(),
                mac: vmpod_machine::MacAddr::derive(uid.as_str()),
                hostname: pod::hostname(pod),
            });
        }
        Place::Nat(config, address) => {
            let (address, gateway) = (*address, config.subnet.gateway());
            let assigned = vmpod_machine::Assigned { address, prefix: config.subnet.prefix(), gateway, dns: gateway };
            (config.bridge.clone(), Some(assigned))
        }
        Place::Bridge(name) => (name.clone(), None),
    };
    Some(Network::Tap {
        interface: vmpod_network::nat::interface(id.as_str()),
        bridge,
        address,
        mac: vmpod_machine::MacAddr::derive(uid.as_str()),
        hostname: pod::hostname(pod),
        isolated: isolated(pod),
        host_ports: pod::machine_container(pod).map(host_ports).unwrap_or_default(),
    })
}

/// What a machine has reserved of the host's own network; none when it isn't on it.
pub(crate) fn reservation(config: &Config, uid: &PodUid, networks: &[Network]) -> Option<Reservation> {
    let Some(Network::Tap { interface, bridge, address: Some(address), mac, hostname, isolated, host_ports }) =
        networks.first()
    else {
        return None;
    };
    (*bridge == config.bridge).then(|| Reservation {
        owner: uid.to_string(),
        mac: *mac,
        address: address.address,
        hostname: Some(hostname.clone()),
        interface: interface.clone(),
        isolated: *isolated,
        ports: host_ports.clone(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(annotations: &Value, containers: &Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "annotations": annotations}, "spec": {"containers": containers}
        }))
        .unwrap()
    }

    #[test]
    fn a_pods_word_comes_before_the_nodes() {
        let alone = json!([{"name": "vm"}]);
        let plain = pod(&json!({}), &alone);
        assert_eq!(NetworkMode::of(&plain, &NetworkMode::Nat), NetworkMode::Nat);
        let asks = pod(&json!({"vmpod.dev/network": "user"}), &alone);
        assert_eq!(NetworkMode::of(&asks, &NetworkMode::Nat), NetworkMode::User);
        assert_eq!(NetworkMode::asked(&pod(&json!({"vmpod.dev/network": "bridged"}), &alone)), Err("bridged"));
        let hybrid = pod(&json!({}), &json!([{"name": "vm"}, {"name": "beside"}]));
        assert_eq!(NetworkMode::of(&hybrid, &NetworkMode::Nat), NetworkMode::User);
    }

    #[test]
    fn networks_have_the_names_of_bridges() {
        assert_eq!("bridge:br0".parse(), Ok(NetworkMode::Bridge("br0".to_owned())));
        for bad in
            ["", "bridge", "bridge:", "bridge:a/b", "bridge:..", "bridge:a b", "bridge:sixteen_letters_", "nat:x"]
        {
            assert_eq!(bad.parse::<NetworkMode>(), Err(InvalidNetwork), "{bad:?}");
        }
    }

    #[test]
    fn a_pod_stays_where_its_address_is() {
        let config =
            Config { bridge: "vmpod0".to_owned(), subnet: vmpod_network::Subnet::USUAL, host: "host".to_owned() };
        let asks = pod(&json!({"vmpod.dev/network": "bridge:br0"}), &json!([{"name": "vm"}]));
        let place =
            |address: Option<[u8; 4]>| Place::of(&asks, &NetworkMode::Nat, &config, address.map(Ipv4Addr::from));
        assert_eq!(place(None), Ok(Place::Bridge("br0".to_owned())));
        assert_eq!(place(Some([10, 201, 0, 9])), Ok(Place::Nat(&config, [10, 201, 0, 9].into())));
        assert_eq!(place(Some([127, 64, 0, 9])), Ok(Place::User([127, 64, 0, 9].into())));
        let plain = pod(&json!({}), &json!([{"name": "vm"}]));
        assert!(Place::of(&plain, &NetworkMode::User, &config, None).is_err());
    }

    #[test]
    fn apple_has_two_kinds_of_networks() {
        let place = |text: &str| {
            let pod = pod(&json!({"vmpod.dev/network": text}), &json!([{"name": "vm"}]));
            Place::of_apple(&pod, &NetworkMode::Bridge("en1".to_owned()))
        };
        assert_eq!(place("user"), Place::Vmnet(None));
        assert_eq!(place("nat"), Place::Vmnet(None));
        assert_eq!(place("bridge:en0"), Place::Vmnet(Some("en0".to_owned())));
        assert_eq!(place(""), Place::Vmnet(Some("en1".to_owned())), "the node's usual one");
        let uid = PodUid::parse("5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a").unwrap();
        let pod = pod(&json!({}), &json!([{"name": "vm"}]));
        let made = interface(&place("user"), &uid.machine(0), &uid, &pod).unwrap();
        let mac = vmpod_machine::MacAddr::derive(uid.as_str());
        assert_eq!(made, Network::Vmnet { bridged: None, mac, hostname: "web".to_owned() });
    }

    #[test]
    fn host_ports_are_those_that_name_one() {
        let pod = pod(
            &json!({}),
            &json!([{"name": "vm", "ports": [
                {"containerPort": 80}, {"containerPort": 443, "hostPort": 8443},
                {"containerPort": 53, "hostPort": 53, "protocol": "UDP", "hostIP": "192.0.2.1"},
                {"containerPort": 9, "hostPort": 9, "hostIP": "0.0.0.0"},
                {"containerPort": 1, "hostPort": 1, "protocol": "SCTP"}
            ]}]),
        );
        let ports = host_ports(pod::machine_container(&pod).unwrap());
        let port = |protocol, host, host_port, guest_port| HostPort { protocol, host, host_port, guest_port };
        assert_eq!(
            ports,
            [
                port(Protocol::Tcp, None, 8443, 443),
                port(Protocol::Udp, Some([192, 0, 2, 1].into()), 53, 53),
                port(Protocol::Tcp, None, 9, 9),
            ]
        );
    }

    #[test]
    fn a_machine_on_the_bridge_is_recognised_as_what_it_reserved() {
        let config =
            Config { bridge: "vmpod0".to_owned(), subnet: vmpod_network::Subnet::USUAL, host: "host".to_owned() };
        let uid = PodUid::parse("5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a").unwrap();
        let pod = pod(&json!({"vmpod.dev/network-isolated": "true"}), &json!([{"name": "vm"}]));
        let place = Place::of(&pod, &NetworkMode::User, &config, Some([10, 201, 0, 9].into())).unwrap();
        let tap = interface(&place, &uid.machine(3), &uid, &pod).unwrap();
        let reserved = reservation(&config, &uid, std::slice::from_ref(&tap)).unwrap();
        assert_eq!(reserved.owner, uid.to_string());
        assert_eq!((reserved.address, reserved.isolated), ([10, 201, 0, 9].into(), true));
        assert_eq!(reserved.hostname.as_deref(), Some("web"));
        let other = Config { bridge: "other".to_owned(), ..config };
        assert_eq!(reservation(&other, &uid, &[tap]), None, "another agent's bridge");
    }
}
