//! Saving a QEMU's memory and going on from it.
//!
//! The memory itself is a file that the machine maps (see `args`), so what QEMU writes is the state of the devices only:
//! with the capability `x-ignore-shared` it leaves shared memory where it is. Saving costs some ten milliseconds and 0.5
//! MB, restoring the same, whatever the guest's size.

use std::time::Duration;

use jiff::Timestamp;
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::qmp::{Qmp, connect};
use crate::directory::{self, MachineDir};
use crate::hypervisor::HypervisorError;
use crate::pid::cpu_used;
use crate::renewal::{self, DONE, ENTROPY, SOCKET, Said};
use crate::spec::Spec;
use crate::template::STATE;

/// How long a guest may take from its first instruction until it can be copied. An emulated one runs cloud-init for a minute.
const HELLO: Duration = Duration::from_mins(5);
/// How often it is looked whether the guest rests, and for how long it is waited for. There is no event for that.
const LOOK: Duration = Duration::from_millis(250);
const REST: Duration = Duration::from_mins(1);
/// A guest rests when it used less than this share of one processor, this many looks running.
const IDLE: f64 = 0.12;
const LOOKS: u32 = 4;
/// How long saving or restoring may take; disks can be slow.
const MIGRATION: Duration = Duration::from_mins(2);
/// How long a guest may take to become somebody else. DHCP is in it.
const RENEWAL: Duration = Duration::from_secs(20);

