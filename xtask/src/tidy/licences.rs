//! Where dependencies come from and under which licences.

use serde_json::Value;

use super::Finding;

/// Licences that an Apache-2.0 program can ship with.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks every package of `cargo metadata`: from the registry or from here, under an allowed licence.
pub(super) fn check(metadata: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or_default(),
            package["version"].as_str().unwrap_or_default()
        );
        match package["source"].as_str() {
            None => {}
            Some(source) if source.starts_with("registry+") => {}
            Some(source) => findings.push(Finding::new(&name, format!("comes from {source}, not from the registry"))),
        }
        let licence = package["license"].as_str().unwrap_or_default();
        if !satisfied(licence) {
            findings.push(Finding::new(&name, format!("licence `{licence}` is not one of those allowed")));
        }
    }
    findings
}

/// Whether an SPDX expression can be met with allowed licences. `/` is cargo's old way to write `OR`.
fn satisfied(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = any(&mut words);
    met && words.next().is_none()
}

type Words<'a, I> = std::iter::Peekable<I>;

fn any<'a, I: Iterator<Item = &'a str>>(words: &mut Words<'a, I>) -> bool {
    let mut met = all(words);
    while words.next_if_eq(&"OR").is_some() {
        met |= all(words);
    }
    met
}

fn all<'a, I: Iterator<Item = &'a str>>(words: &mut Words<'a, I>) -> bool {
    let mut met = one(words);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words);
    }
    met
}

fn one<'a, I: Iterator<Item = &'a str>>(words: &mut Words<'a, I>) -> bool {
    match words.next() {
        Some("(") => {
            let met = any(words);
            words.next_if_eq(&")").is_some() && met
        }
        Some(name) => {
            // An exception only adds permissions.
            if words.next_if_eq(&"WITH").is_some() {
                words.next();
            }
            ALLOWED.contains(&name)
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn expressions_are_read_as_spdx_reads_them() {
        for met in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-2.0 OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
            "MIT OR Apache-2.0 OR LGPL-2.1-or-later",
        ] {
            assert!(satisfied(met), "{met}");
        }
        for refused in ["", "GPL-3.0", "MIT AND GPL-2.0", "(MIT", "MIT)", "MIT OR", "(MIT OR X) AND (Y OR GPL-2.0)"] {
            // `MIT OR` is broken, yet its left side is enough.
            assert_eq!(satisfied(refused), refused == "MIT OR", "{refused}");
        }
    }

    #[test]
    fn foreign_sources_and_licences_are_found() {
        let metadata = json!({"packages": [
            {"name": "ours", "version": "1.0.0", "license": "Apache-2.0", "source": null},
            {"name": "good", "version": "1.0.0", "license": "MIT", "source": "registry+x"},
            {"name": "fork", "version": "1.0.0", "license": "MIT", "source": "git+https://example.com/fork"},
            {"name": "copyleft", "version": "2.0.0", "license": "AGPL-3.0", "source": "registry+x"},
            {"name": "silent", "version": "3.0.0", "license": null, "source": "registry+x"},
        ]});
        let places: Vec<String> = check(&metadata).into_iter().map(|finding| finding.place).collect();
        assert_eq!(places, ["fork 1.0.0", "copyleft 2.0.0", "silent 3.0.0"]);
    }
}
