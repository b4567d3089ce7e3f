//! The network on a real kernel, in network namespaces of its own: with a guest that asks for its address as guests do, an
//! outside world, and neighbours with bad manners.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

#[path = "support/namespace.rs"]
mod namespace;

use std::time::Duration;

use namespace::{Namespace, in_namespace, leftovers, resident_kib, shell, try_shell};
use vmpod_network::{
    MacAddr, NetworkError, Subnet,
    learn::Seen,
    nat::{ALIAS, Config, HostPort, Nat, Protocol, Reservation},
    watch::Watch,
};

const BRIDGE: &str = "vmpodt0";

fn config() -> Config {
    Config { bridge: BRIDGE.to_owned(), subnet: "10.77.0.0/24".parse().unwrap(), host: "test".to_owned() }
}

fn reservation(number: u8) -> Reservation {
    Reservation {
        owner: format!("pod-{number}"),
        mac: MacAddr::new([2, 0, 0, 0, 0, number]),
        address: [10, 77, 0, number].into(),
        hostname: Some(format!("guest{number}")),
        interface: format!("vmpt{number}"),
        isolated: false,
        ports: Vec::new(),
    }
}

/// A guest: a namespace whose interface is a port of the bridge, as a machine's is once it runs.
async fn guest(reservation: &Reservation) -> Namespace {
    let guest = Namespace::new();
    let (port, mac, pid) = (&reservation.interface, reservation.mac, guest.pid());
    shell(&format!("ip link add {port} type veth peer name eth0 address {mac} netns {pid}"));
    guest.shell("ip link set lo up; ip link set eth0 up");
    vmpod_network::attach(port, BRIDGE).await.unwrap();
    guest
}

/// Asks for an address the way small systems do; what the server said.
fn lease(guest: &Namespace) -> Option<String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/lease");
    guest.try_shell(&format!("busybox udhcpc -f -q -n -t 3 -T 1 -i eth0 -s {script} 2>/dev/null"))
}

fn pings(from: &Namespace, to: &str) -> bool {
    from.try_shell(&format!("busybox ping -c1 -W1 {to}")).is_some()
}

#[test]
fn a_machine_has_its_address_the_world_and_its_ports() {
    in_namespace("a_machine_has_its_address_the_world_and_its_ports", async {
        let world = Namespace::new();
        shell(&format!("ip link add out0 type veth peer name eth0 netns {}", world.pid()));
        shell("ip addr add 192.0.2.1/24 dev out0; ip link set out0 up");
        world.shell("ip link set lo up; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up");
        let nat = Nat::new(config());
        let mut first = reservation(7);
        first.ports = vec![HostPort { protocol: Protocol::Tcp, host: None, host_port: 8080, guest_port: 80 }];
        nat.reserve(first.clone()).await.unwrap();
        let machine = guest(&first).await;

        let said = lease(&machine).expect("a lease");
        for line in ["ip=10.77.0.7", "subnet=255.255.255.0", "router=10.77.0.1", "dns=10.77.0.1", "hostname=guest7"] {
            assert!(said.lines().any(|had| had == line), "{line} in {said}");
        }
        // It is on the network by what it was told: the script has configured it.
        assert!(pings(&machine, "10.77.0.1"), "its gateway");
        assert!(pings(&machine, "192.0.2.2"), "the world is out there");

        // The world sees this host, and reaches the machine by the host's port.
        let greeter = world.spawn("busybox nc -l -p 99 -e busybox netstat -tn");
        world.until("busybox netstat -ltn | grep -q :99");
        let seen = machine.shell("busybox nc 192.0.2.2 99 </dev/null");
        assert!(seen.contains("192.0.2.1:") && !seen.contains("10.77.0.7"), "masqueraded: {seen}");
        drop(greeter);
        let server = machine.spawn("busybox nc -ll -p 80 -e echo from the machine");
        machine.until("busybox netstat -ltn | grep -q :80");
        let heard = "from the machine\n";
        assert_eq!(world.shell("busybox nc 192.0.2.1 8080 </dev/null"), heard);
        assert_eq!(shell("busybox nc 192.0.2.1 8080 </dev/null"), heard, "from this host itself");
        assert_eq!(shell("busybox nc 10.77.0.7 80 </dev/null"), heard, "at its own address");
        let second = reservation(8);
        nat.reserve(second.clone()).await.unwrap();
        let neighbour = guest(&second).await;
        lease(&neighbour).expect("a lease");
        assert_eq!(neighbour.shell("busybox nc -w 5 192.0.2.1 8080 </dev/null"), heard, "from a neighbour");
        drop(server);

        // But not by a way through this host that nobody opened.
        world.shell("ip route add 10.77.0.0/24 via 192.0.2.1");
        assert!(!pings(&world, "10.77.0.7"), "the world reaches the machine by itself");

        // It made itself an IPv6 address from what was advertised, and the host reaches it there.
        let expected = vmpod_network::advert::address(config().prefix(), first.mac).to_string();
        machine.until(&format!("ip -6 addr show dev eth0 | grep -v tentative | grep -q {expected}"));
        shell(&format!("busybox ping -6 -c1 -W2 {expected}"));
        let routes = machine.shell("ip -6 route show default");
        assert!(routes.is_empty(), "nobody is told to leave by IPv6: {routes}");

        drop((machine, neighbour));
        nat.release("pod-7").await.unwrap();
        nat.release("pod-8").await.unwrap();
        assert_eq!(leftovers(BRIDGE), "");
    });
}