/// The other end of the guest's port.
struct Port {
    lines: tokio::io::Lines<BufReader<tokio::net::unix::OwnedReadHalf>>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Port {
    async fn open(dir: &MachineDir) -> Result<Self, HypervisorError> {
        let (reader, writer) = UnixStream::into_split(connect(dir, SOCKET).await?);
        Ok(Self { lines: BufReader::new(reader).lines(), writer })
    }

    async fn hear(&mut self) -> Result<Said, HypervisorError> {
        let line = self.lines.next_line().await.map_err(HypervisorError::io("can't read what the guest says"))?;
        line.map(|line| Said::parse(&line))
            .ok_or_else(|| HypervisorError::Unresponsive { why: "QEMU closed the guest's port".to_owned() })
    }

    async fn say(&mut self, text: &str) -> Result<(), HypervisorError> {
        self.writer.write_all(text.as_bytes()).await.map_err(HypervisorError::io("can't talk to the guest"))
    }
}

/// Waits for the guest to be ready and at rest, writes its state beside its memory, and ends the process.
pub(super) async fn save(dir: &MachineDir, qmp: &Qmp, pid: u32) -> Result<(), HypervisorError> {
    let mut port = Port::open(dir).await?;
    let hello = async {
        while port.hear().await? != Said::Hello {}
        Ok(())
    };
    tokio::time::timeout(HELLO, hello).await.unwrap_or_else(|_| {
        let why = format!(
            "the guest has no program that takes a new identity: nothing was heard on its port {} in {} s",
            renewal::PORT,
            HELLO.as_secs()
        );
        Err(HypervisorError::Unsupported(why))
    })?;
    rest(pid).await?;
    // The port stays connected meanwhile: the copies' ports are when they wake, so the guest sees no change.
    migrate(qmp, "migrate", &format!("exec:cat >{STATE}")).await?;
    qmp.execute("quit", json!({})).await.map(drop)
}

/// Waits until the guest does next to nothing. One that never rests is taken as it is.
async fn rest(pid: u32) -> Result<(), HypervisorError> {
    let mut quiet = 0;
    let mut before = cpu_used(pid)?;
    let end = tokio::time::Instant::now() + REST;
    while quiet < LOOKS && tokio::time::Instant::now() < end {
        tokio::time::sleep(LOOK).await;
        let now = cpu_used(pid)?;
        let idle = now.saturating_sub(before).as_secs_f64() < LOOK.as_secs_f64() * IDLE;
        quiet = if idle { quiet + 1 } else { 0 };
        before = now;
    }
    Ok(())
}

/// Brings a process that waits for a snapshot to the point where its guest is itself. May be called again after any
/// interruption.
pub(super) async fn restore(spec: &Spec, dir: &MachineDir, qmp: &Qmp) -> Result<(), HypervisorError> {
    let Some(template) = spec.template() else { return Ok(()) };
    if dir.file(DONE).exists() || marked(spec, dir) {
        return Ok(());
    }
    let mut port = Port::open(dir).await?;
    let status = qmp.execute("query-status", json!({})).await?;
    if status.get("status").and_then(Value::as_str) == Some("inmigrate") {
        let state = crate::guest::shell::quote(&template.join(STATE).to_string_lossy());
        match migrate(qmp, "migrate-incoming", &format!("exec:cat {state}")).await {
            // The agent before us had begun it when it died: QEMU goes on by itself.
            Err(HypervisorError::Refused { .. }) if has_begun(qmp).await? => woken(qmp).await?,
            result => result?,
        }
    }
    let renewed = tokio::time::timeout(RENEWAL, renew(spec, &mut port)).await;
    renewed.unwrap_or_else(|_| {
        let why = format!("the restored guest didn't take its new identity within {} s", RENEWAL.as_secs());
        Err(HypervisorError::Unresponsive { why })
    })?;
    directory::write_whole(&dir.file(DONE), b"")
        .map_err(HypervisorError::io(format!("can't write {}", dir.file(DONE).display())))
}

/// Whether somebody has told the process to go on from its snapshot.
async fn has_begun(qmp: &Qmp) -> Result<bool, HypervisorError> {
    let migration = qmp.execute("query-migrate", json!({})).await?;
    let status = migration.get("status").and_then(Value::as_str);
    Ok(!matches!(status, None | Some("none" | "failed" | "cancelled")))
}

/// Waits until a migration is over that another connection began, whose events went there.
async fn woken(qmp: &Qmp) -> Result<(), HypervisorError> {
    let end = tokio::time::Instant::now() + MIGRATION;
    loop {
        let status = qmp.execute("query-status", json!({})).await?;
        if status.get("status").and_then(Value::as_str) != Some("inmigrate") {
            return Ok(());
        }
        if tokio::time::Instant::now() >= end || !has_begun(qmp).await? {
            return Err(HypervisorError::Restore { why: "what an earlier agent began didn't end".to_owned() });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn renew(spec: &Spec, port: &mut Port) -> Result<(), HypervisorError> {
    let mut entropy = [0; ENTROPY];
    rand::rng().fill_bytes(&mut entropy);
    port.say(&renewal::message(spec, Timestamp::now(), &entropy)).await?;
    loop {
        match port.hear().await? {
            Said::Done(instance) if instance == renewal::instance(spec) => return Ok(()),
            Said::Failed(why) => {
                let why = format!("the restored guest couldn't take its new identity: {why}");
                return Err(HypervisorError::Unresponsive { why });
            }
            Said::Done(_) | Said::Hello | Said::Other => {}
        }
    }
}

/// Whether the guest has said on its console that it is ready. A restored machine's console begins empty.
fn marked(spec: &Spec, dir: &MachineDir) -> bool {
    let Some(marker) = &spec.access.ready_marker else { return false };
    std::fs::read(dir.console()).is_ok_and(|text| String::from_utf8_lossy(&text).contains(marker.as_str()))
}

/// Runs one of QEMU's migrations to its end. By way of `cat`, which every QEMU that knows `x-ignore-shared` can.
async fn migrate(qmp: &Qmp, command: &str, uri: &str) -> Result<(), HypervisorError> {
    let on = |name: &str| json!({"capability": name, "state": true});
    let wanted = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
    qmp.execute("migrate-set-capabilities", wanted).await?;
    qmp.execute(command, json!({"uri": uri})).await?;
    let ended = tokio::time::timeout(MIGRATION, qmp.migration_ended()).await;
    match ended.ok().flatten().as_deref() {
        Some("completed") => Ok(()),
        other => Err(HypervisorError::Refused {
            command: command.to_owned(),
            why: match other {
                Some(status) => format!("it ended as {status:?}; the machine's process.log may tell why"),
                None => "it didn't end".to_owned(),
            },
        }),
    }
}
