//! A relay that counts what a server sends.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;

/// Listens on loopback for as long as the process lives.
pub(super) struct Relay {
    host: String,
    bytes: Arc<AtomicU64>,
}

impl Relay {
    pub(super) fn start(to: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let host = listener.local_addr()?.to_string();
        let bytes = Arc::new(AtomicU64::new(0));
        let (counter, to) = (Arc::clone(&bytes), to.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                let (Ok(from_client), Ok(to_server)) = (client.try_clone(), server.try_clone()) else { continue };
                std::thread::spawn(move || copy(from_client, to_server, &AtomicU64::new(0)));
                let counter = Arc::clone(&counter);
                std::thread::spawn(move || copy(server, client, &counter));
            }
        });
        Ok(Self { host, bytes })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// What the server has sent so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        counter.fetch_add(read as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // The other direction may still have something to say.
    to.shutdown(Shutdown::Write).ok();
}
