//! What the command line's values may be; each is parsed once, here.

use std::time::Duration;

use clap::ValueEnum;

/// An amount of bytes, as it was typed and as a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// In bytes.
    pub(crate) bytes: u64,
    /// As a Kubernetes quantity.
    pub(crate) quantity: String,
}

/// `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: String,
}

/// What `image import` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// A raw disk.
    Raw,
    /// A qcow2 disk.
    Qcow2,
    /// An OCI image layout.
    Oci,
}

/// The firmware that boots a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Firmware {
    /// The PC BIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// UEFI with Secure Boot.
    Secure,
}

/// How the guest learns who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Seed {
    /// A seed disk as cloud-init and its like read it.
    Nocloud,
    /// A config drive as cloudbase-init reads it; user data that is XML are answers for Windows' set-up.
    Configdrive,
    /// It doesn't.
    None,
}

/// The kind of a guest's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Devices {
    /// Virtio: fast, and the guest needs drivers for it.
    Virtio,
    /// Those of common hardware (AHCI, Intel's e1000e), for guests without such drivers.
    Emulated,
}

/// A size, or 0 for none.
pub(crate) fn parse_size_or_none(text: &str) -> Result<Size, String> {
    if text == "0" { Ok(Size { bytes: 0, quantity: text.to_owned() }) } else { parse_size(text) }
}

/// Parses `512Mi`, `4Gi`, `1G` or plain bytes: the suffixes of a Kubernetes quantity.
pub(crate) fn parse_size(text: &str) -> Result<Size, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = &text[digits.len()..];
    let unit: u64 = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u64.pow(2),
        "G" => 1000_u64.pow(3),
        "T" => 1000_u64.pow(4),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(format!("{suffix:?} isn't a unit; say something like 512Mi or 4Gi")),
    };
    let number: u64 =
        digits.parse().map_err(|_| "a whole number with a unit is wanted, such as 512Mi or 4Gi".to_owned())?;
    let bytes = number.checked_mul(unit).ok_or("more bytes than a number can hold")?;
    if bytes == 0 {
        return Err("nothing isn't an amount".into());
    }
    Ok(Size { bytes, quantity: text.to_owned() })
}

/// Parses `2` or `500m` processors, as a Kubernetes quantity.
pub(crate) fn cpus(text: &str) -> Result<String, String> {
    let number = text.strip_suffix('m').unwrap_or(text);
    match number.parse::<u32>() {
        Ok(n) if n > 0 => Ok(text.to_owned()),
        _ => Err("a number of processors is wanted, such as 2 or 500m".into()),
    }
}

/// Parses `90s`, `5m`, `1h30m`, or a number of seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wanted = || "a duration is wanted, such as 30s, 5m or 1h30m".to_owned();
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let (mut total, mut number) = (Duration::ZERO, String::new());
    let mut letters = text.chars().peekable();
    while let Some(c) = letters.next() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let amount: u64 = number.parse().map_err(|_| wanted())?;
        number.clear();
        let unit = match c {
            'm' if letters.peek() == Some(&'s') => {
                letters.next();
                Duration::from_millis(amount)
            }
            's' => Duration::from_secs(amount),
            'm' => Duration::from_secs(amount.checked_mul(60).ok_or_else(wanted)?),
            'h' => Duration::from_secs(amount.checked_mul(3600).ok_or_else(wanted)?),
            _ => return Err(wanted()),
        };
        total = total.checked_add(unit).ok_or_else(wanted)?;
    }
    if number.is_empty() && !text.is_empty() { Ok(total) } else { Err(wanted()) }
}

/// Parses `KEY=VALUE`.
pub(crate) fn key_value(text: &str) -> Result<KeyValue, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(KeyValue { key: key.into(), value: value.into() }),
        _ => Err("KEY=VALUE is wanted".into()),
    }
}

/// A DNS subdomain of at most 253 characters, as the API wants node names.
pub(crate) fn node_name(text: &str) -> Result<String, String> {
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.to_owned())
    } else {
        Err("small letters, digits, '-' and '.' are allowed, a letter or digit at both ends".into())
    }
}

/// A DNS label of at most 63 characters: it is the guest's host name too.
pub(crate) fn pod_name(text: &str) -> Result<String, String> {
    match node_name(text) {
        Ok(name) if name.len() <= 63 && !name.contains('.') => Ok(name),
        _ => Err("at most 63 small letters, digits and '-' are allowed, a letter or digit at both ends".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_kubernetes_quantities() {
        assert_eq!(parse_size("512Mi").map(|s| s.bytes), Ok(512 << 20));
        assert_eq!(parse_size("2G").map(|s| s.bytes), Ok(2_000_000_000));
        assert_eq!(parse_size("4Gi").map(|s| s.quantity), Ok("4Gi".into()));
        assert_eq!(parse_size("1048576").map(|s| s.bytes), Ok(1 << 20));
        for bad in ["", "Mi", "12mb", "-1Gi", "0", "0Gi", "99999999999Ti", "1.5Gi"] {
            assert!(parse_size(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn nothing_is_said_by_a_bare_nought() {
        assert_eq!(parse_size_or_none("0").unwrap().bytes, 0);
        assert_eq!(parse_size_or_none("1Ki").unwrap().bytes, 1024);
        assert!(parse_size_or_none("0Gi").is_err() && parse_size("0").is_err());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1m5s"), Ok(Duration::from_secs(65)));
        for bad in ["", "s", "1d", "5m3", "999999999999999999999h", "1 h"] {
            assert!(duration(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn names_are_dns_names() {
        for good in ["a", "n1", "host-1.example.com"] {
            assert!(node_name(good).is_ok(), "{good:?} was refused");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "a/b", "ü"] {
            assert!(node_name(bad).is_err(), "{bad:?} was taken");
        }
        assert!(pod_name("a.b").is_err());
        assert!(pod_name(&"a".repeat(64)).is_err());
    }

    #[test]
    fn processors_are_whole_or_milli() {
        assert!(cpus("2").is_ok() && cpus("500m").is_ok());
        assert!(cpus("0").is_err() && cpus("1.5").is_err() && cpus("m").is_err());
    }

    #[test]
    fn a_value_may_hold_an_equals_sign() {
        assert_eq!(key_value("A=b=c"), Ok(KeyValue { key: "A".into(), value: "b=c".into() }));
        assert!(key_value("=x").is_err() && key_value("x").is_err());
    }
}
