//! Machines with a real QEMU and the real tiny guest: a life, the ways into the guest, an agent that dies, a process that
//! is killed, a guest that doesn't listen to its power button.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::host::{Host, ready};
use e2e::prerequisites::scratch;
use futures::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use vmpod_machine::kvm::{self, Kvm};
use vmpod_machine::qemu::Qemu;
use vmpod_machine::{
    Adopted, Exec, ExitCause, ExitStatus, GuestError, GuestState, Machine, MachineError, MachineId, Machines,
    MainCommand, Memory, Offset, Signal, Spec, Started, State, StdStream, Waiting, Winsize,
};

const PATIENCE: Duration = Duration::from_mins(2);

async fn sh(machine: &Machine, script: &str) -> Result<(i32, String, String)> {
    let session = machine.guest().exec(Exec::new(["sh", "-c", script])).await?;
    let (status, out, err) = tokio::time::timeout(PATIENCE, session.output()).await??;
    Ok((status.code(), String::from_utf8(out)?, String::from_utf8(err)?))
}

async fn stopped(machine: &Machine) -> Result<ExitCause> {
    let mut state = machine.state();
    let state = tokio::time::timeout(PATIENCE, state.wait_for(State::is_final)).await??;
    match &*state {
        State::Stopped(exit) => Ok(exit.cause),
        other => bail!("{other:?}"),
    }
}

