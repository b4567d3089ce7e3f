//! Following a guest's address where it isn't known beforehand: on a bridge whose DHCP server isn't ours.
//!
//! What was learnt is written into the machine's directory, so that an agent that comes back knows it at once: guests speak of
//! their addresses seldom.

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use vmpod_network::learn::{Learner, Learnt};
use vmpod_network::watch::Watch;

use crate::directory::{self, MachineDir};
use crate::lifecycle::State;
use crate::machine::until_running;
use crate::spec::{MacAddr, Spec};

/// The file in a machine's directory.
const FILE: &str = "address.json";
/// How long nothing is heard after a change: a guest that claims another address with every packet mustn't keep the disk busy.
const REST: Duration = Duration::from_millis(200);

/// Follows the address of a machine's guest until the machine is over; a task only where something is to be learnt.
pub(crate) fn follow(
    spec: &Spec,
    dir: &MachineDir,
    state: watch::Receiver<State>,
) -> (watch::Receiver<Option<Learnt>>, Option<AbortHandle>) {
    let Some((interface, mac)) = spec.learns() else { return (watch::channel(None).1, None) };
    let known = directory::read_json::<Learnt>(&dir.file(FILE)).unwrap_or_else(|error| {
        tracing::warn!(machine = %spec.id, %error, "the address that was learnt can't be read; it is learnt anew");
        None
    });
    let (sender, receiver) = watch::channel(known);
    let ear = Ear { interface: interface.to_owned(), mac, dir: dir.clone(), sender };
    (receiver, Some(tokio::spawn(ear.run(state)).abort_handle()))
}

struct Ear {
    interface: String,
    mac: MacAddr,
    dir: MachineDir,
    sender: watch::Sender<Option<Learnt>>,
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
        let mut learner = Learner::resume(*self.sender.borrow());
        let mut wait = Duration::from_millis(100);
        loop {
            let error = match Watch::open(&self.interface, self.mac) {
                Err(error) => error,
                Ok(mut watch) => self.listen(&mut watch, &mut learner).await,
            };
            tracing::warn!(machine = %self.dir.id(), interface = self.interface, %error, "its address can't be learnt; trying again");
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
                    tracing::debug!(machine = %self.dir.id(), ?seen, "network");
                    if let Some(address) = learner.step(seen, now)
                        && let Err(error) = watch.ask(address).await
                    {
                        return error;
                    }
                }
                Some(Err(error)) => return error,
                None => learner.pass(now),
            }
            if self.show(learner.learnt()) {
                tokio::time::sleep(REST).await;
            }
        }
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
