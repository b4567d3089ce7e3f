//! `vmpod machine-vz DIR`: the process in which a machine of Apple's Virtualization framework lives.

use anyhow::Result;

use crate::Exit;
use crate::args::MachineVz;

/// The framework wants the main thread for itself, so this never returns: the machine's end is the process's.
#[cfg(target_os = "macos")]
pub(crate) fn main(dir: std::path::PathBuf) -> ! {
    use std::sync::Arc;

    use vmpod_machine::vz::{apple, helper};

    let work = move || -> u8 {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "can't start the runtime");
                return 1;
            }
        };
        match runtime.block_on(helper::run(&dir, Arc::new(apple::Apple::default()))) {
            Ok(exit) => {
                tracing::info!(%exit, "the machine is over");
                0
            }
            Err(error) => {
                let code = error.code();
                // The agent passes on the last lines of this.
                crate::report::print(&anyhow::Error::from(error));
                code
            }
        }
    };
    std::thread::spawn(move || std::process::exit(i32::from(work())));
    apple::main_loop()
}

/// Elsewhere there is no such framework.
pub(crate) fn run(args: &MachineVz) -> Result<Exit> {
    anyhow::bail!("{}: Apple's Virtualization framework is on Macs only", args.dir.display())
}
