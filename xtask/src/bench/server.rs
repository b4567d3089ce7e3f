//! A `vmpod up` to measure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::process::{self, Owned};

const START: Duration = Duration::from_mins(5);

/// Starts `vmpod up` with a home and waits until it says that it is ready.
pub(super) fn up(program: &Path, home: &Path, log: &Path) -> Result<Owned> {
    up_with(program, home, log, &[])
}

/// The same, with more arguments.
pub(super) fn up_with(program: &Path, home: &Path, log: &Path, more: &[&str]) -> Result<Owned> {
    let mut command = Command::new(program);
    command.arg("--home").arg(home).args(["up", "--api-port", "0", "--kubelet-port", "0"]).args(more);
    let mut up = Owned::start(&mut command, log)?;
    let until = Instant::now() + START;
    while !home.join("kubeconfig").exists() || !ready_line(log) {
        if up.has_ended().is_some() || Instant::now() > until {
            bail!("vmpod up did not come up:\n{}", fs::read_to_string(log).unwrap_or_default());
        }
        process::pause(20);
    }
    Ok(up)
}

fn ready_line(log: &Path) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains("ready"))
}

/// Builds vmpod as users get it.
pub(super) fn build(root: &Path) -> Result<PathBuf> {
    crate::say("building vmpod (release)");
    let status = Command::new("cargo")
        .args(["build", "--release", "--locked", "--package", "vmpod"])
        .current_dir(root)
        .status()
        .context("cargo did not start")?;
    ensure!(status.success(), "vmpod did not build");
    Ok(root.join("target/release/vmpod"))
}