#[test]
fn nobody_speaks_for_another_and_isolation_holds() {
    in_namespace("nobody_speaks_for_another_and_isolation_holds", async {
        let nat = Nat::new(config());
        let (honest, mut alone, liar) = (reservation(7), reservation(8), reservation(9));
        alone.isolated = true;
        for one in [&honest, &alone, &liar] {
            nat.reserve(one.clone()).await.unwrap();
        }
        let (a, b, c) = (guest(&honest).await, guest(&alone).await, guest(&liar).await);
        for machine in [&a, &b, &c] {
            lease(machine).expect("a lease");
        }
        assert!(pings(&a, "10.77.0.9"), "machines reach each other");
        assert!(!pings(&a, "10.77.0.8"), "but not an isolated one");
        assert!(!pings(&b, "10.77.0.9"), "nor it them");
        a.shell("ip route add 10.77.0.8/32 via 10.77.0.1");
        assert!(!pings(&a, "10.77.0.8"), "not by way of the host either");
        assert!(pings(&b, "10.77.0.1"), "an isolated machine reaches the host");
        shell("busybox ping -c1 -W2 10.77.0.8");

        // Another's address, with its own hardware address and with the other's.
        c.shell("ip addr add 10.77.0.7/24 dev eth0");
        assert!(!pings(&c, "-I 10.77.0.7 10.77.0.1"), "another's address");
        // Its own still works, once it has asked for its gateway again.
        c.until("busybox ping -c1 -W1 -I 10.77.0.9 10.77.0.1");
        c.shell("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:07; ip link set eth0 up");
        assert!(!pings(&c, "10.77.0.1"), "another's hardware address");
        assert!(lease(&c).is_none(), "nor is it given a lease under it");
        assert!(pings(&a, "10.77.0.1"), "the one it spoke for hears nothing of it");

        // A stranger gets no address.
        c.shell("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:66; ip link set eth0 up");
        assert!(lease(&c).is_none());
        drop((a, b, c));
        for owner in ["pod-7", "pod-8", "pod-9"] {
            nat.release(owner).await.unwrap();
        }
        assert_eq!(leftovers(BRIDGE), "");
    });
}