/// Everything that a guest on one connection can be asked, in one boot.
#[tokio::test(flavor = "multi_thread")]
async fn the_ways_into_a_guest() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let machine = host.running(&machines, "ways").await?;
    let guest = machine.guest();

    assert_eq!(sh(&machine, "hostname; echo err >&2; exit 42").await?, (42, "ways\n".into(), "err\n".into()));
    let missing = guest.exec(Exec::new(["/no/such/program"])).await?.output().await?;
    assert_eq!(missing.0, ExitStatus::Code(127));

    // Input, environment and directory, with everything a shell might touch.
    let exec = Exec {
        env: vec![("A".into(), "it's \"x\"\n$HOME `id`".into())],
        workdir: Some("/etc".into()),
        stdin: true,
        ..Exec::new(["sh", "-c", "printf '%s|' \"$A\" \"$PWD\" \"$1\"; cat", "x", "a  'b'\n$c"])
    };
    let mut session = guest.exec(exec).await?;
    let mut stdin = session.stdin.take().context("no input")?;
    let big = vec![b'x'; 300_000];
    let feed = tokio::spawn(async move {
        stdin.write_all(&big).await?;
        stdin.shutdown().await
    });
    let (status, out, _) = session.output().await?;
    feed.await??;
    assert_eq!(status, ExitStatus::Code(0));
    let head = "it's \"x\"\n$HOME `id`|/etc|a  'b'\n$c|";
    ensure!(out.starts_with(head.as_bytes()), "{}", String::from_utf8_lossy(&out[..200]));
    assert_eq!(out.len(), head.len() + 300_000);

    // A terminal, its size, and a new size. A size travels beside the input, not in a row with it, so the command waits.
    let exec = Exec {
        tty: Some(Winsize { cols: 91, rows: 33 }),
        env: vec![("SECRET".into(), "s3cret".into())],
        stdin: true,
        ..Exec::new([
            "sh",
            "-c",
            "stty size; echo $SECRET; until stty size | grep -q '^50'; do sleep 0.1; done; read x; stty size",
        ])
    };
    let mut session = guest.exec(exec).await?;
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while !text.contains("s3cret") {
        let length = tokio::time::timeout(PATIENCE, session.stdout.read(&mut buffer)).await??;
        ensure!(length > 0, "the terminal closed: {text}");
        text.push_str(std::str::from_utf8(&buffer[..length])?);
    }
    ensure!(text.starts_with("33 91"), "{text}");
    session.control.resize(Winsize { cols: 100, rows: 50 });
    session.stdin.take().context("no input")?.write_all(b"\n").await?;
    let mut rest = String::new();
    tokio::time::timeout(PATIENCE, session.stdout.read_to_string(&mut rest)).await??;
    ensure!(rest.contains("50 100"), "{rest}");
    assert_eq!(session.wait().await?, ExitStatus::Code(0));

    // A signal. One that comes between the server's fork and exec is lost in the server, so the command speaks first.
    let mut session = guest.exec(Exec::new(["sh", "-c", "echo up; exec sleep 100"])).await?;
    session.stdout.read_exact(&mut [0; 3]).await?;
    session.control.signal(Signal::Term);
    let ended = tokio::time::timeout(PATIENCE, session.wait()).await??;
    assert_eq!(ended.code(), 128 + 15, "{ended:?}");

    // Many at once: more than servers allow on one connection.
    let many = (0..14).map(|i| {
        let machine = machine.clone();
        async move { sh(&machine, &format!("sleep 0.5; echo {i}")).await }
    });
    for (i, result) in futures::future::join_all(many).await.into_iter().enumerate() {
        assert_eq!(result?.1, format!("{i}\n"));
    }

    // Files.
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    guest.write_file("/tmp/it's a file", 0o640, &bytes).await?;
    ensure!(guest.read_file("/tmp/it's a file").await? == bytes, "the file came back changed");
    assert_eq!(sh(&machine, "stat -c %a \"/tmp/it's a file\"; ls -a /tmp | grep -c vmpod.[0-9]").await?.1, "640\n0\n");
    let error = guest.read_file("/no/such/file").await.err().context("a file that isn't there was read")?;
    ensure!(matches!(&error, GuestError::Refused { .. }), "{error}");

    // Ports: by a channel to the guest's loopback, and by the address of the machine.
    let server = guest.exec(Exec::new(["sh", "-c", "echo hello | nc -l -p 8080; echo again | nc -l -p 8080"])).await?;
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match guest.forward(8080).await {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let mut line = [0; 6];
    stream.read_exact(&mut line).await?;
    assert_eq!(&line, b"hello\n");
    drop(stream);
    let address = machine.spec().networks[0].address().context("no address")?;
    let again = connect(address, 8080).await?;
    assert_eq!(again, b"again\n");
    server.control.signal(Signal::Kill);

    let usage = machine.stats().await?;
    ensure!(usage.rss > 50 << 20 && usage.cpu > Duration::from_millis(100), "{usage:?}");

    // A second machine of the same name, and a removal of what runs, are refused.
    let other = Spec { memory: Memory::from_mib(512), ..machine.spec().clone() };
    ensure!(matches!(machines.create(other).await, Err(MachineError::Exists(_))), "two of one name");
    ensure!(matches!(machines.remove(machine.id(), false).await, Err(MachineError::StillRuns(_))), "removed alive");

    let begin = Instant::now();
    machine.stop(Duration::from_secs(30)).await?;
    assert_eq!(stopped(&machine).await?, ExitCause::GuestShutdown);
    ensure!(begin.elapsed() < Duration::from_secs(20), "the power button took {:?}", begin.elapsed());
    ensure!(matches!(guest.exec(Exec::new(["true"])).await, Err(GuestError::Stopped)), "exec after the end");
    machines.remove(machine.id(), false).await?;
    assert_eq!(host.processes(), Vec::<u32>::new());
    assert_eq!(std::fs::read_dir(host.root())?.count(), 0);
    Ok(())
}

