//! A network of this host's own for machines, from the first one to the last.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    NetworkError,
    address::{MacAddr, Subnet, first_of, local_prefix},
};

/// The name of the bridge unless another is chosen.
pub const USUAL_BRIDGE: &str = "vmpod0";

/// What our bridges carry (`ip link show`), so that they are known from others.
pub const ALIAS: &str = "vmpod nat";

/// What a network is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The bridge: an interface's name of at most 15 bytes.
    pub bridge: String,
    /// The machines' addresses.
    pub subnet: Subnet,
    /// Who this host is, unlike others: the IPv6 prefix is made from it.
    pub host: String,
}

impl Config {
    /// The machines' IPv6 prefix, of 64 bits.
    #[must_use]
    pub fn prefix(&self) -> Ipv6Addr {
        local_prefix(&format!("{}/{}", self.host, self.bridge))
    }

    /// The host's own IPv6 address on the network.
    #[must_use]
    pub fn gateway6(&self) -> Ipv6Addr {
        first_of(self.prefix())
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of this host that leads to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address of this host; none for each but loopback.
    pub host: Option<Ipv4Addr>,
    /// The port there.
    pub host_port: u16,
    /// The port in the guest.
    pub guest_port: u16,
}

/// What one machine has of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Whose it is: a pod's UID. One owner has one.
    pub owner: String,
    /// The interface's hardware address inside the guest.
    pub mac: MacAddr,
    /// Its address.
    pub address: Ipv4Addr,
    /// The name that the guest hears.
    pub hostname: Option<String>,
    /// The interface on the host.
    pub interface: String,
    /// Whether no other machine of the network reaches it, nor it them.
    pub isolated: bool,
    /// Ports of this host that lead to it.
    pub ports: Vec<HostPort>,
}

/// The name of a machine's interface on the host: at most 15 bytes, different for different machines.
#[must_use]
pub fn interface(machine: &str) -> String {
    let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:tap:{machine}").as_bytes());
    format!("vmp{}", &id.simple().to_string()[..11])
}

/// The network. It exists while somebody has something reserved.
#[derive(Clone)]
pub struct Nat {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    machines: BTreeMap<String, Reservation>,
    up: Option<backend::Up>,
}

impl std::fmt::Debug for Nat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nat").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl Nat {
    /// A network that nobody is on. Nothing of the host is touched.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { inner: Arc::new(Inner { config, state: tokio::sync::Mutex::default() }) }
    }

    /// What it is.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Takes over what a process left that is no more: `machines` are those that still run. Without any, what is left of the
    /// network is removed, unless another process has it.
    pub async fn restore(&self, machines: Vec<Reservation>) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        if machines.is_empty() {
            return backend::sweep(&self.inner.config).await;
        }
        state.machines = machines.into_iter().map(|machine| (machine.owner.clone(), machine)).collect();
        self.apply(&mut state).await
    }

    /// Gives a machine its place: the network is made if it isn't there, and the address answers to the machine's DHCP
    /// requests and host's packets from now on. A second time with the same reservation is no error.
    pub async fn reserve(&self, machine: Reservation) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        if state.up.is_some() && state.machines.get(&machine.owner) == Some(&machine) {
            return Ok(());
        }
        if let Some((port, other)) = taken(&machine, state.machines.values()) {
            return Err(NetworkError::PortTaken { port, owner: other.to_owned() });
        }
        let (owner, before) = (machine.owner.clone(), state.machines.insert(machine.owner.clone(), machine));
        let done = self.apply(&mut state).await;
        if done.is_err() {
            // Whoever was refused has nothing.
            match before {
                Some(before) => state.machines.insert(owner, before),
                None => state.machines.remove(&owner),
            };
            if state.machines.is_empty()
                && let Err(error) = self.clear(&mut state).await
            {
                tracing::debug!(%error, "a network that could not be made is left");
            }
        }
        done
    }

    /// Takes an owner's place away; the network goes with the last one. An owner without one is no error.
    pub async fn release(&self, owner: &str) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        let Some(before) = state.machines.remove(owner) else { return Ok(()) };
        let done = if state.machines.is_empty() { self.clear(&mut state).await } else { self.apply(&mut state).await };
        if done.is_err() {
            state.machines.insert(owner.to_owned(), before);
        }
        done
    }

    /// Removes the network that nobody is on any more, or what is left of it.
    async fn clear(&self, state: &mut State) -> Result<(), NetworkError> {
        match state.up.take() {
            Some(up) => up.down(&self.inner.config).await,
            None => backend::sweep(&self.inner.config).await,
        }
    }

    async fn apply(&self, state: &mut State) -> Result<(), NetworkError> {
        let machines: Vec<_> = state.machines.values().cloned().collect();
        let up = match &mut state.up {
            Some(up) => up,
            None => state.up.insert(backend::Up::claim(&self.inner.config, &machines).await?),
        };
        up.apply(&self.inner.config, &machines).await
    }
}

