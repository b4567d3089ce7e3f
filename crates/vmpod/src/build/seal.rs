//! The shell that makes a built guest anonymous again.

use super::recipe::Seal;

/// One shell script for what is to be wiped; root runs it last. `key` is the public key that opened the guest.
pub(crate) fn script(seal: &[Seal], trim: bool, key: &str) -> String {
    let mut script = String::from("set -u\n");
    for part in seal {
        script.push_str(match part {
            // An empty file, not none: then systemd makes a new one even where the disk is read-only at first.
            Seal::MachineId => {
                "if [ -e /etc/machine-id ]; then : > /etc/machine-id; fi\n\
                 [ -L /var/lib/dbus/machine-id ] || rm -f /var/lib/dbus/machine-id\n\
                 rm -f /var/lib/systemd/random-seed\n"
            }
            Seal::SshHostKeys => "rm -f /etc/ssh/ssh_host_*key /etc/ssh/ssh_host_*key.pub\n",
            Seal::CloudInit => {
                "if command -v cloud-init >/dev/null; then cloud-init clean --logs >/dev/null 2>&1 || true; fi\n\
                 rm -rf /var/lib/cloud/instance /var/lib/cloud/instances /var/lib/cloud/data /var/lib/cloud/sem\n"
            }
            Seal::Logs => {
                "rm -rf /var/log/journal/* /run/log/journal/*\n\
                 find /var/log -type f \\( -name '*.gz' -o -name '*.[0-9]' \\) -exec rm -f {} +\n\
                 find /var/log -type f -exec sh -c 'for f; do : > \"$f\"; done' sh {} +\n\
                 rm -f /root/.bash_history /home/*/.bash_history\n"
            }
            Seal::Temporary => {
                "rm -rf /tmp/* /tmp/.[!.]* /var/tmp/* /var/cache/apt/archives/*.deb /var/lib/apt/lists/*_*\n"
            }
            Seal::Access => "",
        });
        if *part == Seal::Access {
            script.push_str(&without_key(key));
        }
    }
    script.push_str("sync\n");
    if trim {
        // What was deleted becomes holes. A guest without fstrim, or a file system that can't, keeps its size: no harm.
        script.push_str("fstrim -a 2>/dev/null || fstrim / 2>/dev/null || true\nsync\n");
    }
    script
}

/// Takes our key out of every user's file. Its text has no quotes: it is base64 and a comment of ours.
fn without_key(key: &str) -> String {
    let word = key.split_whitespace().nth(1).unwrap_or_default();
    if word.is_empty() {
        return String::new();
    }
    format!(
        "for f in /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys; do\n\
         [ -f \"$f\" ] || continue\n\
         grep -v -F '{word}' \"$f\" > \"$f.sealed\" || true\n\
         cat \"$f.sealed\" > \"$f\"; rm -f \"$f.sealed\"\n\
         done\n"
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn any_shell_can_read_it() {
        for seal in [&Seal::ALL[..], &[], &[Seal::Logs]] {
            for trim in [true, false] {
                let script = script(seal, trim, "ssh-ed25519 AAAAC3Nza vmpod");
                for shell in ["dash", "bash"] {
                    let status = Command::new(shell).args(["-n", "-c", &script]).status().unwrap();
                    assert!(status.success(), "{shell}: {script}");
                }
            }
        }
    }

    #[test]
    fn only_what_is_named_is_wiped() {
        let only = script(&[Seal::MachineId], false, "ssh-ed25519 AAAA x");
        assert!(only.contains("machine-id") && !only.contains("ssh") && !only.contains("fstrim"), "{only}");
        assert!(script(&[Seal::Access], false, "ssh-ed25519 AAAAkey x").contains("grep -v -F 'AAAAkey'"));
    }
}
