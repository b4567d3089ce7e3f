//! What the kernel is asked over netlink.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec,
    packet_route::{
        address::AddressAttribute,
        link::{LinkAttribute, LinkMessage},
    },
};
use tokio_util::task::AbortOnDropHandle;

use crate::{NetworkError, address::MacAddr};

/// A connection to the kernel's routing tables. It ends with this value.
pub(crate) struct Kernel {
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

/// An interface as far as it matters here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// What somebody wrote on it.
    pub(crate) alias: Option<String>,
    /// The bridge it is a port of.
    pub(crate) controller: Option<u32>,
}

impl Kernel {
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| kernel("ask the kernel for its interfaces", &error))?;
        Ok(Self { handle, _connection: AbortOnDropHandle::new(tokio::spawn(connection)) })
    }

    /// The interface of this name.
    pub(crate) async fn interface(&self, name: &str) -> Result<Option<Interface>, NetworkError> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.map(|message| describe(&message))),
            Err(error) if errno(&error) == Some(rustix::io::Errno::NODEV) => Ok(None),
            Err(error) => Err(kernel(&format!("look for the interface {name}"), &error)),
        }
    }

    /// Makes a bridge that carries `alias`, with a hardware address of its own: by itself it would take the lowest of its
    /// ports', and change it under the guests' feet.
    pub(crate) async fn add_bridge(&self, name: &str, mac: MacAddr, alias: &str) -> Result<(), NetworkError> {
        let message = LinkBridge::new(name)
            .append_extra_attribute(LinkAttribute::Address(mac.octets().to_vec()))
            .append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
            .build();
        let made = self.handle.link().add(message).execute().await;
        made.map_err(|error| kernel(&format!("make the bridge {name}"), &error))
    }

    pub(crate) async fn set_up(&self, interface: &Interface, alias: &str) -> Result<(), NetworkError> {
        // An alias isn't taken when an interface is made, by some kernels.
        let message = LinkUnspec::new_with_index(interface.index)
            .append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
            .up()
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| kernel(&format!("bring the interface {} up", interface.name), &error))
    }

    pub(crate) async fn remove(&self, interface: &Interface) -> Result<(), NetworkError> {
        match self.handle.link().del(interface.index).execute().await {
            Err(error) if errno(&error) != Some(rustix::io::Errno::NODEV) => {
                Err(kernel(&format!("remove the interface {}", interface.name), &error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) async fn add_address(
        &self,
        interface: &Interface,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), NetworkError> {
        let added = self.handle.address().add(interface.index, address, prefix).replace().execute().await;
        added.map_err(|error| kernel(&format!("give {address}/{prefix} to {}", interface.name), &error))
    }

    /// The IPv4 addresses of this host, with their prefixes and interfaces' numbers.
    pub(crate) async fn addresses(&self) -> Result<Vec<(Ipv4Addr, u8, u32)>, NetworkError> {
        let mut found = Vec::new();
        let mut all = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) =
            all.try_next().await.map_err(|error| kernel("look at this host's addresses", &error))?
        {
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            });
            if let Some(address) = address {
                found.push((address, message.header.prefix_len, message.header.index));
            }
        }
        Ok(found)
    }

    /// The names of a bridge's ports.
    pub(crate) async fn ports(&self, bridge: &Interface) -> Result<Vec<String>, NetworkError> {
        let mut found = Vec::new();
        let mut all = std::pin::pin!(self.handle.link().get().execute());
        while let Some(message) =
            all.try_next().await.map_err(|error| kernel("look at this host's interfaces", &error))?
        {
            let interface = describe(&message);
            if interface.controller == Some(bridge.index) {
                found.push(interface.name);
            }
        }
        Ok(found)
    }

    pub(crate) async fn interface_name(&self, index: u32) -> Option<String> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        Some(describe(&found.ok()??).name)
    }

    /// Writes down for good which hardware address a neighbour has: nobody has to be asked, and nobody can lie.
    pub(crate) async fn add_neighbour(
        &self,
        interface: &Interface,
        address: Ipv4Addr,
        mac: MacAddr,
    ) -> Result<(), NetworkError> {
        let request = self.handle.neighbours().add(interface.index, address.into());
        let added = request.link_layer_address(&mac.octets()).replace().execute().await;
        added.map_err(|error| kernel(&format!("note the neighbour {address} on {}", interface.name), &error))
    }

    /// The neighbours that were written down for good on an interface.
    pub(crate) async fn neighbours(&self, interface: &Interface) -> Result<Vec<Ipv4Addr>, NetworkError> {
        use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
        let mut found = Vec::new();
        let request = self.handle.neighbours().get().set_address_family(rtnetlink::packet_route::AddressFamily::Inet);
        let mut all = std::pin::pin!(request.execute());
        while let Some(message) =
            all.try_next().await.map_err(|error| kernel("look at this host's neighbours", &error))?
        {
            if message.header.ifindex != interface.index || message.header.state != NeighbourState::Permanent {
                continue;
            }
            found.extend(message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
                _ => None,
            }));
        }
        Ok(found)
    }

    pub(crate) async fn remove_neighbour(&self, interface: &Interface, address: Ipv4Addr) -> Result<(), NetworkError> {
        let mut request = self.handle.neighbours().add(interface.index, address.into());
        let message = request.message_mut().clone();
        match self.handle.neighbours().del(message).execute().await {
            Err(error) if errno(&error) != Some(rustix::io::Errno::NOENT) => {
                Err(kernel(&format!("forget the neighbour {address} on {}", interface.name), &error))
            }
            _ => Ok(()),
        }
    }

    /// Makes an interface a port of a bridge, and brings it up.
    pub(crate) async fn attach(&self, interface: &Interface, bridge: &Interface) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(interface.index).controller(bridge.index).up().build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| kernel(&format!("attach {} to the bridge {}", interface.name, bridge.name), &error))
    }
}

