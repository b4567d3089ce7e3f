//! A manifest names what its crate uses, and nothing else.

use super::{Finding, Tree};

const ROOT: &str = "Cargo.toml";

/// Finds dependencies that no code of their crate names, and lines of the workspace's table that no crate takes.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let manifests: Vec<(&String, &String)> =
        tree.iter().filter(|(path, _)| path.ends_with("/Cargo.toml") && path.as_str() != ROOT).collect();
    let mut findings = Vec::new();
    for (path, manifest) in &manifests {
        let folder = path.trim_end_matches("Cargo.toml");
        let code: Vec<&str> = tree
            .iter()
            .filter(|(file, _)| file.starts_with(folder) && is_rust(file))
            .map(|(_, code)| code.as_str())
            .collect();
        for dependency in dependencies(manifest) {
            let word = dependency.replace('-', "_");
            if !code.iter().any(|code| has_word(code, &word)) {
                findings.push(Finding::new(*path, format!("depends on {dependency}, which its code never names")));
            }
        }
    }
    let table = tree.get(ROOT).map_or("", String::as_str);
    for line in section(table, "[workspace.dependencies]") {
        let Some((name, _)) = line.split_once('=') else { continue };
        let name = name.trim();
        // A path is one of our own crates: whether it has users is the table of directions' affair.
        let taken = manifests.iter().any(|(_, manifest)| dependencies(manifest).any(|dependency| dependency == name));
        if !taken && !line.contains("path =") {
            findings.push(Finding::new(ROOT, format!("lists {name}, which no crate takes")));
        }
    }
    findings
}

fn is_rust(path: &str) -> bool {
    std::path::Path::new(path).extension().is_some_and(|ending| ending == "rs")
}

/// The names in all dependency tables of a manifest.
fn dependencies(manifest: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    manifest.lines().filter_map(move |line| {
        if line.starts_with('[') {
            inside = line.trim_end().ends_with("dependencies]");
            return None;
        }
        let name = line.split(['=', '.']).next().unwrap_or_default().trim();
        (inside && !name.is_empty() && !name.starts_with('#')).then_some(name)
    })
}

fn section<'a>(manifest: &'a str, heading: &str) -> impl Iterator<Item = &'a str> {
    manifest.lines().skip_while(move |line| *line != heading).skip(1).take_while(|line| !line.starts_with('['))
}

fn has_word(code: &str, word: &str) -> bool {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].chars().next_back().is_some_and(is_part)
            && !code[at + word.len()..].chars().next().is_some_and(is_part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(root: &str, manifest: &str, code: &str) -> Vec<String> {
        let tree: Tree = [
            (ROOT.to_owned(), root.to_owned()),
            ("crates/a/Cargo.toml".to_owned(), manifest.to_owned()),
            ("crates/a/src/lib.rs".to_owned(), code.to_owned()),
        ]
        .into();
        check(&tree).iter().map(ToString::to_string).collect()
    }

    const ROOT_TABLE: &str =
        "[workspace.dependencies]\nours = { path = \"crates/ours\" }\nserde-json = \"1\"\n[profile.dev]\n";

    #[test]
    fn what_is_used_passes() {
        let manifest = "[package]\nversion.workspace = true\n[dependencies]\nserde-json.workspace = true\n";
        assert_eq!(found(ROOT_TABLE, manifest, "use serde_json::Value;"), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_used_is_found_and_parts_of_words_do_not_count() {
        let manifest = "[dev-dependencies]\nserde-json = { workspace = true }\n";
        assert_eq!(
            found(ROOT_TABLE, manifest, "let my_serde_json = serde_jsonx;"),
            ["crates/a/Cargo.toml: depends on serde-json, which its code never names"]
        );
    }

    #[test]
    fn what_no_crate_takes_is_found() {
        assert_eq!(found(ROOT_TABLE, "", ""), ["Cargo.toml: lists serde-json, which no crate takes"]);
    }
}
