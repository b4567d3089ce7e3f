//! A new identity for a guest that goes on from a memory snapshot.
//!
//! Every copy of a snapshot wakes up as the same system: same addresses, host name, keys, random numbers, and a clock that
//! stands at the time of the snapshot. A guest that can be copied has a program that waits on the virtio serial port
//! [`PORT`] (`guests/` has two); the host tells it who it is now. Both sides speak lines of text, a word and a value:
//!
//! ```text
//! guest: hello 1                          it can take an identity, in version 1 of these words
//! host:  begin
//!        time SECONDS NANOSECONDS         since 1970, UTC
//!        entropy BASE64                   64 bytes; as text is fine for the random pool, which must be reseeded from it
//!        instance ID                      for cloud-init; unlike any other
//!        machine HEX                      32 digits for /etc/machine-id, made from the instance
//!        hostname NAME
//!        mac xx:xx:xx:xx:xx:xx            for the first interface
//!        address ADDRESS/BITS | dhcp
//!        gateway ADDRESS
//!        dns ADDRESS
//!        login NAME                       whom the keys let in
//!        key LINE                         an OpenSSH public key; repeated
//!        data BASE64                      user data
//!        end
//! guest: done ID                          all of it is in force, SSH host keys made anew, the ready marker printed
//!        failed WHY
//! ```
//!
//! The guest prints its ready marker on the console before it says `done`, so that an agent that died in between can tell
//! that the copy is itself. A host that begins again with the same instance asks for nothing else.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;

use crate::spec::Spec;

/// The name of the port inside the guest: `/sys/class/virtio-ports/*/name`.
pub const PORT: &str = "vmpod.renew";
/// The port's other end, in the machine's directory.
pub(crate) const SOCKET: &str = "renew.sock";
/// The file in a machine's directory that says that its guest has its own identity.
pub(crate) const DONE: &str = "renewed";

/// Bytes of entropy that a copy gets.
pub const ENTROPY: usize = 64;

/// What a guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It can take an identity.
    Hello,
    /// It has the identity of this instance.
    Done(String),
    /// It couldn't take it.
    Failed(String),
    /// Something else, such as the words of a later version.
    Other,
}

impl Said {
    /// Understands one line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            // A later version that can't speak this one would say so in another word.
            "hello" => Self::Hello,
            "done" => Self::Done(rest.to_owned()),
            "failed" => Self::Failed(if rest.is_empty() { "it gave no reason".to_owned() } else { rest.to_owned() }),
            _ => Self::Other,
        }
    }
}

/// The instance that a machine's guest is to be.
#[must_use]
pub fn instance(spec: &Spec) -> &str {
    spec.seed.as_ref().map_or(spec.id.as_str(), |seed| seed.instance_id.as_str())
}

/// What to tell the guest of `spec`.
///
/// A value never breaks out of its line: what holds a line break is encoded or left out.
#[must_use]
pub fn message(spec: &Spec, now: Timestamp, entropy: &[u8; ENTROPY]) -> String {
    let mut text = Lines(String::from("begin\n"));
    text.add("time", &format!("{} {}", now.as_second(), now.subsec_nanosecond().max(0)));
    text.add("entropy", &STANDARD.encode(entropy));
    text.add("instance", instance(spec));
    let machine =
        uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:machine:{}", instance(spec)).as_bytes());
    text.add("machine", &machine.simple().to_string());
    if let Some(seed) = &spec.seed {
        text.add("hostname", &seed.hostname);
    }
    if let Some(network) = spec.networks.first() {
        text.add("mac", &network.mac().to_string());
        match network.assigned() {
            Some(assigned) => {
                text.add("address", &format!("{}/{}", assigned.address, assigned.prefix));
                text.add("gateway", &assigned.gateway.to_string());
                text.add("dns", &assigned.dns.to_string());
            }
            None => text.add("address", "dhcp"),
        }
    }
    text.add("login", &spec.access.user);
    if let Some(seed) = &spec.seed {
        for key in &seed.authorized_keys {
            text.add("key", key);
        }
        if let Some(data) = &seed.user_data {
            text.add("data", &STANDARD.encode(data));
        }
    }
    text.0.push_str("end\n");
    text.0
}

struct Lines(String);

impl Lines {
    fn add(&mut self, word: &str, value: &str) {
        let value = value.trim();
        if value.is_empty() || value.contains(['\n', '\r', '\0']) {
            return;
        }
        self.0.push_str(word);
        self.0.push(' ');
        self.0.push_str(value);
        self.0.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::tests::spec;
    use crate::{MacAddr, Network, Seed, SeedForm};

    fn with_seed(hostname: &str, key: &str, data: Option<&str>) -> Spec {
        let mut spec = spec("web-0");
        spec.seed = Some(Seed {
            form: SeedForm::Nocloud,
            instance_id: "web-0".to_owned(),
            hostname: hostname.to_owned(),
            authorized_keys: vec![key.to_owned()],
            user_data: data.map(ToOwned::to_owned),
            vendor_data: None,
            network_config: None,
        });
        spec.networks = vec![Network::User {
            address: [127, 64, 0, 9].into(),
            ssh_port: 2222,
            forwards: Vec::new(),
            host_ports: Vec::new(),
            mac: MacAddr::derive("web-0"),
        }];
        spec
    }

    #[test]
    fn a_guest_is_told_all_that_must_differ() {
        let spec = with_seed("web", "ssh-ed25519 AAAA me", Some("#!/bin/sh\necho hi\n"));
        let now = Timestamp::new(1_764_220_000, 5_000).unwrap();
        insta::assert_snapshot!(message(&spec, now, &[7; ENTROPY]));
    }

    #[test]
    fn what_guests_say_is_understood() {
        assert_eq!(Said::parse("hello 1\n"), Said::Hello);
        assert_eq!(Said::parse("done web-0\r\n"), Said::Done("web-0".to_owned()));
        assert_eq!(Said::parse("failed no lease"), Said::Failed("no lease".to_owned()));
        assert_eq!(Said::parse("failed"), Said::Failed("it gave no reason".to_owned()));
        assert_eq!(Said::parse("helloes"), Said::Other);
    }

    proptest! {
        #[test]
        fn no_value_makes_a_line_of_its_own(host in "\\PC*|(a\nkey evil)", key in any::<String>(), data in any::<String>()) {
            let text = message(&with_seed(&host, &key, Some(&data)), Timestamp::UNIX_EPOCH, &[0; ENTROPY]);
            let known = ["begin", "time", "entropy", "instance", "machine", "hostname", "mac", "address", "gateway", "dns", "login",
                "key", "data", "end"];
            for line in text.lines() {
                let word = line.split(' ').next().unwrap();
                prop_assert!(known.contains(&word), "{line:?}");
            }
            prop_assert!(text.lines().filter(|line| line.starts_with("key ")).count() <= 1);
            prop_assert!(text.ends_with("\nend\n"));
        }
    }
}
