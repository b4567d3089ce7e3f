//! Machines as QEMU processes.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::directory::MachineDir;
use crate::hypervisor::{Hypervisor, HypervisorError, Process};
use crate::lifecycle::Exit;
use crate::spec::Spec;

/// QEMU on this host.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program; looked up in `PATH` when it is a bare name.
    pub program: PathBuf,
}

impl Default for Qemu {
    fn default() -> Self {
        Self { program: PathBuf::from(format!("qemu-system-{}", std::env::consts::ARCH)) }
    }
}

fn later<T>() -> Result<T, HypervisorError> {
    Err(HypervisorError::Unsupported("not built yet".to_owned()))
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn start(&self, _spec: &Spec, _dir: &MachineDir) -> Result<Box<dyn Process>, HypervisorError> {
        later()
    }

    async fn find(&self, _spec: &Spec, _dir: &MachineDir) -> Result<Option<Box<dyn Process>>, HypervisorError> {
        later()
    }

    async fn autopsy(&self, _spec: &Spec, _dir: &MachineDir) -> Result<Option<Exit>, HypervisorError> {
        later()
    }

    async fn destroy(&self, _dir: &MachineDir) -> Result<(), HypervisorError> {
        later()
    }
}