/// A port of the host that this machine wants and another one has.
fn taken<'a>(machine: &Reservation, others: impl Iterator<Item = &'a Reservation>) -> Option<(u16, &'a str)> {
    let same = |one: &HostPort, two: &HostPort| {
        let meet = one.host.is_none() || two.host.is_none() || one.host == two.host;
        one.protocol == two.protocol && one.host_port == two.host_port && meet
    };
    others.filter(|other| other.owner != machine.owner).find_map(|other| {
        let port = machine.ports.iter().find(|port| other.ports.iter().any(|had| same(port, had)))?;
        Some((port.host_port, other.owner.as_str()))
    })
}

#[cfg(target_os = "linux")]
use crate::serve as backend;

#[cfg(not(target_os = "linux"))]
mod backend {
    use super::{Config, NetworkError, Reservation};

    /// Never made.
    pub(super) enum Up {}

    impl Up {
        #[expect(clippy::unused_async, reason = "as where it can be done")]
        pub(super) async fn claim(_: &Config, _: &[Reservation]) -> Result<Self, NetworkError> {
            Err(NetworkError::Unsupported)
        }

        #[expect(clippy::unused_async, reason = "as where it can be done")]
        pub(super) async fn apply(&mut self, _: &Config, _: &[Reservation]) -> Result<(), NetworkError> {
            match *self {}
        }

        #[expect(clippy::unused_async, reason = "as where it can be done")]
        pub(super) async fn down(self, _: &Config) -> Result<(), NetworkError> {
            match self {}
        }
    }

    #[expect(clippy::unused_async, reason = "as where it can be done")]
    pub(super) async fn sweep(_: &Config) -> Result<(), NetworkError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_of_the_host_has_one_machine() {
        let machine = |owner: &str, protocol, host: Option<[u8; 4]>, host_port| Reservation {
            owner: owner.to_owned(),
            mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            address: [10, 201, 0, 2].into(),
            hostname: None,
            interface: "vmp".to_owned(),
            isolated: false,
            ports: vec![HostPort { protocol, host: host.map(Ipv4Addr::from), host_port, guest_port: 80 }],
        };
        let has = machine("a", Protocol::Tcp, Some([192, 0, 2, 1]), 80);
        for (wants, meets) in [
            (machine("b", Protocol::Tcp, None, 80), true),
            (machine("b", Protocol::Tcp, Some([192, 0, 2, 1]), 80), true),
            (machine("b", Protocol::Tcp, Some([192, 0, 2, 2]), 80), false),
            (machine("b", Protocol::Udp, None, 80), false),
            (machine("b", Protocol::Tcp, None, 81), false),
            (machine("a", Protocol::Tcp, None, 80), false),
        ] {
            assert_eq!(taken(&wants, std::iter::once(&has)).is_some(), meets, "{wants:?}");
        }
    }

    #[test]
    fn interfaces_have_names_that_the_kernel_takes() {
        let (a, b) = (interface("a"), interface("b"));
        assert!(a.len() <= 15 && a.starts_with("vmp") && a != b, "{a} {b}");
        assert_eq!(a, interface("a"));
    }
}
