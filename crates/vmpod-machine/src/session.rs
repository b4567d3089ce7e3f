//! The one place that changes what a process is between fork and exec.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Gives the process a session of its own, so that no signal to the agent's terminal or process group reaches it.
#[expect(unsafe_code, reason = "the standard library has no safe call for setsid")]
pub(crate) fn of_its_own(command: &mut Command) {
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into));
    }
}
