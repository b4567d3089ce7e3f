//! Making an SSH connection to a guest that may not be there yet.
//!
//! QEMU's user network accepts a connection on the host before anybody listens in the guest, and forwards it when it can:
//! a first packet that was lost because the guest had no interface yet is sent again only seconds later. So a connection
//! proves nothing, and waiting for one alone is slow, while many short-lived ones make the guest fork a server for each.
//! Here several connections overlap: a new one is begun from time to time while the older ones wait, and the first on
//! which a server speaks is used. None of them is spoken on before that.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use russh::client::{self, AuthResult, Handle};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use vmpod_network::learn::Learnt;

use super::Waiting;
use crate::directory::{MachineDir, write_whole};
use crate::id::MachineId;
use crate::spec::{Access, Auth, Spec};

/// How many connections may wait at the same time.
const WAITING: usize = 6;
/// How long one of them waits. QEMU gives up on its own after 75 s.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long key exchange and login may take. An emulated guest under load needs seconds.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Where and as whom to log in.
pub(super) struct Target {
    pub(super) id: MachineId,
    pub(super) console: PathBuf,
    address: Option<SocketAddr>,
    /// Where the address is, when it has to be learnt.
    learnt: watch::Receiver<Option<Learnt>>,
    access: Access,
    key: Option<PathBuf>,
    known_host: PathBuf,
    config: Arc<client::Config>,
}

/// A guest's address at some time.
pub(super) struct Moved {
    learnt: watch::Receiver<Option<Learnt>>,
    from: Option<Ipv4Addr>,
}

