//! Sizes, names and manifests of files, and links between documents.

use std::path::Path;

use super::{Finding, Tree};

/// Lines of code a module may have before its tests: past that it is more than one noun.
const LONGEST: usize = 800;

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree {
        let name = path.rsplit('/').next().unwrap_or(path);
        if name == "mod.rs" {
            findings.push(Finding::new(path, "write the module as noun.rs beside noun/"));
        }
        if is_code(path) {
            let lines = code_lines(text);
            if lines > LONGEST {
                findings.push(Finding::new(path, format!("{lines} lines before its tests; at most {LONGEST}")));
            }
        }
        if name == "Cargo.toml" && path != "Cargo.toml" && !takes_the_lints(text) {
            findings.push(Finding::new(path, "lacks `[lints] workspace = true`"));
        }
        if has_ending(path, "md") {
            findings.extend(broken_links(tree, path, text));
        }
    }
    match tree.get("CHANGELOG.md") {
        Some(text) if text.contains("## [Unreleased]") => {}
        Some(_) => findings.push(Finding::new("CHANGELOG.md", "has no section [Unreleased]")),
        None => findings.push(Finding::new("CHANGELOG.md", "is missing")),
    }
    findings
}

fn has_ending(path: &str, ending: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == ending)
}

/// Rust code that ships: not tests, not benchmarks.
fn is_code(path: &str) -> bool {
    let beside_tests = path.split('/').any(|part| matches!(part, "tests" | "benches" | "fuzz"));
    has_ending(path, "rs") && !beside_tests && !path.ends_with("/tests.rs")
}

/// Lines before an inline test module.
fn code_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .position(|pair| pair[0].trim() == "#[cfg(test)]" && pair[1].trim() == "mod tests {")
        .unwrap_or(lines.len())
}

fn takes_the_lints(manifest: &str) -> bool {
    // A workspace of its own, such as the fuzz targets', can't take them.
    if manifest.lines().any(|line| line.trim_end() == "[workspace]") {
        return true;
    }
    manifest
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != "[lints]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .any(|line| line == "workspace = true")
}

/// Relative links of a Markdown document that lead to no tracked file or folder.
fn broken_links(tree: &Tree, path: &str, text: &str) -> Vec<Finding> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut findings = Vec::new();
    for (number, line) in outside_code(text) {
        for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split(['#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let resolved = normalised(&folder.join(target));
            let inside = format!("{resolved}/");
            if !tree.contains_key(&resolved) && !tree.keys().any(|file| file.starts_with(&inside)) {
                findings
                    .push(Finding::new(format!("{path}:{number}"), format!("links to {target}, which is not there")));
            }
        }
    }
    findings
}

/// Numbered lines of a Markdown text that are not in a fenced block.
fn outside_code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return None;
        }
        (!fenced).then_some((index + 1, line))
    })
}

fn normalised(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            // A link out of the repository resolves to nothing tracked, so the caller reports it.
            std::path::Component::ParentDir if parts.is_empty() => return "..".to_owned(),
            std::path::Component::ParentDir => parts.truncate(parts.len() - 1),
            std::path::Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Tree {
        let changelog = ("CHANGELOG.md", "## [Unreleased]\n");
        files.iter().chain([&changelog]).map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        check(&tree(files)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_tidy_tree_has_no_findings() {
        let findings = found(&[
            (
                "README.md",
                "[guide](docs/a.md#part) [examples](examples) [web](https://example.com)\n```\n[x](gone.md)\n```\n",
            ),
            ("docs/a.md", "[back](../README.md)"),
            ("examples/pod.yaml", ""),
            ("crates/a/Cargo.toml", "[package]\n[lints]\nworkspace = true\n"),
        ]);
        assert_eq!(findings, Vec::<String>::new());
    }

    #[test]
    fn a_long_module_is_found_and_its_tests_do_not_count() {
        let long = "x\n".repeat(LONGEST + 1);
        let tested = format!("{}#[cfg(test)]\nmod tests {{\n{long}}}\n", "x\n".repeat(LONGEST));
        assert_eq!(found(&[("crates/a/src/b.rs", &tested), ("crates/a/tests/c.rs", &long)]), Vec::<String>::new());
        let findings = found(&[("crates/a/src/b.rs", &long)]);
        assert_eq!(findings, ["crates/a/src/b.rs: 801 lines before its tests; at most 800"]);
    }

    #[test]
    fn mod_rs_is_found() {
        assert!(found(&[("crates/a/src/b/mod.rs", "")])[0].contains("noun.rs"));
    }

    #[test]
    fn a_manifest_without_the_lints_is_found() {
        assert!(
            found(&[("crates/a/Cargo.toml", "[lints]\n[dependencies]\nworkspace = true\n")])[0].contains("[lints]")
                && found(&[("fuzz/Cargo.toml", "[package]\n[workspace]\n")]).is_empty()
        );
    }

    #[test]
    fn broken_links_are_found() {
        let findings = found(&[("docs/a.md", "one\n[gone](b.md) [out](../../etc/passwd)")]);
        assert_eq!(findings.len(), 2, "{findings:?}");
        assert!(findings[0].starts_with("docs/a.md:2: links to"), "{findings:?}");
    }

    #[test]
    fn a_changelog_without_unreleased_is_found() {
        let tree: Tree = [("CHANGELOG.md".to_owned(), "# Changes".to_owned())].into();
        assert_eq!(check(&tree).len(), 1);
        assert_eq!(check(&Tree::new()).len(), 1);
    }
}
