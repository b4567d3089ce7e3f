//! A network that is up: its bridge, its firewall, and the services behind the gateway's address.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    os::linux::net::SocketAddrExt as _,
    process::Stdio,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{
    NetworkError,
    address::MacAddr,
    advert,
    dhcp::{self, Lease},
    dns,
    link::{Interface, Kernel, set_kernel_value},
    nat::{ALIAS, Config, Reservation},
    rules,
};

/// How many questions about names may be open at once. More are dropped, as they would be on a busy line.
const QUESTIONS: usize = 512;
/// How long one name server is waited for, and a connection to one.
const PATIENCE: Duration = Duration::from_secs(2);
const CONNECTION: Duration = Duration::from_secs(30);
/// How often guests hear of the prefix unasked.
const ADVERTISED: Duration = Duration::from_mins(5);

type Leases = Arc<RwLock<HashMap<MacAddr, Lease>>>;

/// A network that is up and this process's.
pub(crate) struct Up {
    kernel: Kernel,
    leases: Leases,
    /// Held by one process of a network namespace at a time, and let go by the kernel when it ends.
    _claim: std::os::unix::net::UnixListener,
    services: JoinSet<()>,
    /// The bridge that they listen on.
    index: u32,
    /// The neighbours that are written down on it; none when that isn't known.
    neighbours: Option<BTreeMap<Ipv4Addr, MacAddr>>,
    /// The machines that the firewall is right for; none when that isn't known.
    ruled: Option<Vec<Reservation>>,
}

impl Up {
    /// Becomes the one who has the network, on which these machines are to be.
    pub(crate) async fn claim(config: &Config, machines: &[Reservation]) -> Result<Self, NetworkError> {
        let claim = claim(config)?.ok_or_else(|| NetworkError::Taken(config.bridge.clone()))?;
        let kernel = Kernel::open()?;
        let bridge = bridge(&kernel, config, None).await?;
        let ours = |port: &String| machines.iter().any(|machine| machine.interface == *port);
        if !kernel.ports(&bridge).await?.iter().all(ours) {
            // An agent that is down at the moment has machines that run.
            return Err(NetworkError::Taken(config.bridge.clone()));
        }
        set_kernel_value("/proc/sys/net/ipv4/ip_forward", "1")?;
        let mut up = Self {
            kernel,
            leases: Leases::default(),
            _claim: claim,
            services: JoinSet::new(),
            index: bridge.index,
            neighbours: None,
            ruled: None,
        };
        up.serve(config)?;
        Ok(up)
    }

    /// Makes everything what these machines need. What is known to be so already isn't asked of the kernel again.
    pub(crate) async fn apply(&mut self, config: &Config, machines: &[Reservation]) -> Result<(), NetworkError> {
        let bridge = bridge(&self.kernel, config, Some(self.index)).await?;
        if bridge.index != self.index {
            // Somebody removed it, and what listened on it hears nothing any more.
            self.services.shutdown().await;
            self.serve(config)?;
            self.index = bridge.index;
            self.neighbours = None;
        }
        self.rule(config, machines).await?;
        let wanted: BTreeMap<_, _> = machines.iter().map(|machine| (machine.address, machine.mac)).collect();
        if self.neighbours.is_none() {
            // Their ports may have lost their bridge, and neighbours of an earlier process may be written down.
            for machine in machines {
                if let Some(port) = self.kernel.interface(&machine.interface).await?
                    && port.controller != Some(bridge.index)
                {
                    self.kernel.attach(&port, &bridge).await?;
                }
            }
        }
        let known = if let Some(known) = self.neighbours.take() {
            known
        } else {
            let there = self.kernel.neighbours(&bridge).await?;
            // Whatever hardware address they have: it is written again.
            there.into_iter().map(|address| (address, MacAddr::new([0; 6]))).collect()
        };
        for (address, mac) in &wanted {
            if known.get(address) != Some(mac) {
                self.kernel.add_neighbour(&bridge, *address, *mac).await?;
            }
        }
        for address in known.keys().filter(|address| !wanted.contains_key(*address)) {
            self.kernel.remove_neighbour(&bridge, *address).await?;
        }
        self.neighbours = Some(wanted);
        let lease = |machine: &Reservation| {
            (machine.mac, Lease { address: machine.address, hostname: machine.hostname.clone() })
        };
        *self.leases.write().unwrap_or_else(PoisonError::into_inner) = machines.iter().map(lease).collect();
        Ok(())
    }