impl Moved {
    /// Waits until the guest has another address than then; for ever where it has one for good.
    pub(super) async fn moved(&mut self) {
        let Some(from) = self.from else { return std::future::pending().await };
        let other = |learnt: &Option<Learnt>| learnt.is_none_or(|learnt| learnt.address != from);
        if self.learnt.wait_for(other).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A connection that is logged in.
pub(super) struct Session {
    pub(super) handle: Handle<Client>,
    /// Cancelled when the connection is gone.
    pub(super) closed: CancellationToken,
}

/// Our side of a connection.
pub(super) struct Client {
    known_host: PathBuf,
    host_key_changed: Arc<Mutex<bool>>,
    _closed: DropGuard,
}

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, server: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = server else { return Ok(false) };
        let known = match std::fs::read_to_string(&self.known_host) {
            Ok(line) => Some(PublicKey::from_openssh(&line)?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        if let Some(known) = known {
            let same = known.key_data() == key.key_data();
            *self.host_key_changed.lock().unwrap_or_else(PoisonError::into_inner) = !same;
            return Ok(same);
        }
        write_whole(&self.known_host, (key.to_openssh()? + "\n").as_bytes())?;
        Ok(true)
    }
}

impl Target {
    pub(super) fn new(spec: &Spec, dir: &MachineDir, learnt: watch::Receiver<Option<Learnt>>) -> Self {
        let key = match &spec.access.auth {
            Auth::Key(path) => Some(dir.path().join(path)),
            Auth::Password(_) => None,
        };
        let config = client::Config {
            nodelay: true,
            // The way leads through the hypervisor's own TCP, which never notices that a guest is gone.
            keepalive_interval: Some(Duration::from_secs(20)),
            keepalive_max: 3,
            ..client::Config::default()
        };
        Self {
            id: spec.id.clone(),
            console: dir.console(),
            address: spec.ssh_address(),
            learnt,
            access: spec.access.clone(),
            key,
            known_host: dir.file("known_host"),
            config: Arc::new(config),
        }
    }

    /// What the guest prints once it listens.
    pub(super) fn marker(&self) -> Option<&str> {
        self.access.ready_marker.as_deref().filter(|marker| !marker.is_empty())
    }

    /// Whether somebody connected to this machine before.
    pub(super) fn was_connected(&self) -> bool {
        self.known_host.exists()
    }

    fn address(&self) -> Option<SocketAddr> {
        let learnt = || self.learnt.borrow().map(|learnt| (learnt.address, self.access.port).into());
        self.address.or_else(learnt)
    }

    /// Waits until the address is known, and tells when it has become another.
    pub(super) async fn located(&self) -> Moved {
        let mut learnt = self.learnt.clone();
        if self.address.is_some() {
            return Moved { learnt, from: None };
        }
        let known = learnt.wait_for(Option::is_some).await.map(|learnt| learnt.map(|learnt| learnt.address));
        match known {
            Ok(from) => Moved { learnt, from },
            // The machine is over.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether the address is known.
    pub(super) fn is_located(&self) -> bool {
        self.address().is_some()
    }

    /// Connects, however long it takes, and tells meanwhile what it waits for. `listens` says that the guest's server
    /// is known to listen.
    pub(super) async fn connect(&self, listens: bool, waiting: &(dyn Fn(Waiting) + Sync)) -> Session {
        let mut pause = Duration::from_millis(200);
        loop {
            let stream = self.first_to_speak(listens, waiting).await;
            match self.log_in(stream).await {
                Ok(session) => return session,
                Err(why) => waiting(why),
            }
            // Somebody is there and doesn't let us in: perhaps the key isn't installed yet. Servers punish haste.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// One connection more, to a guest that is known to listen.
    pub(super) async fn connect_once(&self) -> Result<Session, Waiting> {
        let stream = self.knock().await?;
        self.log_in(stream).await
    }

    async fn first_to_speak(&self, listens: bool, waiting: &(dyn Fn(Waiting) + Sync)) -> TcpStream {
        let mut attempts = FuturesUnordered::new();
        let every = Duration::from_millis(if listens { 300 } else { 500 });
        waiting(Waiting::Silent);
        attempts.push(self.knock());
        loop {
            tokio::select! {
                attempt = attempts.next(), if !attempts.is_empty() => match attempt {
                    Some(Ok(stream)) => return stream,
                    Some(Err(why)) => waiting(why),
                    None => {}
                },
                () = tokio::time::sleep(every) => {
                    if attempts.len() < WAITING {
                        attempts.push(self.knock());
                    }
                }
            }
        }
    }

    /// Connects and waits until the other side speaks, without saying anything.
    async fn knock(&self) -> Result<TcpStream, Waiting> {
        let address = self.address().ok_or(Waiting::Address)?;
        let waits = async {
            let stream = TcpStream::connect(address).await.map_err(|_| Waiting::Refused)?;
            match stream.peek(&mut [0]).await {
                Ok(1..) => Ok(stream),
                // The user network answers a closed port of the guest by closing.
                Ok(0) | Err(_) => Err(Waiting::Refused),
            }
        };
        tokio::time::timeout(PATIENCE, waits).await.unwrap_or(Err(Waiting::Silent))
    }

    async fn log_in(&self, stream: TcpStream) -> Result<Session, Waiting> {
        tokio::time::timeout(HANDSHAKE, self.handshake(stream))
            .await
            .unwrap_or_else(|_| Err(Waiting::Broken("the SSH handshake took too long".to_owned())))
    }

    async fn handshake(&self, stream: TcpStream) -> Result<Session, Waiting> {
        let broken = |error: &dyn std::fmt::Display| Waiting::Broken(error.to_string());
        stream.set_nodelay(true).map_err(|error| broken(&error))?;
        let closed = CancellationToken::new();
        let host_key_changed = Arc::new(Mutex::new(false));
        let client = Client {
            known_host: self.known_host.clone(),
            host_key_changed: Arc::clone(&host_key_changed),
            _closed: closed.clone().drop_guard(),
        };
        let connected = client::connect_stream(Arc::clone(&self.config), stream, client).await;
        let mut handle = connected.map_err(|error| {
            if *host_key_changed.lock().unwrap_or_else(PoisonError::into_inner) {
                Waiting::HostKeyChanged
            } else {
                broken(&error)
            }
        })?;
        let user = self.access.user.clone();
        let result = match (&self.access.auth, &self.key) {
            (Auth::Password(password), _) => handle.authenticate_password(user, password.reveal()).await,
            (Auth::Key(_), key) => {
                let key = key.as_deref().unwrap_or(std::path::Path::new("key"));
                let key = std::fs::read(key)
                    .map_err(|error| Waiting::Broken(format!("can't read {}: {error}", key.display())))
                    .and_then(|pem| PrivateKey::from_openssh(pem).map_err(|error| broken(&error)))?;
                handle.authenticate_publickey(user, PrivateKeyWithHashAlg::new(Arc::new(key), None)).await
            }
        };
        match result {
            Ok(AuthResult::Success) => Ok(Session { handle, closed }),
            Ok(AuthResult::Failure { .. }) => Err(Waiting::LoginRefused { user: self.access.user.clone() }),
            Err(error) => Err(broken(&error)),
        }
    }
}
