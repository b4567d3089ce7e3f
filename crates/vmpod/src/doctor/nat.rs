//! What the network `nat` needs of this host.

use std::path::Path;
use std::process::{Command, Stdio};

use super::Check;

const NAME: &str = "network nat";

/// What matters of the host.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Debug)]
struct Host {
    root: bool,
    nft: bool,
    tun: bool,
    /// What somebody wrote on an interface with the bridge's name; none when there is no such interface.
    alias: Option<String>,
    /// The host's firewall drops what it forwards unless a rule says otherwise, as Docker sets it.
    drops: bool,
}

/// Looks at this host.
pub(super) fn check(bridge: &str) -> Option<Check> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let policy = Command::new("iptables").args(["-S", "FORWARD"]).stdin(Stdio::null()).output();
    let interface = Path::new("/sys/class/net").join(bridge);
    let host = Host {
        root: rustix::process::geteuid().is_root(),
        nft: Command::new("nft").arg("--version").stdin(Stdio::null()).output().is_ok(),
        tun: Path::new("/dev/net/tun").exists(),
        alias: interface.exists().then(|| std::fs::read_to_string(interface.join("ifalias")).unwrap_or_default()),
        drops: policy.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("-P FORWARD DROP")),
    };
    Some(judge(&host, bridge))
}

fn judge(host: &Host, bridge: &str) -> Check {
    let refused = |why: String, mend: &str| Check::warning(NAME, format!("{why}: pods that ask for it fail"), mend);
    if !host.root {
        return refused("needs root".to_owned(), "run the agent as root, or leave pods on the network user");
    }
    if !host.nft {
        return refused("nft isn't installed".to_owned(), "`apt-get install nftables` on Debian");
    }
    if !host.tun {
        return refused("there is no /dev/net/tun".to_owned(), "load the kernel's module: `modprobe tun`");
    }
    if host.alias.as_deref().is_some_and(|alias| alias.trim() != vmpod_network::nat::ALIAS) {
        let mend = "name another with --nat-bridge, or remove that interface";
        return refused(format!("{bridge} exists and isn't vmpod's"), mend);
    }
    if host.drops {
        let mend = format!(
            "let the bridge through: `iptables -I FORWARD -i {bridge} -j ACCEPT` and `iptables -I FORWARD -o {bridge} -j ACCEPT` (with Docker, the chain is DOCKER-USER)"
        );
        return Check::warning(NAME, "this host's firewall drops what it forwards: machines reach only the host", mend);
    }
    Check::ok(NAME, "machines can have addresses of their own on a bridge")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn what_is_missing_is_named_with_its_mend() {
        let good = Host { root: true, nft: true, tun: true, alias: None, drops: false };
        assert_eq!(judge(&good, "vmpod0").state, State::Ok);
        let ours = Host { alias: Some("vmpod nat\n".to_owned()), ..good.clone() };
        assert_eq!(judge(&ours, "vmpod0").state, State::Ok);
        for (host, mend) in [
            (Host { root: false, ..good.clone() }, "as root"),
            (Host { nft: false, ..good.clone() }, "nftables"),
            (Host { tun: false, ..good.clone() }, "modprobe tun"),
            (Host { alias: Some(String::new()), ..good.clone() }, "--nat-bridge"),
            (Host { drops: true, ..good }, "-i vmpod0 -j ACCEPT"),
        ] {
            let check = judge(&host, "vmpod0");
            assert_eq!(check.state, State::Warning);
            assert!(check.mend.as_deref().unwrap_or_default().contains(mend), "{check:?}");
        }
    }
}
