use futures::StreamExt;

use super::*;
use crate::spec::tests::spec;
use crate::{Adopted, MachineError, Machines, Offset, Signal, Started, State};

#[tokio::test]
async fn a_machine_lives_and_dies() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let machine = machines.create(spec("a")).await.unwrap();
    machine.start().await.unwrap();
    machine.start().await.unwrap();
    assert_eq!(*machine.state().borrow(), State::Running);
    let (status, out, _) = machine.guest().exec(Exec::new(["echo", "hi"])).await.unwrap().output().await.unwrap();
    assert_eq!((status, out.as_slice()), (ExitStatus::Code(0), b"echo hi\n".as_slice()));
    assert!(matches!(machines.remove(machine.id(), false).await, Err(MachineError::StillRuns(_))));
    let State::Stopped(exit) = machine.stop(Duration::from_secs(5)).await.unwrap() else { unreachable!() };
    assert_eq!(exit.cause, ExitCause::GuestShutdown);
    assert!(machine.start().await.is_err());
    machines.remove(machine.id(), false).await.unwrap();
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    assert_eq!(world.starts(machine.id()), 1);
}

#[tokio::test]
async fn a_guest_that_ignores_the_button_is_killed_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    world.set_default(Script { power_button: PowerButton::Ignored, ..Script::default() });
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let machine = machines.create(spec("a")).await.unwrap();
    machine.start().await.unwrap();
    let State::Stopped(exit) = machine.stop(Duration::from_millis(30)).await.unwrap() else { unreachable!() };
    assert_eq!((exit.cause, world.pressed(machine.id())), (ExitCause::Killed, 1));
}

/// A guest without an ear for the button is asked over its login before its deadline comes.
#[tokio::test]
async fn a_guest_that_ignores_the_button_is_asked() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    world.set_default(Script { power_button: PowerButton::Ignored, ..Script::default() });
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let machine = machines.create(spec("a")).await.unwrap();
    machine.start().await.unwrap();
    let stopping = tokio::spawn({
        let machine = machine.clone();
        async move { machine.stop(Duration::from_mins(1)).await }
    });
    world
        .until(|world| world.commands(machine.id()).iter().any(|command| command.join(" ").contains("shutdown")))
        .await;
    world.shut_down(machine.id());
    let State::Stopped(exit) = stopping.await.unwrap().unwrap() else { unreachable!() };
    assert_eq!((exit.cause, world.pressed(machine.id())), (ExitCause::GuestShutdown, 2));
}

/// A process that never answers holds up nobody who wants its machine gone.
#[tokio::test]
async fn a_start_that_hangs_ends_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    world.set_default(Script { start: Start::Hangs, ..Script::default() });
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    for (name, grace) in [("killed", None), ("stopped", Some(Duration::from_millis(50)))] {
        let machine = machines.create(spec(name)).await.unwrap();
        let starting = tokio::spawn({
            let machine = machine.clone();
            async move { machine.start().await }
        });
        machine.state().wait_for(|state| *state == State::Booting).await.unwrap();
        let ended = async {
            match grace {
                None => machine.kill().await,
                Some(grace) => machine.stop(grace).await,
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap().unwrap();
        assert!(matches!(&ended, State::Failed(why) if why.contains("was to end before it answered")), "{ended:?}");
        // Who waits for the start isn't left waiting.
        drop(starting.await.unwrap());
        machines.remove(machine.id(), true).await.unwrap();
    }
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_failed_start_says_why() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    world.set_default(Script { start: Start::Fails("no memory".to_owned()), ..Script::default() });
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let machine = machines.create(spec("a")).await.unwrap();
    let error = machine.start().await.unwrap_err();
    insta::assert_snapshot!(error, @"machine a couldn't be started: fake ended while it was starting: no memory");
}

#[tokio::test]
async fn the_main_process_outlives_the_agent() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let machine = machines.create(spec("a")).await.unwrap();
    machine.start().await.unwrap();
    let main = machine.guest().main_process("main");
    let command = MainCommand { command: vec!["true".to_owned()], ..MainCommand::default() };
    assert_eq!(main.start(&command).await.unwrap(), Started::Now);
    let id = machine.id().clone();
    world.main_prints(&id, "main", StdStream::Stdout, "abc");
    let first = main.follow(Offset::default()).next().await.unwrap().unwrap();
    assert_eq!(first.bytes, "abc");
    drop((main, machine, machines));

    world.main_prints(&id, "main", StdStream::Stderr, "def");
    world.main_exit(&id, "main", ExitStatus::Code(3));
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    assert_eq!(machines.adopt().await.unwrap(), [(id.clone(), Adopted::Running)]);
    let main = machines.get(&id).unwrap().guest().main_process("main");
    assert_eq!(main.start(&command).await.unwrap(), Started::Before);
    let rest: Vec<_> = main.follow(first.next).map(|piece| piece.unwrap().bytes).collect().await;
    assert_eq!(rest, ["def"]);
    let middle: Vec<_> = main.follow(Offset { stdout: 1, stderr: 2 }).map(|piece| piece.unwrap().bytes).collect().await;
    assert_eq!(middle, ["bc", "f"]);
    assert_eq!(main.wait().await.unwrap(), ExitStatus::Code(3));
    main.signal(Signal::Kill).await.unwrap();
    assert_eq!(main.wait().await.unwrap(), ExitStatus::Code(3), "the first end counts");
}

