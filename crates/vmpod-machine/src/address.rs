//! Following a guest's address where it isn't known beforehand: on a bridge whose DHCP server isn't ours, and on Apple's networks.
//!
//! What was learnt is written into the machine's directory, so that an agent that comes back knows it at once: guests speak of
//! their addresses seldom.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use vmpod_network::learn::{Learner, Learnt, Source};
use vmpod_network::watch::Watch;

use crate::console;
use crate::directory::{self, MachineDir};
use crate::lifecycle::State;
use crate::machine::until_running;
use crate::spec::{Learns, MacAddr, Spec};
use crate::vmnet;

/// The file in a machine's directory.
const FILE: &str = "address.json";
/// How long nothing is heard after a change: a guest that claims another address with every packet mustn't keep the disk busy.
const REST: Duration = Duration::from_millis(200);
/// How often the host's leases and neighbours are looked at while nothing is known, at least.
const SOON: Duration = Duration::from_secs(1);
/// How often they are looked at afterwards.
const LATER: Duration = Duration::from_secs(5);

/// Follows the address of a machine's guest until the machine is over; a task only where something is to be learnt. `leases` is the
/// file of the host's DHCP server, where the hypervisor's networks have one.
pub(crate) fn follow(
    spec: &Spec,
    dir: &MachineDir,
    state: watch::Receiver<State>,
    leases: Option<&Path>,
) -> (watch::Receiver<Option<Learnt>>, Option<AbortHandle>) {
    let Some(learns) = spec.learns() else { return (watch::channel(None).1, None) };
    let known = directory::read_json::<Learnt>(&dir.file(FILE)).unwrap_or_else(|error| {
        tracing::warn!(machine = %spec.id, %error, "the address that was learnt can't be read; it is learnt anew");
        None
    });
    let (sender, receiver) = watch::channel(known);
    let shown = Shown { dir: dir.clone(), sender };
    let task = match learns {
        Learns::Interface { interface, mac } => {
            tokio::spawn(Ear { interface: interface.to_owned(), mac, shown }.run(state))
        }
        Learns::Leases { mac, hostname } => {
            let leases = leases.unwrap_or(Path::new(crate::vz::LEASES)).to_owned();
            tokio::spawn(Reader { leases, mac, hostname: hostname.to_owned(), shown }.run(state))
        }
    };
    (receiver, Some(task.abort_handle()))
}

struct Ear {
    interface: String,
    mac: MacAddr,
    shown: Shown,
}

impl Ear {
    async fn run(self, mut state: watch::Receiver<State>) {
        // The interface is there as long as the machine's process is.
        if !until_running(&mut state).await {
            return;
        }
        tokio::select! {
            () = self.learn() => {}
            _ = state.wait_for(State::is_final) => {}
        }
    }

