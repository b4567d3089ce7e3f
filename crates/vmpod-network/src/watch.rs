//! Listening on a machine's interface for what tells of its address.

pub use system::Watch;

#[cfg(target_os = "linux")]
mod system {
    use std::{io, net::Ipv4Addr};

    use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};
    use tokio::net::UdpSocket;

    use crate::{
        address::MacAddr,
        learn::{self, Seen},
    };

    /// An open ear. The kernel passes on ARP and DHCP only.
    #[derive(Debug)]
    pub struct Watch {
        /// Frames are received as datagrams are, so the type fits.
        socket: UdpSocket,
        guest: MacAddr,
        buffer: Box<[u8; 2048]>,
    }

    impl Watch {
        /// Listens on an interface of this host for the guest with this hardware address. Needs root (`CAP_NET_RAW`).
        pub fn open(interface: &str, guest: MacAddr) -> io::Result<Self> {
            // Nothing is received before it is bound, and then only what the filter lets through.
            let socket = Socket::new(Domain::PACKET, Type::RAW.nonblocking(), None::<Protocol>)?;
            socket.attach_filter(&filter())?;
            let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
            socket.bind(&everything_on(index))?;
            Ok(Self { socket: UdpSocket::from_std(socket.into())?, guest, buffer: Box::new([0; 2048]) })
        }

        /// Asks the guest whether it has an address still (an ARP probe, RFC 5227, section 2.1.1): its answer is something that is
        /// [`Seen`].
        pub async fn ask(&self, address: Ipv4Addr) -> io::Result<()> {
            self.socket.send(&learn::probe(address, self.guest)).await.map(drop)
        }

        /// The next thing that tells something. May be dropped and called again.
        pub async fn next(&mut self) -> io::Result<Seen> {
            loop {
                let length = self.socket.recv(&mut *self.buffer).await?;
                if let Some(seen) = learn::parse(&self.buffer[..length], self.guest) {
                    return Ok(seen);
                }
            }
        }
    }

    /// ARP, and UDP over IPv4 from or to the ports of DHCP, as a program of the classic packet filter: what `tcpdump -dd 'arp or
    /// (udp and (port 67 or port 68))'` prints, without IPv6.
    fn filter() -> [SockFilter; 13] {
        // Load a half-word, a byte, the length of the IP header, a half-word behind it; compare; test bits; return.
        const LDH: u16 = 0x28;
        const LDB: u16 = 0x30;
        const LDX_IP_HEADER: u16 = 0xb1;
        const LDH_BEHIND: u16 = 0x48;
        const JEQ: u16 = 0x15;
        const JSET: u16 = 0x45;
        const RET: u16 = 0x06;
        [
            SockFilter::new(LDH, 0, 0, 12),
            SockFilter::new(JEQ, 9, 0, 0x0806),
            SockFilter::new(JEQ, 0, 9, 0x0800),
            SockFilter::new(LDB, 0, 0, 23),
            SockFilter::new(JEQ, 0, 7, 17),
            SockFilter::new(LDH, 0, 0, 20),
            SockFilter::new(JSET, 5, 0, 0x1fff),
            SockFilter::new(LDX_IP_HEADER, 0, 0, 14),
            SockFilter::new(LDH_BEHIND, 0, 0, 16),
            SockFilter::new(JEQ, 1, 0, 67),
            SockFilter::new(JEQ, 0, 1, 68),
            SockFilter::new(RET, 0, 0, 2048),
            SockFilter::new(RET, 0, 0, 0),
        ]
    }

    #[expect(unsafe_code, reason = "no library has a safe way to say this address")]
    fn everything_on(index: u32) -> SockAddr {
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: a `sockaddr_ll` is plain numbers, for which zero is a value, and smaller than the storage.
        let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
        address.sll_family = 17;
        // ETH_P_ALL, in network byte order.
        address.sll_protocol = 0x0003_u16.to_be();
        address.sll_ifindex = i32::try_from(index).unwrap_or_default();
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap_or_default();
        // SAFETY: it was filled in just above, with its own length.
        unsafe { SockAddr::new(storage, length) }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::{io, net::Ipv4Addr};

    use crate::{address::MacAddr, learn::Seen};

    /// An ear, which this system doesn't have: no machine is started here whose address has to be learnt.
    #[derive(Debug)]
    pub enum Watch {}

    impl Watch {
        /// Fails.
        pub fn open(_: &str, _: MacAddr) -> io::Result<Self> {
            Err(io::Error::from(io::ErrorKind::Unsupported))
        }

        /// Never called.
        #[expect(clippy::unused_async, reason = "as where it can be done")]
        pub async fn ask(&self, _: Ipv4Addr) -> io::Result<()> {
            match *self {}
        }

        /// Never called.
        #[expect(clippy::unused_async, reason = "as where it can be done")]
        pub async fn next(&mut self) -> io::Result<Seen> {
            match *self {}
        }
    }
}
