//! The network `nat`: what a machine's place on it costs, how soon its DHCP server answers, and what its rules cost its packets.
//!
//! Everything happens in a network namespace of its own, with a guest's end of a cable in another one. Beside it, in turns, is what an
//! administrator makes by hand: a bridge without rules, ports by `ip`, addresses in a file of dnsmasq. The hypervisor has no part in
//! it: from the bridge's port on, both are the same.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use vmpod_network::nat::{Config, Nat, Reservation, interface};
use vmpod_network::{MacAddr, Subnet};

use super::process::Owned;
use super::samples::Samples;

const INSIDE: &str = "VMPOD_BENCH_IN_NAMESPACE";
const OURS: &str = "vmpodbench";
const THEIRS: &str = "byhand";

pub(super) fn run(quick: bool, root: &Path) -> Result<()> {
    if std::env::vars_os().all(|(name, _)| name != INSIDE) {
        let mut again = Command::new("unshare");
        again.arg("--net").arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(INSIDE, "1");
        ensure!(again.status().context("unshare is needed, and root")?.success(), "the benchmark failed");
        return Ok(());
    }
    sh("ip link set lo up")?;
    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let nat = Nat::new(Config { bridge: OURS.to_owned(), subnet: Subnet::USUAL, host: "bench".to_owned() });
    let _dnsmasq = by_hand(scratch.path())?;

    let (machines, rounds, bytes) = if quick { (30, 300, 1_u64 << 30) } else { (100, 2000, 4_u64 << 30) };
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for number in 1..=machines {
        let began = Instant::now();
        runtime.block_on(place(&nat, number))?;
        ours.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        place_by_hand(scratch.path(), number)?;
        theirs.push(began.elapsed().as_secs_f64() * 1e3);
    }

    let (guest, other) = (Guest::new(OURS, 1)?, Guest::new(THEIRS, 1)?);
    runtime.block_on(vmpod_network::attach("cable1", OURS))?;
    let (mut offers, mut their_offers) = (Samples::default(), Samples::default());
    for _ in 0..rounds / 100 {
        guest.offers(100, &mut offers)?;
        other.offers(100, &mut their_offers)?;
    }

    guest.configure(reservation(1).address, 16)?;
    other.configure(Ipv4Addr::new(10, 202, 0, 2), 16)?;
    let (mut rate, mut their_rate) = (Samples::default(), Samples::default());
    for _ in 0..5 {
        rate.push(guest.rate(bytes / 5)?);
        their_rate.push(other.rate(bytes / 5)?);
    }

    println(&format!("{machines} machines, {rounds} requests, {} GiB\n", bytes >> 30));
    println("                              vmpod    by hand");
    let row = |name: &str, ours: f64, theirs: f64| println(&format!("{name:<26} {ours:>8.2}   {theirs:>8.2}"));
    row("place of a machine, ms", ours.median(), theirs.median());
    row("  p99", ours.percentile(99), theirs.percentile(99));
    row("DHCP offer, ms", offers.median(), their_offers.median());
    row("  p99", offers.percentile(99), their_offers.percentile(99));
    row("host to guest, GiB/s", rate.median(), their_rate.median());
    let figures = json!({
        "bench": "network",
        "setup_ms": ours.median(),
        "setup_p99_ms": ours.percentile(99),
        "setup_over_by_hand": ours.median() / theirs.median(),
        "dhcp_p99_ms": offers.percentile(99),
        "dhcp_over_dnsmasq": offers.median() / their_offers.median(),
        "throughput_over_by_hand": rate.median() / their_rate.median(),
    });
    println(&figures.to_string());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "figures are what it is for")]
fn println(line: &str) {
    println!("{line}");
}

fn reservation(number: u8) -> Reservation {
    Reservation {
        owner: format!("pod-{number}"),
        mac: mac(number),
        address: [10, 201, 1, number].into(),
        hostname: Some(format!("guest{number}")),
        interface: if number == 1 { "cable1".to_owned() } else { interface(&format!("machine-{number}")) },
        isolated: false,
        ports: Vec::new(),
    }
}

fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

/// A machine's whole part of the host's network: its reservation, its port (which QEMU makes by itself), its bridge.
async fn place(nat: &Nat, number: u8) -> Result<()> {
    let reservation = reservation(number);
    let port = reservation.interface.clone();
    nat.reserve(reservation).await?;
    if number > 1 {
        sh(&format!("ip tuntap add {port} mode tap"))?;
        vmpod_network::attach(&port, OURS).await?;
    }
    Ok(())
}

/// A bridge, and dnsmasq with a file of addresses.
fn by_hand(dir: &Path) -> Result<Owned> {
    sh(&format!("ip link add {THEIRS} type bridge; ip addr add 10.202.0.1/16 dev {THEIRS}; ip link set {THEIRS} up"))?;
    std::fs::write(dir.join("hosts"), "")?;
    let mut command = Command::new("dnsmasq");
    command
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping", "--bind-interfaces"])
        .args(["--user=root", "--group=root", "--dhcp-range=10.202.0.0,static,255.255.0.0"])
        .arg(format!("--interface={THEIRS}"))
        .arg(format!("--pid-file={}", dir.join("pid").display()))
        .arg(format!("--dhcp-leasefile={}", dir.join("leases").display()))
        .arg(format!("--dhcp-hostsfile={}", dir.join("hosts").display()));
    let started = Owned::start(&mut command, &dir.join("dnsmasq.log")).context("run `scripts/prerequisites e2e`")?;
    let until = Instant::now() + Duration::from_secs(10);
    while !dir.join("pid").exists() {
        ensure!(Instant::now() < until, "dnsmasq doesn't start");
    }
    Ok(started)
}

