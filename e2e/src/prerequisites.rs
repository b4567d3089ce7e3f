//! What the tests need from the build, and how to get it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The repository.
#[must_use]
pub fn repository() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

fn target() -> PathBuf {
    repository().join("target")
}

fn need(path: PathBuf, what: &str, make: &str) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path);
    }
    bail!("{what} is missing ({}): run `make {make}`", path.display())
}

/// The program under test.
pub fn vmpod() -> Result<PathBuf> {
    need(target().join("debug/vmpod"), "the vmpod program", "build")
}

/// What plays Apple's Virtualization framework.
pub fn vz_stand_in() -> Result<PathBuf> {
    need(target().join("debug/vz-stand-in"), "the stand-in for Apple's framework", "build")
}

/// The real kubectl.
pub fn kubectl() -> Result<PathBuf> {
    need(target().join("tools/kubectl"), "kubectl", "tools")
}

/// The program that shares directories with guests, where the distribution's own QEMU came without it.
#[must_use]
pub fn virtiofsd() -> Option<PathBuf> {
    Some(target().join("tools/virtiofsd")).filter(|path| path.exists())
}

/// helm.
pub fn helm() -> Result<PathBuf> {
    need(target().join("tools/helm"), "helm", "tools")
}

/// Where the npm packages for tests are.
pub fn node() -> Result<PathBuf> {
    need(target().join("tools/node/node_modules"), "the folder of npm packages", "tools")
}

/// Where the Python packages for tests are.
pub fn python() -> Result<PathBuf> {
    need(target().join("tools/python/kopf").join("__init__.py"), "the Python package kopf", "tools")?;
    need(target().join("tools/python"), "the folder of Python packages", "tools")
}

/// The guest that boots as Windows does.
pub fn secure() -> Result<PathBuf> {
    need(target().join("guest/secure.oci"), "the guest that boots by Secure Boot", "guest-secure")
}

/// The root file system of a container with Ansible.
pub fn ansible() -> Result<PathBuf> {
    need(target().join("guest/ansible.tar"), "the container with Ansible", "ansible")
}

/// The guest that boots in seconds, an OCI image layout.
pub fn tiny() -> Result<PathBuf> {
    need(target().join("guest/tiny.oci"), "the tiny guest", "guest")
}

/// The Debian guest, an OCI image layout.
pub fn debian() -> Result<PathBuf> {
    need(target().join("guest/debian.oci"), "the Debian guest", "guest-debian")
}

/// The CI runner for guests; a static program, so this host can run it as well.
pub fn job_agent() -> Result<PathBuf> {
    need(target().join("guest/agent/job-agent"), "the job agent", "agent")
}

/// A program of the host.
pub fn program(name: &str, package: &str) -> Result<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&paths).map(|dir| dir.join(name)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("{name} is missing: run `make deps`, or install the package {package}"),
    }
}

/// Where the tests keep their homes.
pub fn scratch() -> Result<PathBuf> {
    let dir = target().join("e2e");
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