/// The agent dies after each single effect of create, start, stop and remove. Whatever the point, the next agent finds
/// every process, starts none twice and can clean up.
#[tokio::test]
async fn a_crash_at_any_point_loses_no_machine_and_doubles_none() {
    async fn life(machines: &Machines) -> Result<(), MachineError> {
        let machine = machines.create(spec("a")).await?;
        machine.start().await?;
        machine.stop(Duration::from_secs(9)).await?;
        machines.remove(machine.id(), true).await
    }
    let count = {
        let (root, world, faults) = (tempfile::tempdir().unwrap(), World::new(), crate::FaultPoints::count());
        let machines = Machines::open_with_faults(root.path(), world.hypervisor(), faults.clone()).unwrap();
        life(&machines).await.unwrap();
        faults.hits()
    };
    assert!(count >= 7, "only {count} points");
    for at in 0..count {
        let (root, world) = (tempfile::tempdir().unwrap(), World::new());
        let faults = crate::FaultPoints::crash_at(at);
        {
            let machines = Machines::open_with_faults(root.path(), world.hypervisor(), faults.clone()).unwrap();
            tokio::select! {
                result = life(&machines) => unreachable!("survived point {at}: {result:?}"),
                _ = faults.crashed() => {}
            }
        }
        let live = world.live();
        let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
        for (id, found) in machines.adopt().await.unwrap() {
            assert_eq!(live.contains(&id), found == Adopted::Running, "point {at}: {found:?}");
            match &found {
                Adopted::Prepared => machines.get(&id).unwrap().start().await.unwrap(),
                Adopted::Running => {
                    machines.get(&id).unwrap().kill().await.unwrap();
                }
                Adopted::Stopped(_) | Adopted::Broken(_) | Adopted::Unrestored(_) => {}
            }
            machines.remove(&id, true).await.unwrap();
        }
        assert!(world.live().is_empty(), "point {at} leaves a process");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "point {at} leaves files");
        assert!(world.starts(&MachineId::parse("a").unwrap()) <= 1, "point {at} started twice");
        assert!(world.most_live("a") <= 1);
    }
}

#[tokio::test]
async fn damage_is_told_from_what_can_not_be_read_now() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new();
    let spec = root.path().join("a/spec.json");
    std::fs::create_dir_all(spec.parent().unwrap()).unwrap();
    // What an earlier agent couldn't remove is no reason not to come up.
    std::fs::write(root.path().join(".removing-b"), "").unwrap();
    std::fs::write(&spec, "{").unwrap();
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let found = machines.adopt().await.unwrap();
    assert!(matches!(&found[..], [(_, Adopted::Broken(why))] if why.contains("spec.json")), "{found:?}");
    // A directory can be read by nobody, root included.
    std::fs::remove_file(&spec).unwrap();
    std::fs::create_dir(&spec).unwrap();
    let error = machines.adopt().await.unwrap_err();
    assert!(error.to_string().ends_with("a/spec.json"), "{error}");
}

#[tokio::test]
async fn who_finds_no_room_waits_and_starts_when_there_is_some() {
    let (root, world) = (tempfile::tempdir().unwrap(), World::new());
    world.set_default(Script { start: Start::BusyWith(1), ..Script::default() });
    let machines = Machines::open(root.path(), world.hypervisor()).unwrap();
    let first = machines.create(spec("a")).await.unwrap();
    let second = machines.create(spec("b")).await.unwrap();
    first.start().await.unwrap();
    for _ in 0..2 {
        let error = second.start().await.unwrap_err().to_string();
        assert_eq!(error, "machine b has to wait: 1 guests run, and more may not");
        assert_eq!(*second.state().borrow(), State::Preparing);
    }
    first.kill().await.unwrap();
    second.start().await.unwrap();
    assert_eq!(*second.state().borrow(), State::Running);
}