    async fn learn(&self) {
        let mut learner = Learner::resume(self.shown.learnt());
        let mut wait = Duration::from_millis(100);
        loop {
            let error = match Watch::open(&self.interface, self.mac) {
                Err(error) => error,
                Ok(mut watch) => self.listen(&mut watch, &mut learner).await,
            };
            tracing::warn!(machine = %self.shown.dir.id(), interface = self.interface, %error, "its address can't be learnt; trying again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(10));
        }
    }

    /// Learns for as long as something can be heard; what went wrong then.
    async fn listen(&self, watch: &mut Watch, learner: &mut Learner) -> std::io::Error {
        loop {
            let seen = tokio::select! {
                seen = watch.next() => Some(seen),
                () = until(learner.wake()) => None,
            };
            let now = Timestamp::now();
            match seen {
                Some(Ok(seen)) => {
                    tracing::debug!(machine = %self.shown.dir.id(), ?seen, "network");
                    if let Some(address) = learner.step(seen, now)
                        && let Err(error) = watch.ask(address).await
                    {
                        return error;
                    }
                }
                Some(Err(error)) => return error,
                None => learner.pass(now),
            }
            if self.shown.show(learner.learnt()) {
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// Reads a guest's address from what the host knows of its own networks.
struct Reader {
    leases: PathBuf,
    mac: MacAddr,
    hostname: String,
    shown: Shown,
}

impl Reader {
    async fn run(self, mut state: watch::Receiver<State>) {
        if !until_running(&mut state).await {
            return;
        }
        tokio::select! {
            () = self.look_again_and_again() => {}
            _ = state.wait_for(State::is_final) => {}
        }
    }

    async fn look_again_and_again(&self) {
        let mut changes = console::Watch::new(&self.leases).ok();
        // Whether the neighbours are asked too, which takes a process.
        let mut neighbours = true;
        loop {
            let mut found = self.leased().await;
            if found.is_none() && neighbours {
                found = self.neighbour().await;
            }
            // What the host knew once and knows no more is still the best that is known: leases are forgotten at a restart.
            if let Some((address, from)) = found
                && self.shown.learnt().is_none_or(|known| known.address != address)
            {
                self.shown.show(Some(Learnt { address, from, at: Timestamp::now() }));
            }
            let known = self.shown.learnt().is_some();
            neighbours = tokio::select! {
                () = tokio::time::sleep(if known { LATER } else { SOON }) => true,
                () = changed(changes.as_mut()), if !known => false,
            };
        }
    }

    async fn leased(&self) -> Option<(Ipv4Addr, Source)> {
        let text = tokio::fs::read(&self.leases).await.ok()?;
        let leases = vmnet::leases(&String::from_utf8_lossy(&text));
        vmnet::leased(&leases, self.mac, Some(&self.hostname), Timestamp::now()).map(|address| (address, Source::Lease))
    }

    /// Bridged guests have their lease from another host; this one knows them when they spoke to each other.
    async fn neighbour(&self) -> Option<(Ipv4Addr, Source)> {
        let mut arp = tokio::process::Command::new("arp");
        let output = arp.arg("-an").stdin(Stdio::null()).kill_on_drop(true).output().await.ok()?;
        let address = vmnet::neighbour(&String::from_utf8_lossy(&output.stdout), self.mac, None)?;
        Some((address, Source::Neighbour))
    }
}

/// Waits for a change of a file; for ever where it can't be watched.
async fn changed(watch: Option<&mut console::Watch>) {
    match watch {
        Some(watch) => match watch.changed().await {
            // Whoever writes the file does so in several steps.
            Ok(()) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(_) => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// What is known of a guest's address, here and on disk.
struct Shown {
    dir: MachineDir,
    sender: watch::Sender<Option<Learnt>>,
}

impl Shown {
    fn learnt(&self) -> Option<Learnt> {
        *self.sender.borrow()
    }

    /// Whether it is news.
    fn show(&self, learnt: Option<Learnt>) -> bool {
        if *self.sender.borrow() == learnt {
            return false;
        }
        // Written first: who acts on an address may rely on its being known after a crash.
        let path = self.dir.file(FILE);
        let written = match &learnt {
            Some(learnt) => directory::write_json(&path, learnt),
            None => std::fs::remove_file(&path),
        };
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "the address that was learnt can't be written down");
        }
        if let Some(Learnt { address, from, .. }) = learnt {
            tracing::info!(machine = %self.dir.id(), %address, ?from, "learnt its address");
        }
        self.sender.send_replace(learnt);
        true
    }
}

/// Waits until a time; for ever without one.
async fn until(time: Option<Timestamp>) {
    let Some(time) = time else { return std::future::pending().await };
    let wait = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default();
    tokio::time::sleep(wait).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vz::config::tests::mac as machine;

    #[tokio::test]
    async fn a_lease_is_seen_when_it_is_written_and_kept_when_it_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let spec = machine("a");
        let dir = MachineDir::new(root.path(), &spec.id);
        dir.make().unwrap();
        let leases = root.path().join("dhcpd_leases");
        let state = watch::Sender::new(State::Booting);
        let (mut learnt, task) = follow(&spec, &dir, state.subscribe(), Some(&leases));
        assert!(task.is_some());
        state.send_replace(State::Running);
        let lease = |address: &str| {
            format!("{{\n\tname=x\n\tip_address={address}\n\thw_address=1,2:cf:58:3b:87:a6\n\tlease=0x7fffffff\n}}\n")
        };
        std::fs::write(&leases, lease("192.168.64.7")).unwrap();
        let first = learnt.wait_for(Option::is_some).await.unwrap().unwrap();
        assert_eq!((first.address, first.from), ([192, 168, 64, 7].into(), Source::Lease));
        // Bootpd was restarted and forgot; the next agent knows it all the same.
        std::fs::write(&leases, "").unwrap();
        let (again, _) = follow(&spec, &dir, state.subscribe(), Some(&leases));
        assert_eq!(*again.borrow(), Some(first));
    }
}