    /// Makes the firewall right.
    async fn rule(&mut self, config: &Config, machines: &[Reservation]) -> Result<(), NetworkError> {
        if let Some(before) = self.ruled.take() {
            let done = match rules::change(&config.bridge, config.prefix(), &before, machines) {
                Some(change) => nft(&change).await,
                None => Ok(()),
            };
            match done {
                Ok(()) => {
                    self.ruled = Some(machines.to_vec());
                    return Ok(());
                }
                // Somebody has flushed the host's rules, say.
                Err(error) => tracing::debug!(%error, "the firewall isn't what it was; it is made anew"),
            }
        }
        nft(&rules::ruleset(&config.bridge, config.subnet, config.prefix(), machines)).await?;
        self.ruled = Some(machines.to_vec());
        Ok(())
    }

    /// Removes the network.
    pub(crate) async fn down(mut self, config: &Config) -> Result<(), NetworkError> {
        self.services.shutdown().await;
        remove(&self.kernel, config).await
    }

    fn serve(&mut self, config: &Config) -> Result<(), NetworkError> {
        let failed = |what| move |source| NetworkError::Serve { what, bridge: config.bridge.clone(), source };
        let dhcp = udp(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, dhcp::SERVER_PORT).into(), &config.bridge);
        let dhcp = dhcp.map_err(failed("DHCP"))?;
        self.services.spawn(answer_dhcp(dhcp, config.clone(), Arc::clone(&self.leases)));
        let gateway = SocketAddr::from((config.subnet.gateway(), 53));
        let names = udp(gateway, &config.bridge).and_then(|socket| Ok((socket, listen(gateway, &config.bridge)?)));
        let names = names.map_err(failed("DNS"))?;
        let open = Arc::new(Semaphore::new(QUESTIONS));
        self.services.spawn(answer_names(names.0, Arc::clone(&open)));
        self.services.spawn(carry_names(names.1, open));
        match advertiser(config) {
            Ok(socket) => {
                self.services.spawn(advertise(socket, config.clone()));
            }
            // A host without IPv6 still has a network.
            Err(error) => tracing::info!(bridge = config.bridge, %error, "guests hear of no IPv6 prefix"),
        }
        Ok(())
    }
}

/// Removes what is left of a network that nobody is on.
pub(crate) async fn sweep(config: &Config) -> Result<(), NetworkError> {
    let kernel = Kernel::open()?;
    match ours(&kernel, config).await? {
        // With a port, somebody's machine runs whose agent is down at the moment.
        Some(bridge) if kernel.ports(&bridge).await?.is_empty() => {}
        _ => return Ok(()),
    }
    let Some(_claim) = claim(config)? else { return Ok(()) };
    remove(&kernel, config).await
}

/// Removes the firewall, then the bridge: whoever finds a bridge knows that there may be rules.
async fn remove(kernel: &Kernel, config: &Config) -> Result<(), NetworkError> {
    match nft(&rules::removal(&config.bridge)).await {
        // Without the program there never were any.
        Ok(()) | Err(NetworkError::NoFirewall) => {}
        Err(error) => return Err(error),
    }
    match ours(kernel, config).await? {
        Some(bridge) => kernel.remove(&bridge).await,
        None => Ok(()),
    }
}

/// Our bridge, when there is one.
async fn ours(kernel: &Kernel, config: &Config) -> Result<Option<Interface>, NetworkError> {
    let found = kernel.interface(&config.bridge).await?;
    Ok(found.filter(|found| found.alias.as_deref() == Some(ALIAS)))
}