#[test]
fn an_agent_that_comes_after_a_crash_goes_on_and_cleans_up() {
    in_namespace("an_agent_that_comes_after_a_crash_goes_on_and_cleans_up", async {
        let nat = Nat::new(config());
        for number in [7, 8] {
            nat.reserve(reservation(number)).await.unwrap();
        }
        let machine = guest(&reservation(7)).await;
        lease(&machine).expect("a lease");
        let before = shell("ip -o link show vmpodt0");

        // Somebody else can't have it meanwhile, not even while nobody serves it.
        let other = Nat::new(config());
        assert!(matches!(other.reserve(reservation(9)).await, Err(NetworkError::Taken(_))));
        drop(nat);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(matches!(other.reserve(reservation(9)).await, Err(NetworkError::Taken(_))), "a machine runs on it");
        other.restore(Vec::new()).await.unwrap();
        assert!(shell("nft list ruleset").contains("10.77.0.7"), "nor does it clear up under that machine");
        drop(other);

        assert!(pings(&machine, "10.77.0.1"), "the network outlives its agent");
        let next = Nat::new(config());
        next.restore(vec![reservation(7)]).await.unwrap();
        lease(&machine).expect("a lease");
        let rules = shell("nft list ruleset");
        assert!(!rules.contains("10.77.0.8"), "what nobody has any more is gone: {rules}");
        assert_eq!(shell("ip neigh show dev vmpodt0 nud permanent").lines().count(), 1);
        assert_eq!(shell("ip -o link show vmpodt0"), before, "it is the same bridge");

        // Somebody tidied up too eagerly.
        shell("ip link del vmpodt0; nft flush ruleset");
        next.reserve(reservation(9)).await.unwrap();
        lease(&machine).expect("the machine that was there is back as well");
        drop(machine);
        drop(next);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_ne!(leftovers(BRIDGE), "");
        Nat::new(config()).restore(Vec::new()).await.unwrap();
        assert_eq!(leftovers(BRIDGE), "", "with no machine left, nothing is");
    });
}

#[test]
fn what_isnt_ours_is_never_touched() {
    in_namespace("what_isnt_ours_is_never_touched", async {
        let nat = Nat::new(config());
        shell("ip link add vmpodt0 type bridge");
        let error = nat.reserve(reservation(7)).await.unwrap_err();
        assert!(matches!(error, NetworkError::Foreign(_)), "{error}");
        nat.restore(Vec::new()).await.unwrap();
        shell("ip link show vmpodt0 && ip link del vmpodt0");

        shell("ip link add lan0 type bridge; ip addr add 10.77.0.200/16 dev lan0; ip link set lan0 up");
        let error = nat.reserve(reservation(7)).await.unwrap_err().to_string();
        let wanted = "the addresses 10.77.0.0/24 overlap with 10.77.0.200/16 on lan0: choose others with --nat-subnet";
        assert_eq!(error, wanted);
        shell("ip link del lan0");

        // What can't be made isn't left half made.
        let busy = std::net::UdpSocket::bind("0.0.0.0:53").unwrap();
        let error = nat.reserve(reservation(7)).await.unwrap_err();
        assert!(matches!(error, NetworkError::Serve { what: "DNS", .. }), "{error}");
        assert_eq!(shell("ip -o link; nft list ruleset").matches("vmpod").count(), 0);
        drop(busy);

        shell("nft add table inet filter; nft add table inet vmpod_other; nft add table ip nat");
        nat.reserve(reservation(7)).await.unwrap();
        assert!(shell("ip link show vmpodt0").contains(ALIAS));
        nat.release("pod-7").await.unwrap();
        let tables = shell("nft list tables");
        assert_eq!(tables.lines().collect::<Vec<_>>(), ["table inet filter", "table inet vmpod_other", "table ip nat"]);
    });
}