/// Makes an interface of this host a port of a bridge and brings it up; what it is already, it stays.
pub async fn attach(interface: &str, bridge: &str) -> Result<(), NetworkError> {
    let kernel = Kernel::open()?;
    let missing = |name: &str| NetworkError::Kernel {
        action: format!("attach {interface} to the bridge {bridge}"),
        why: format!("there is no interface {name}"),
    };
    let port = kernel.interface(interface).await?.ok_or_else(|| missing(interface))?;
    let bridge = kernel.interface(bridge).await?.ok_or_else(|| missing(bridge))?;
    kernel.attach(&port, &bridge).await
}

fn describe(message: &LinkMessage) -> Interface {
    let mut interface = Interface { index: message.header.index, ..Interface::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => interface.alias = Some(alias.clone()),
            LinkAttribute::Controller(index) => interface.controller = Some(*index),
            _ => {}
        }
    }
    interface
}

fn errno(error: &rtnetlink::Error) -> Option<rustix::io::Errno> {
    let rtnetlink::Error::NetlinkError(message) = error else { return None };
    Some(rustix::io::Errno::from_raw_os_error(message.raw_code().abs()))
}

fn kernel(action: &str, error: &(impl std::error::Error + 'static)) -> NetworkError {
    let denied = (error as &dyn std::error::Error)
        .downcast_ref::<rtnetlink::Error>()
        .and_then(errno)
        .is_some_and(|errno| errno == rustix::io::Errno::PERM);
    let why = if denied { "this needs root (CAP_NET_ADMIN)".to_owned() } else { error.to_string() };
    NetworkError::Kernel { action: action.to_owned(), why }
}

/// A file of the kernel with one value.
pub(crate) fn set_kernel_value(path: &str, value: &str) -> Result<(), NetworkError> {
    let refused =
        |error: io::Error| NetworkError::Kernel { action: format!("write {value} to {path}"), why: error.to_string() };
    // Only what isn't so already: a host may forbid writing there and have it set.
    if std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value) {
        return Ok(());
    }
    std::fs::write(path, value).map_err(refused)
}
