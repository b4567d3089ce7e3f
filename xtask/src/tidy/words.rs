//! Words that have no place in the repository: machine paths and leftovers.

use super::{Finding, Tree};

/// What is looked for and why it must not be there. Written in halves so that this file passes its own rule.
const FORBIDDEN: &[(&[&str], &str)] = &[
    (&["../", "shared"], "the repository needs nothing outside itself"),
    (&["/work", "/main"], "a path of one machine"),
    (&["/ro", "ot/.cargo"], "a path of one machine"),
    (&["deb.", "debian.org"], "use the mirror that the host already uses"),
    (&["index.", "crates.io"], "use the registry that the host already uses"),
    (&["registry.", "npmjs.org"], "use the registry that the host already uses"),
    (&["pypi.", "org"], "use the registry that the host already uses"),
    (&["<<<<", "<<< "], "an unresolved merge"),
    (&["FIX", "ME"], "mend it, or write an issue"),
    (&["XX", "X:"], "mend it, or write an issue"),
];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let forbidden: Vec<(String, &str)> = FORBIDDEN.iter().map(|(halves, why)| (halves.concat(), *why)).collect();
    let mut findings = Vec::new();
    for (path, text) in tree {
        // Recordings and lock files are others' words.
        if path == "Cargo.lock" || path.contains("/tests/recordings/") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for (word, why) in &forbidden {
                if line.contains(word.as_str()) {
                    findings.push(Finding::new(format!("{path}:{}", number + 1), format!("contains `{word}`: {why}")));
                }
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_forbidden_word_is_found() {
        for (halves, why) in FORBIDDEN {
            let tree: Tree = [("docs/a.md".to_owned(), format!("fine\nsee {} here", halves.concat()))].into();
            let findings = check(&tree);
            assert_eq!(findings.len(), 1, "{halves:?}");
            assert!(
                findings[0].to_string().starts_with("docs/a.md:2: ") && findings[0].what.contains(why),
                "{findings:?}"
            );
        }
    }

    #[test]
    fn ordinary_text_and_recordings_pass() {
        let word = FORBIDDEN[0].0.concat();
        let tree: Tree = [
            ("docs/a.md".to_owned(), "a shared folder that works".to_owned()),
            ("crates/x/tests/recordings/a.json".to_owned(), word),
        ]
        .into();
        assert_eq!(check(&tree), []);
    }
}
