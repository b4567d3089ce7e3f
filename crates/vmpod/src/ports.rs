//! Who has a port that is wanted.

use std::net::SocketAddr;
use std::path::Path;

use crate::report::Remedy;

/// A process with a listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) pid: u32,
    pub(crate) name: String,
}

/// The process that listens on a TCP port of this host, where that can be seen.
///
/// Linux tells in `/proc`; another user's processes stay unseen.
pub(crate) fn listener(port: u16) -> Option<Listener> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let wanted: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let holds = std::fs::read_dir(process.path().join("fd"))
            .ok()?
            .flatten()
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| wanted.iter().any(|w| to == Path::new(w))));
        let name = || std::fs::read_to_string(process.path().join("comm")).unwrap_or_default().trim().to_owned();
        holds.then(|| Listener { pid, name: name() })
    })
}

/// The inodes of sockets in state LISTEN (0A) on a port, of the text of `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let port = format!("{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
            (*state == "0A" && local.rsplit_once(':')?.1 == port).then(|| (*inode).to_owned())
        })
        .collect()
}

/// Adds to an error what to do when it comes of an address that is in use.
pub(crate) fn explain(error: anyhow::Error, what: &str, address: SocketAddr, option: &str) -> anyhow::Error {
    let taken = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::AddrInUse);
    if !taken {
        return error.context(format!("can't start {what}"));
    }
    let (holder, mend) = match listener(address.port()) {
        Some(Listener { pid, name }) => {
            (format!("by {name} (process {pid})"), format!("stop that process (kill {pid})"))
        }
        None => (
            "by another process".to_owned(),
            format!("find it with `ss -ltnp sport = :{}` and stop it", address.port()),
        ),
    };
    error.context(Remedy::new(
        format!("can't start {what}: port {} is in use {holder}", address.port()),
        format!("{mend}, or choose another port with {option} (0 picks a free one)"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_by_port_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:192B 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4 30 10 -1
   2: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0 100 0 0 10 0
";
        assert_eq!(listening_inodes(table, 6443), ["4711"]);
        assert_eq!(listening_inodes(table, 80), Vec::<String>::new());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_port_in_use_names_its_process_and_the_way_out() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let refused = std::net::TcpListener::bind(address).unwrap_err();
        let said = explain(refused.into(), "the API", address, "--api-port");
        let said = crate::report::render(&said, crate::output::Style::plain());
        assert!(said.contains(&format!("port {} is in use by ", address.port())), "{said}");
        assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
        assert!(said.contains("--api-port"), "{said}");
    }
}