async fn connect(address: Ipv4Addr, port: u16) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut stream = tokio::net::TcpStream::connect((address, port)).await?;
        let mut bytes = Vec::new();
        match tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await {
            Ok(Ok(1..)) => return Ok(bytes),
            _ if Instant::now() > deadline => bail!("nobody answers at {address}:{port}"),
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The agent is dropped, as by kill -9, again and again while a main process prints. Nothing is lost, doubled or started
/// a second time.
#[tokio::test(flavor = "multi_thread")]
async fn a_main_process_outlives_its_agents() -> Result<()> {
    let host = Host::new().await?;
    let mut machines = host.machines()?;
    let id = host.running(&machines, "main").await?.id().clone();
    let script = "echo begun >>/tmp/starts; i=0; while [ $i -lt 40 ]; do echo out $i; echo err $i >&2; i=$((i+1)); sleep 0.1; done; exit 3";
    let command = MainCommand {
        command: ["sh", "-c", script].map(ToOwned::to_owned).to_vec(),
        env: vec![("TOKEN".into(), "s3cret".into())],
        workdir: None,
        stdin: false,
    };
    let (mut at, mut out, mut err) = (Offset::default(), String::new(), String::new());
    let mut starts = Vec::new();
    for agent in 0.. {
        let machine = machines.get(&id).context("the machine was not adopted")?;
        ready(&machine).await?;
        let main = machine.guest().main_process("main");
        starts.push(main.start(&command).await?);
        let mut chunks = main.follow(at);
        let mut seen = 0;
        let ended = loop {
            match tokio::time::timeout(PATIENCE, chunks.next()).await? {
                None => break true,
                Some(chunk) => {
                    let chunk = chunk?;
                    let text = std::str::from_utf8(&chunk.bytes)?;
                    if chunk.stream == StdStream::Stdout {
                        out.push_str(text);
                    } else {
                        err.push_str(text);
                    }
                    at = chunk.next;
                    seen += 1;
                }
            }
            if seen == 3 && agent < 3 {
                break false;
            }
        };
        if ended {
            assert_eq!(main.wait().await?, ExitStatus::Code(3));
            break;
        }
        drop((main, chunks, machine, machines));
        machines = host.machines()?;
        assert_eq!(machines.adopt().await?, [(id.clone(), Adopted::Running)]);
    }
    assert_eq!(starts, [Started::Now, Started::Before, Started::Before, Started::Before]);
    assert_eq!(out, (0..40).map(|i| format!("out {i}\n")).collect::<Vec<_>>().concat());
    assert_eq!(err, (0..40).map(|i| format!("err {i}\n")).collect::<Vec<_>>().concat());
    let machine = machines.get(&id).context("gone")?;
    assert_eq!(sh(&machine, "cat /tmp/starts").await?.1, "begun\n");
    assert_eq!(sh(&machine, "ps | grep -c [s]3cret").await?.1, "0\n");
    machines.remove(&id, true).await?;
    assert_eq!(host.processes(), Vec::<u32>::new());
    Ok(())
}

/// The agent dies, and the machine ends in different ways before the next one looks.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_nobody_saw_is_found_out() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let machine = host.running(&machines, "unseen").await?;
    let id = machine.id().clone();
    assert_eq!(host.processes().len(), 1);
    // The guest will shut down when the agent is gone.
    sh(&machine, "(sleep 1; poweroff) >/dev/null 2>&1 </dev/null &").await?;
    drop((machine, machines));
    let deadline = Instant::now() + PATIENCE;
    while !host.processes().is_empty() {
        ensure!(Instant::now() < deadline, "the guest doesn't power off");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let machines = host.machines()?;
    let adopted = machines.adopt().await?;
    let [(_, Adopted::Stopped(exit))] = adopted.as_slice() else { bail!("{adopted:?}") };
    assert_eq!(exit.cause, ExitCause::GuestShutdown, "{exit:?}");
    let machine = machines.get(&id).context("gone")?;
    ensure!(machine.start().await.is_err(), "a finished machine ran again");
    assert_eq!(machine.exit().as_ref(), Some(exit));
    machines.remove(&id, false).await?;

    // Killed while an agent looks; and, the same agent's second look.
    let machine = host.running(&machines, "killed").await?;
    let pid = *host.processes().first().context("no process")?;
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    rustix::process::kill_process(raw, rustix::process::Signal::KILL)?;
    assert_eq!(stopped(&machine).await?, ExitCause::Killed);
    ensure!(matches!(*machine.guest().ready().borrow(), GuestState::Lost(_)), "still ready");
    machines.remove(machine.id(), false).await?;
    Ok(())
}

/// A guest that ignores the button is killed at its deadline; a second machine can't be started in its directory
/// meanwhile; a silent process is found and ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_stubborn_machine() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let machine = host.running(&machines, "stubborn").await?;
    sh(&machine, "killall acpid; sleep 0.1").await?;
    let begin = Instant::now();
    machine.stop(Duration::from_millis(1500)).await?;
    assert_eq!(stopped(&machine).await?, ExitCause::Killed);
    let took = begin.elapsed();
    ensure!(took >= Duration::from_millis(1400) && took < Duration::from_secs(10), "killed after {took:?}");
    machines.remove(machine.id(), false).await?;

    let machine = machines.create(host.spec(&machines, "silent")?).await?;
    machine.start().await?;
    let id = machine.id().clone();
    drop(machine);
    let pid = *host.processes().first().context("no process")?;
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    rustix::process::kill_process(raw, rustix::process::Signal::STOP)?;
    drop(machines);
    let machines = host.machines()?;
    let adopted = machines.adopt().await?;
    let [(_, Adopted::Broken(why))] = adopted.as_slice() else { bail!("{adopted:?}") };
    ensure!(why.contains(&pid.to_string()), "{why}");
    ensure!(machines.remove(&id, false).await.is_err(), "removed while a process is there");
    machines.remove(&id, true).await?;
    assert_eq!(host.processes(), Vec::<u32>::new());
    Ok(())
}

