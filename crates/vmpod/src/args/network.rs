//! The networks of the machines.

use clap::Args;
use vmpod_network::Subnet;
use vmpod_node::NetworkMode;

/// The networks of the machines.
#[derive(Clone, Debug, Args)]
pub(crate) struct Network {
    /// The network of pods that name none with the annotation vmpod.dev/network: user, nat or bridge:NAME
    #[arg(long = "network", value_name = "NETWORK", default_value = "user")]
    pub(crate) usual: NetworkMode,
    /// The bridge of the network nat; two agents on one host need two
    #[arg(long, value_name = "NAME", default_value = vmpod_network::nat::USUAL_BRIDGE, value_parser = bridge)]
    pub(crate) nat_bridge: String,
    /// The addresses of the network nat
    #[arg(long, value_name = "ADDRESS/BITS", default_value_t = Subnet::USUAL)]
    pub(crate) nat_subnet: Subnet,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            usual: NetworkMode::User,
            nat_bridge: vmpod_network::nat::USUAL_BRIDGE.to_owned(),
            nat_subnet: Subnet::USUAL,
        }
    }
}

/// A name that the kernel and nftables take, and that can't be one of an interface that is there on every host.
fn bridge(text: &str) -> Result<String, String> {
    let letters = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if text.is_empty() || text.len() > 15 || !letters || text == "lo" {
        return Err("the name of a bridge has 1 to 15 letters, digits and underscores".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::bridge;

    #[test]
    fn bridges_have_names_that_firewalls_take() {
        assert_eq!(bridge("vmpod0").as_deref(), Ok("vmpod0"));
        for bad in ["", "lo", "a b", "a\"b", "a;b", "sixteen_letters_"] {
            assert!(bridge(bad).is_err(), "{bad:?}");
        }
    }
}
