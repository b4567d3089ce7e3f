//! Pod created → exec answers, over the same QEMU started by hand and polled by ssh.

use std::path::Path;

use anyhow::{Result, bail};

pub(super) fn run(_quick: bool, _root: &Path) -> Result<()> {
    bail!("bench pod-start is not built yet")
}