/// What the guest is waited for is told truly, and a key that is refused or a host key that changed is no silent hang.
#[tokio::test(flavor = "multi_thread")]
async fn reasons_are_told() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let mut spec = host.spec(&machines, "reasons")?;
    let dir = machines.directory(&spec.id)?;
    if let Some(seed) = &mut spec.seed {
        seed.authorized_keys.clear();
    }
    let machine = machines.create(spec).await?;
    machine.start().await?;
    let guest = machine.guest();
    wait_for(&machine, "the guest is booting").await?;
    wait_for(&machine, "refuses our login as root").await?;
    let error = guest.exec(Exec::new(["true"])).await.err().context("exec in a guest that isn't ready")?;
    ensure!(matches!(&error, GuestError::NotReady(GuestState::Waiting(Waiting::LoginRefused { .. }))), "{error}");

    let known = dir.file("known_host");
    ensure!(known.exists(), "the host key isn't pinned");
    std::fs::write(&known, other_key(&machines)?)?;
    wait_for(&machine, "host key changed").await?;
    machine.kill().await?;
    Ok(())
}

fn other_key(machines: &Machines) -> Result<String> {
    Ok(machines.ssh_key(&MachineId::parse("other")?)?.public)
}

async fn wait_for(machine: &Machine, reason: &str) -> Result<()> {
    let mut ready = machine.guest().ready();
    let found = tokio::time::timeout(PATIENCE, ready.wait_for(|state| state.to_string().contains(reason))).await;
    match found {
        Ok(state) => state.map(drop).map_err(Into::into),
        Err(_) => bail!("\"{reason}\" was never said; now: {}", *machine.guest().ready().borrow()),
    }
}

/// Without a marker, the guest is found by trying.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_a_marker_is_found() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let mut spec = host.spec(&machines, "unmarked")?;
    spec.access.ready_marker = None;
    let machine = machines.create(spec).await?;
    machine.start().await?;
    ready(&machine).await?;
    assert_eq!(sh(&machine, "pidof dropbear | wc -w").await?.0, 0);
    machines.remove(machine.id(), true).await?;
    Ok(())
}

/// Whatever this host's KVM is like, the answer comes in time, and is known the second time.
#[tokio::test]
async fn kvm_is_probed_within_its_limit() -> Result<()> {
    let dir = tempfile::tempdir_in(scratch()?)?;
    let (qemu, cache) = (Qemu::default(), dir.path().join("kvm.json"));
    let begin = Instant::now();
    let found = kvm::probe(&qemu, &cache).await;
    ensure!(begin.elapsed() < Duration::from_secs(8), "{found:?} took {:?}", begin.elapsed());
    let again = Instant::now();
    assert_eq!(kvm::probe(&qemu, &cache).await, found);
    if !matches!(found, Kvm::Absent | Kvm::Denied(_)) {
        ensure!(again.elapsed() < Duration::from_millis(500), "asked again: {:?}", again.elapsed());
    }
    Ok(())
}