/// The right to the network, by a name that only one socket of the network namespace can have.
fn claim(config: &Config) -> Result<Option<std::os::unix::net::UnixListener>, NetworkError> {
    let name = format!("vmpod/nat/{}", config.bridge);
    let claimed = std::os::unix::net::SocketAddr::from_abstract_name(name)
        .and_then(|address| std::os::unix::net::UnixListener::bind_addr(&address));
    match claimed {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => {
            Err(NetworkError::Kernel { action: format!("claim the bridge {}", config.bridge), why: error.to_string() })
        }
    }
}

/// Our bridge with its addresses; made when it isn't there. One whose number is `known` has them.
async fn bridge(kernel: &Kernel, config: &Config, known: Option<u32>) -> Result<Interface, NetworkError> {
    let mut found = kernel.interface(&config.bridge).await?;
    if found.is_none() {
        for (address, prefix, index) in kernel.addresses().await? {
            if config.subnet.overlaps(address, prefix) {
                let interface = kernel.interface_name(index).await.unwrap_or_else(|| index.to_string());
                return Err(NetworkError::Overlap {
                    subnet: config.subnet,
                    address: format!("{address}/{prefix}"),
                    interface,
                });
            }
        }
        kernel.add_bridge(&config.bridge, hardware_address(config), ALIAS).await?;
        found = kernel.interface(&config.bridge).await?;
        if let Some(bridge) = &mut found {
            kernel.set_up(bridge, ALIAS).await?;
            bridge.alias = Some(ALIAS.to_owned());
        }
    }
    let bridge = found.filter(|bridge| bridge.alias.as_deref() == Some(ALIAS));
    let bridge = bridge.ok_or_else(|| NetworkError::Foreign(config.bridge.clone()))?;
    if known == Some(bridge.index) {
        return Ok(bridge);
    }
    kernel.add_address(&bridge, config.subnet.gateway().into(), config.subnet.prefix()).await?;
    if let Err(error) = kernel.add_address(&bridge, config.gateway6().into(), 64).await {
        tracing::debug!(%error, "the bridge gets no IPv6 address");
    }
    Ok(bridge)
}

/// Gives `nft` a text.
async fn nft(text: &str) -> Result<(), NetworkError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => NetworkError::NoFirewall,
        _ => NetworkError::Firewall(error.to_string()),
    };
    let mut child = tokio::process::Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // If it doesn't read, it tells why.
        input.write_all(text.as_bytes()).await.ok();
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().take(3).map(str::trim).collect();
    Err(NetworkError::Firewall(format!("{} ({})", lines.join("; "), output.status)))
}

/// A socket that hears only what comes over the bridge: others serve on other interfaces, and others ask there.
fn socket(kind: Type, protocol: Protocol, address: SocketAddr, bridge: &str) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    // What the last agent's connections left doesn't keep this one out.
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(bridge.as_bytes()))?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn udp(address: SocketAddr, bridge: &str) -> io::Result<UdpSocket> {
    let socket = socket(Type::DGRAM, Protocol::UDP, address, bridge)?;
    socket.set_broadcast(true)?;
    UdpSocket::from_std(socket.into())
}

fn listen(address: SocketAddr, bridge: &str) -> io::Result<TcpListener> {
    let socket = socket(Type::STREAM, Protocol::TCP, address, bridge)?;
    socket.listen(64)?;
    TcpListener::from_std(socket.into())
}

async fn answer_dhcp(socket: UdpSocket, config: Config, leases: Leases) {
    let mut buffer = [0; 1500];
    loop {
        let Some(length) = received(socket.recv(&mut buffer).await).await else { continue };
        let answer = dhcp::answer(&buffer[..length], config.subnet, |mac| {
            leases.read().unwrap_or_else(PoisonError::into_inner).get(&mac).cloned()
        });
        let Some(answer) = answer else { continue };
        match socket.send_to(&answer.bytes, answer.to).await {
            Ok(_) => tracing::debug!(to = %answer.to, kind = ?answer.kind, "DHCP"),
            Err(error) => tracing::debug!(to = %answer.to, %error, "a DHCP answer can't be sent"),
        }
    }
}

