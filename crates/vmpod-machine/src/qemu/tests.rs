use super::*;
use crate::spec::tests::spec;
use crate::{ExitCause, MachineId};

fn dir(root: &Path) -> MachineDir {
    let dir = MachineDir::new(root, &MachineId::parse("a").unwrap());
    dir.make().unwrap();
    dir
}

#[tokio::test]
async fn a_directory_without_a_process_is_found_empty() {
    let root = tempfile::tempdir().unwrap();
    let (dir, qemu) = (dir(root.path()), Qemu::default());
    assert!(qemu.find(&spec("a"), &dir).await.unwrap().is_none());
    assert!(qemu.autopsy(&spec("a"), &dir).await.unwrap().is_none());
    qemu.destroy(&dir).await.unwrap();
    std::fs::write(dir.console(), "").unwrap();
    assert_eq!(qemu.autopsy(&spec("a"), &dir).await.unwrap().unwrap().cause, ExitCause::Unseen);
}

/// A process that holds the lock and speaks no QMP: not absent, not ours to talk to, and still ours to end.
#[tokio::test]
async fn a_silent_holder_is_reported_refused_and_destroyed() {
    let root = tempfile::tempdir().unwrap();
    let (dir, qemu) = (dir(root.path()), Qemu::default());
    let Lock::Taken(lock) = take_lock(&dir).unwrap() else { unreachable!() };
    let mut child = tokio::process::Command::new("sleep").arg("60").stdin(Stdio::from(lock)).spawn().unwrap();
    assert_eq!(holder(&dir), child.id());
    let error = qemu.start(&spec("a"), &dir).await.err().unwrap();
    assert!(matches!(&error, HypervisorError::Occupied { holder } if holder.contains("process ")), "{error}");
    let error = qemu.find(&spec("a"), &dir).await.err().unwrap();
    assert!(matches!(error, HypervisorError::Unresponsive { .. }), "{error}");
    qemu.destroy(&dir).await.unwrap();
    assert!(!child.wait().await.unwrap().success());
    assert!(matches!(take_lock(&dir).unwrap(), Lock::Taken(_)));
}

#[tokio::test]
async fn a_program_that_is_missing_is_named() {
    let root = tempfile::tempdir().unwrap();
    let qemu = Qemu { program: "/nonexistent/qemu".into(), ..Qemu::default() };
    let error = qemu.start(&spec("a"), &dir(root.path())).await.err().unwrap();
    insta::assert_snapshot!(error, @"can't run /nonexistent/qemu: install it, or name another with --qemu");
}

#[tokio::test]
async fn a_process_that_dies_at_its_start_leaves_its_words() {
    let root = tempfile::tempdir().unwrap();
    let program = root.path().join("qemu");
    std::fs::write(&program, "#!/bin/sh\necho 'could not open disk image' >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = Qemu { program, ..Qemu::default() }.start(&spec("a"), &dir(root.path())).await.err().unwrap();
    insta::assert_snapshot!(error, @"qemu ended while it was starting: could not open disk image");
}