#[test]
fn thirty_machines_at_once_share_nothing() {
    in_namespace("thirty_machines_at_once_share_nothing", async {
        let nat = Nat::new(Config { subnet: Subnet::USUAL, ..config() });
        let mut used = std::collections::BTreeSet::new();
        let mut all = Vec::new();
        for number in 0..30u8 {
            let address = Subnet::USUAL.allocate(&format!("pod-{number}"), &used).unwrap();
            used.insert(address);
            all.push(Reservation { address, ..reservation(number + 10) });
        }
        let mut tasks = tokio::task::JoinSet::new();
        for one in all.clone() {
            let nat = nat.clone();
            tasks.spawn(async move { nat.reserve(one).await.unwrap() });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        for one in &all {
            let machine = guest(one).await;
            let said = lease(&machine).expect("a lease");
            assert!(said.contains(&format!("ip={}\n", one.address)), "{said}");
        }
        // Element by element it came to what it is when it is made at once.
        let rules = || {
            let text = shell("nft list ruleset");
            let mut words: Vec<_> = text.replace(',', " ").split_whitespace().map(str::to_owned).collect();
            words.sort();
            words
        };
        nat.release(&all[29].owner).await.unwrap();
        let grown = rules();
        let fresh = Nat::new(nat.config().clone());
        drop(nat);
        tokio::time::sleep(Duration::from_millis(50)).await;
        fresh.restore(all[..29].to_vec()).await.unwrap();
        assert!(rules() == grown, "{}", shell("nft list ruleset"));
        for one in all {
            let nat = fresh.clone();
            tasks.spawn(async move { nat.release(&one.owner).await.unwrap() });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert_eq!(leftovers(BRIDGE), "");
    });
}

#[test]
fn a_guest_that_is_asked_tells_which_addresses_it_has() {
    in_namespace("a_guest_that_is_asked_tells_which_addresses_it_has", async {
        let machine = Namespace::new();
        let one = reservation(7);
        shell(&format!(
            "ip link add tap7 type veth peer name eth0 address {} netns {}; ip link set tap7 up",
            one.mac,
            machine.pid()
        ));
        machine.shell("ip addr add 192.0.2.7/24 dev eth0; ip addr add 192.0.2.8/24 dev eth0; ip link set eth0 up");
        let mut watch = Watch::open("tap7", one.mac).unwrap();
        for last in [7, 8] {
            let address = [192, 0, 2, last].into();
            watch.ask(address).await.unwrap();
            let heard = tokio::time::timeout(Duration::from_secs(5), watch.next()).await;
            assert_eq!(heard.expect("an answer").unwrap(), Seen::Speaks(address));
        }
        watch.ask([192, 0, 2, 9].into()).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(1), watch.next()).await.is_err(), "it hasn't that one");
    });
}

#[test]
fn guests_that_flood_or_talk_nonsense_hurt_nobody() {
    in_namespace("guests_that_flood_or_talk_nonsense_hurt_nobody", async {
        let nat = Nat::new(config());
        let (hostile, other) = (reservation(7), reservation(8));
        nat.reserve(hostile.clone()).await.unwrap();
        nat.reserve(other.clone()).await.unwrap();
        let (hostile, other) = (guest(&hostile).await, guest(&other).await);
        lease(&hostile).expect("a lease");
        let before = resident_kib();
        // Nonsense for each service, as fast as a shell can; some of it looks like questions about names.
        let floods = [67, 53, 53].map(|port| {
            let to = format!("/dev/udp/10.77.0.1/{port}");
            hostile.spawn(&format!("exec bash -c 'exec dd if=/dev/urandom bs=512 count=40000 of=/dev/stdout >{to}'"))
        });
        let tcp = hostile.spawn(
            "for i in $(seq 600); do busybox nc 10.77.0.1 53 </dev/zero >/dev/null 2>&1 & done; sleep 5; kill 0",
        );
        lease(&other).expect("others are served meanwhile");
        for mut flood in floods {
            flood.wait();
        }
        drop(tcp);
        lease(&other).expect("and afterwards");
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 24 << 10, "it grew by {grown} KiB");
        drop((hostile, other));
        nat.release("pod-7").await.unwrap();
        nat.release("pod-8").await.unwrap();
        assert_eq!(leftovers(BRIDGE), "");
        assert!(try_shell("false").is_none(), "a command that fails is noticed");
    });
}