/// What came; none for an error, which passes (a refused packet of before) or is worth a rest.
async fn received<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::debug!(%error, "nothing could be received");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

/// Whom this host asks now: it may be another than before.
fn name_servers() -> Vec<SocketAddr> {
    dns::servers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

async fn answer_names(socket: UdpSocket, open: Arc<Semaphore>) {
    let socket = Arc::new(socket);
    let mut questions = JoinSet::new();
    // The largest that a client of EDNS asks for, and more than most.
    let mut buffer = vec![0; 4096];
    loop {
        while questions.try_join_next().is_some() {}
        let Some((length, from)) = received(socket.recv_from(&mut buffer).await).await else { continue };
        let question = &buffer[..length];
        let (true, Ok(permit)) = (dns::is_question(question), Arc::clone(&open).try_acquire_owned()) else { continue };
        let (socket, question) = (Arc::clone(&socket), question.to_vec());
        questions.spawn(async move {
            if let Some(answer) = ask(&question).await {
                // A guest that is gone needs none.
                socket.send_to(&answer, from).await.ok();
            }
            drop(permit);
        });
    }
}

/// The first answer that a name server of this host gives.
async fn ask(question: &[u8]) -> Option<Vec<u8>> {
    for server in name_servers() {
        let answer = tokio::time::timeout(PATIENCE, async {
            let any: IpAddr =
                if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(server).await?;
            socket.send(question).await?;
            let mut buffer = vec![0; 4096];
            loop {
                let length = socket.recv(&mut buffer).await?;
                if dns::answers(question, &buffer[..length]) {
                    buffer.truncate(length);
                    return io::Result::Ok(buffer);
                }
            }
        });
        if let Ok(Ok(answer)) = answer.await {
            return Some(answer);
        }
    }
    None
}

/// Long answers go over TCP.
async fn carry_names(listener: TcpListener, open: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Some((mut guest, _)) = received(listener.accept().await).await else { continue };
        let Ok(permit) = Arc::clone(&open).try_acquire_owned() else { continue };
        connections.spawn(async move {
            let carried = tokio::time::timeout(CONNECTION, async {
                for server in name_servers() {
                    if let Ok(Ok(mut server)) = tokio::time::timeout(PATIENCE, TcpStream::connect(server)).await {
                        // Either side may end it.
                        tokio::io::copy_bidirectional(&mut guest, &mut server).await.ok();
                        return;
                    }
                }
            });
            drop((carried.await, permit));
        });
    }
}

/// A socket for router advertisements. Raw packets are received and sent as datagrams are, so the type fits.
fn advertiser(config: &Config) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::RAW.nonblocking(), Some(Protocol::ICMPV6))?;
    socket.bind_device(Some(config.bridge.as_bytes()))?;
    // What came over a router doesn't count (RFC 4861, section 6.1.2).
    socket.set_multicast_hops_v6(255)?;
    socket.set_unicast_hops_v6(255)?;
    let index = rustix::net::netdevice::name_to_index(&socket, &config.bridge)?;
    socket.set_multicast_if_v6(index)?;
    socket.join_multicast_v6(&Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2), index)?;
    UdpSocket::from_std(socket.into())
}

async fn advertise(socket: UdpSocket, config: Config) {
    let packet = advert::advertisement(config.prefix(), hardware_address(&config));
    let everybody = SocketAddr::from((Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0));
    let mut buffer = [0u8; 1500];
    loop {
        // A bridge without ports sends nothing; whoever comes asks.
        socket.send_to(&packet, everybody).await.ok();
        let asked = async {
            loop {
                match received(socket.recv(&mut buffer).await).await {
                    Some(length) if advert::is_solicitation(&buffer[..length]) => return,
                    _ => {}
                }
            }
        };
        // Not more often than every 300 ms, however many ask.
        tokio::time::timeout(ADVERTISED, asked).await.ok();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// The bridge's.
fn hardware_address(config: &Config) -> MacAddr {
    MacAddr::derive(&format!("bridge/{}", config.prefix()))
}
