//! What a Mac needs to run machines of Apple's Virtualization framework.

use std::path::Path;

use vmpod_machine::vz::Vz;

use super::Check;

/// The name of the check of the framework itself.
pub(super) const CHECK: &str = "vz";

/// What the framework says of this host and this program, as data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    /// Guests can run.
    supported: bool,
    /// The interfaces to which they can be bridged: none without the entitlement.
    bridged: Vec<String>,
}

/// Looks at the framework and at what addresses are learnt from.
pub(super) fn check(vz: &Vz) -> Vec<Check> {
    vec![framework(&look()), leases(&vz.leases)]
}

#[cfg(target_os = "macos")]
fn look() -> Found {
    use vmpod_machine::vz::apple;
    Found { supported: apple::is_supported(), bridged: apple::bridged_interfaces() }
}

/// Only with a stand-in for the helper is there anything to check elsewhere.
#[cfg(not(target_os = "macos"))]
fn look() -> Found {
    Found::default()
}

fn framework(found: &Found) -> Check {
    if !found.supported {
        return Check::broken(
            CHECK,
            "Apple's Virtualization framework refuses to run guests for this program",
            "sign it with the entitlement com.apple.security.virtualization (`packaging/macos/sign`), on Apple silicon with macOS 13 or later",
        );
    }
    let bridges = if found.bridged.is_empty() {
        "guests can't be bridged (that needs the entitlement com.apple.vm.networking, from Apple)".to_owned()
    } else {
        format!("guests can be bridged to {}", found.bridged.join(", "))
    };
    Check::ok(CHECK, format!("Apple's Virtualization framework runs guests; {bridges}"))
}

fn leases(path: &Path) -> Check {
    match std::fs::File::open(path) {
        Ok(_) => Check::ok("leases", format!("guests' addresses are read from {}", path.display())),
        // It appears with the first guest.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Check::ok(
            "leases",
            format!("guests' addresses will be read from {}, which isn't there yet", path.display()),
        ),
        Err(error) => Check::broken(
            "leases",
            format!("{} can't be read: {error}", path.display()),
            "run vmpod as a user who may read it, else no guest's address is ever known",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn an_unsigned_program_is_told_how_to_be_signed() {
        let check = framework(&Found::default());
        assert_eq!(check.state, State::Broken);
        assert!(check.mend.unwrap().contains("com.apple.security.virtualization"));
        let found = Found { supported: true, bridged: vec!["en0".to_owned()] };
        assert!(framework(&found).found.ends_with("guests can be bridged to en0"));
        let found = Found { supported: true, bridged: Vec::new() };
        assert!(framework(&found).found.contains("com.apple.vm.networking"));
    }

    #[test]
    fn leases_that_are_not_there_yet_are_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(leases(&dir.path().join("none")).state, State::Ok);
        std::fs::write(dir.path().join("leases"), "").unwrap();
        assert_eq!(leases(&dir.path().join("leases")).state, State::Ok);
        let error = leases(&dir.path().join("leases/below"));
        assert_eq!(error.state, State::Broken);
    }
}
