//! What compilers and linters do not check, as pure rules over the repository's files.
//!
//! Each rule takes a [`Tree`] (and, for crate directions, cargo's metadata) and returns findings;
//! only [`run`] reads the disk.

mod directions;
mod files;
mod invariants;
mod licences;
mod manifests;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// The repository's tracked text files, by path from its top folder.
pub(crate) type Tree = BTreeMap<String, String>;

/// One place that breaks a rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    place: String,
    what: String,
}

impl Finding {
    fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// Checks the repository at `root` and lists every finding before it fails.
pub(crate) fn run(root: &Path) -> Result<()> {
    let tree = tracked(root)?;
    let mut findings = directions::check(&metadata(root, &["--no-deps"])?);
    findings.extend(licences::check(&metadata(root, &[])?));
    findings.extend(files::check(&tree));
    findings.extend(invariants::check(&tree));
    findings.extend(manifests::check(&tree));
    findings.extend(words::check(&tree));
    findings.sort();
    for finding in &findings {
        crate::say(&finding.to_string());
    }
    ensure!(findings.is_empty(), "tidy: {} to mend", findings.len());
    crate::say(&format!("tidy: {} files, nothing to mend", tree.len()));
    Ok(())
}

/// The files that git tracks or would track, those that are text.
fn tracked(root: &Path) -> Result<Tree> {
    let listing = output(
        Command::new("git").args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root),
    )?;
    let mut tree = Tree::new();
    for path in listing.split('\0').filter(|path| !path.is_empty()) {
        // A tracked file that is deleted in the work tree, or one that is not text, has no lines to check.
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            tree.insert(path.to_owned(), text);
        }
    }
    ensure!(!tree.is_empty(), "git lists no files in {}", root.display());
    Ok(tree)
}

fn metadata(root: &Path, more: &[&str]) -> Result<serde_json::Value> {
    let text = output(
        Command::new("cargo").args(["metadata", "--format-version=1", "--locked"]).args(more).current_dir(root),
    )?;
    serde_json::from_str(&text).context("cargo metadata printed no JSON")
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{program} did not start"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
