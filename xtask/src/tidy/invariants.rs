//! The checks that ARCHITECTURE.md names must exist.

use super::{Finding, Tree};

const DOCUMENT: &str = "ARCHITECTURE.md";

/// Every name in the last column of the table of invariants must be a function of some Rust file.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let Some(text) = tree.get(DOCUMENT) else {
        return vec![Finding::new(DOCUMENT, "is missing")];
    };
    let rows: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .skip_while(|(_, line)| *line != "## Invariants")
        .filter(|(_, line)| line.starts_with("| ") && !line.starts_with("| must hold"))
        .collect();
    if rows.is_empty() {
        return vec![Finding::new(DOCUMENT, "has no table under `## Invariants`")];
    }
    let mut findings = Vec::new();
    for (number, row) in rows {
        let place = format!("{DOCUMENT}:{}", number + 1);
        let checks = row.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap_or_default();
        let mut names = checks.split('`').skip(1).step_by(2).peekable();
        if names.peek().is_none() {
            findings.push(Finding::new(&place, "names no check"));
        }
        for name in names {
            let function = format!("fn {name}(");
            let exists = tree.iter().any(|(path, code)| {
                std::path::Path::new(path).extension().is_some_and(|end| end == "rs") && code.contains(&function)
            });
            if !exists {
                findings.push(Finding::new(&place, format!("names the check `{name}`, which is not there")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(table: &str) -> Vec<String> {
        let tree: Tree = [
            (DOCUMENT.to_owned(), format!("`elsewhere`\n## Invariants\n\n| must hold | checks |\n|---|---|\n{table}")),
            ("crates/a/src/b.rs".to_owned(), "async fn it_holds() {}\nfn both_hold() {}".to_owned()),
        ]
        .into();
        check(&tree).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn checks_that_exist_pass() {
        assert_eq!(found("| this | `it_holds`, `both_hold` |\n"), Vec::<String>::new());
    }

    #[test]
    fn a_check_that_is_not_there_is_found() {
        assert_eq!(
            found("| this | `it_holds`, `it_hold` |\n"),
            ["ARCHITECTURE.md:6: names the check `it_hold`, which is not there"]
        );
    }

    #[test]
    fn a_row_without_checks_and_an_empty_table_are_found() {
        assert_eq!(found("| this | believe me |\n"), ["ARCHITECTURE.md:6: names no check"]);
        assert_eq!(found(""), ["ARCHITECTURE.md: has no table under `## Invariants`"]);
        assert_eq!(check(&Tree::new()).len(), 1);
    }
}