fn place_by_hand(dir: &Path, number: u8) -> Result<()> {
    let line = format!("{},10.202.1.{number},guest{number}\n", mac(number));
    std::fs::OpenOptions::new().append(true).open(dir.join("hosts"))?.write_all(line.as_bytes())?;
    sh(&format!("kill -HUP $(cat {})", dir.join("pid").display()))?;
    if number > 1 {
        sh(&format!("ip tuntap add hand{number} mode tap"))?;
        sh(&format!("ip link set hand{number} master {THEIRS} up"))?;
    }
    Ok(())
}

fn sh(script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A guest's end of a cable, in a namespace that lives as long as the process that holds it.
struct Guest {
    holder: std::process::Child,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.holder.kill().ok();
        self.holder.wait().ok();
    }
}

impl Guest {
    fn new(bridge: &str, number: u8) -> Result<Self> {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; exec cat"])
            // It ends with this process, whose end of the pipe closes then.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        holder.stdout.take().context("no output")?.read_exact(&mut [0])?;
        let pid = holder.id();
        let cable = if bridge == OURS { format!("cable{number}") } else { format!("hand-cable{number}") };
        sh(&format!("ip link add {cable} type veth peer name eth0 address {} netns {pid}", mac(number)))?;
        sh(&format!("ip link set {cable} master {bridge} up; nsenter --net=/proc/{pid}/ns/net ip link set eth0 up"))?;
        Ok(Self { holder })
    }

    fn configure(&self, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let pid = self.holder.id();
        sh(&format!("nsenter --net=/proc/{pid}/ns/net ip addr add {address}/{prefix} dev eth0"))
    }

    /// Does something in the guest's namespace.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.holder.id()))?;
        std::thread::scope(|scope| {
            let done = scope.spawn(move || {
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))?;
                work()
            });
            done.join().map_err(|_| anyhow::anyhow!("a guest panicked"))?
        })
    }

    /// Asks for addresses, again and again.
    fn offers(&self, times: u32, samples: &mut Samples) -> Result<()> {
        self.inside(|| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
            socket.bind_device(Some(b"eth0"))?;
            socket.set_broadcast(true)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 68)).into())?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            let socket = std::net::UdpSocket::from(socket);
            for request in 1..=times {
                let began = Instant::now();
                socket.send_to(&discover(request), (Ipv4Addr::BROADCAST, 67))?;
                let mut buffer = [0; 1500];
                loop {
                    let length = socket.recv(&mut buffer).context("no offer came")?;
                    if length > 8 && buffer[4..8] == request.to_be_bytes() {
                        break;
                    }
                }
                samples.push(began.elapsed().as_secs_f64() * 1e3);
            }
            Ok(())
        })
    }

    /// GiB a second from the host.
    fn rate(&self, bytes: u64) -> Result<f64> {
        let listener = self.inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?))?;
        let port = listener.local_addr()?.port();
        let pid = self.holder.id();
        let found = Command::new("nsenter")
            .arg(format!("--net=/proc/{pid}/ns/net"))
            .args(["sh", "-c", "ip -4 -o addr show dev eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'"])
            .output()?;
        let address: Ipv4Addr = String::from_utf8_lossy(&found.stdout).trim().parse()?;
        std::thread::scope(|scope| {
            let sink = scope.spawn(move || -> Result<u64> {
                let (mut stream, _) = listener.accept()?;
                let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(total),
                        read => total += read as u64,
                    }
                }
            });
            let began = Instant::now();
            let mut stream = TcpStream::connect((address, port))?;
            let chunk = vec![7; 256 << 10];
            let mut left = bytes;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
                stream.write_all(&chunk[..now])?;
                left -= now as u64;
            }
            drop(stream);
            let total = sink.join().map_err(|_| anyhow::anyhow!("the guest panicked"))??;
            ensure!(total == bytes, "{total} of {bytes} bytes came");
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            Ok(bytes as f64 / f64::from(1 << 30) / began.elapsed().as_secs_f64())
        })
    }
}

/// A client's first packet (RFC 2131), which wants its answer by broadcast.
fn discover(request: u32) -> Vec<u8> {
    let mut packet = vec![1, 1, 6, 0];
    packet.extend(request.to_be_bytes());
    packet.extend([0, 0, 0x80, 0]);
    packet.resize(28, 0);
    packet.extend(mac(1).octets());
    packet.resize(236, 0);
    packet.extend([99, 130, 83, 99, 53, 1, 1, 55, 3, 1, 3, 6, 255]);
    packet.resize(300, 0);
    packet
}
