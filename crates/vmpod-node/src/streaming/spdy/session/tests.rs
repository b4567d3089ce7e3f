use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

use super::{
    super::client::{Client, Event},
    *,
};

fn pair(limits: Limits) -> (Client<DuplexStream>, Session) {
    let (client, server) = duplex(64 * 1024);
    (Client::new(client), Session::start(server, limits))
}

async fn accept(session: &mut Session) -> Stream {
    session.accept().await.unwrap().accept().unwrap()
}

#[tokio::test]
async fn streams_carry_bytes_both_ways_and_end() {
    let (mut client, mut session) = pair(Limits::default());
    let id = client.open(&[("streamtype", "stdin"), ("Port", "80")]).await;
    client.data(id, b"hello", true).await;
    let incoming = session.accept().await.unwrap();
    assert_eq!(incoming.headers().get("StreamType"), Some("stdin"));
    assert_eq!((incoming.id(), incoming.headers().get("port")), (1, Some("80")));
    let mut stream = incoming.accept().unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
    stream.write_all(b"world").await.unwrap();
    stream.shutdown().await.unwrap();
    stream.write_all(b"late").await.unwrap_err();
    assert_eq!(client.event().await, Some(Event::Reply(1)));
    assert_eq!(client.event().await, Some(Event::Data(1, "world".into(), false)));
    assert_eq!(client.event().await, Some(Event::Data(1, "".into(), true)));
    drop(stream);
    assert!(session.shared.lock().streams.is_empty());
    client.ping(7).await;
    assert_eq!(client.event().await, Some(Event::Ping(7)));
    let finishing = tokio::spawn(session.finish(Duration::from_secs(5)));
    assert_eq!(client.event().await, Some(Event::GoAway(0)));
    assert_eq!(client.event().await, None);
    drop(client);
    finishing.await.unwrap();
}

#[tokio::test]
async fn what_is_not_taken_is_refused_and_what_is_dropped_is_reset() {
    let (mut client, mut session) = pair(Limits { streams: 2, ..Limits::default() });
    client.open(&[]).await;
    drop(session.accept().await);
    assert_eq!(client.event().await, Some(Event::Reset(1, Reset::Refused as u32)));
    client.open(&[]).await;
    drop(accept(&mut session).await);
    assert_eq!(client.event().await, Some(Event::Reply(3)));
    assert_eq!(client.event().await, Some(Event::Reset(3, Reset::Cancel as u32)));
    client.open(&[]).await;
    drop(accept(&mut session).await.finishing());
    assert_eq!(client.event().await, Some(Event::Reply(5)));
    assert_eq!(client.event().await, Some(Event::Data(5, "".into(), true)));
    // It is still half open: the client may go on sending, into nowhere.
    client.data(5, &[0; 100], false).await;
    client.open(&[]).await;
    client.open(&[]).await;
    assert_eq!(client.event().await, Some(Event::Reset(9, Reset::Refused as u32)));
    client.data(11, b"x", false).await;
    assert_eq!(client.event().await, Some(Event::Reset(11, Reset::InvalidStream as u32)));
}

#[tokio::test]
async fn a_reset_wakes_both_halves() {
    let (mut client, mut session) = pair(Limits::default());
    client.open(&[]).await;
    let mut stream = accept(&mut session).await;
    let read = tokio::spawn(async move {
        let error = stream.read_u8().await.unwrap_err();
        (error.kind(), stream.write_all(b"x").await.unwrap_err().kind())
    });
    client.control(&Control::RstStream { stream: 1, status: 5 }).await;
    assert_eq!(read.await.unwrap(), (io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe));
}

#[tokio::test]
async fn a_peer_without_windows_is_only_held_back_by_the_connection() {
    let (mut client, mut session) = pair(Limits::default());
    client.open(&[]).await;
    let mut stream = accept(&mut session).await.finishing();
    let sent = tokio::spawn(async move { stream.write_all(&vec![7; 1_000_000]).await });
    let mut received = 0;
    while received < 1_000_000 {
        if let Some(Event::Data(1, bytes, _)) = client.event().await {
            received += bytes.len();
        }
    }
    sent.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_peer_with_windows_gets_what_it_grants() {
    let (mut client, mut session) = pair(Limits::default());
    client.control(&Control::Settings(vec![(INITIAL_WINDOW_SIZE, 1000)])).await;
    client.open(&[]).await;
    let mut stream = accept(&mut session).await.finishing();
    let sent = tokio::spawn(async move { stream.write_all(&vec![7; 70_000]).await });
    assert_eq!(client.event().await, Some(Event::Reply(1)));
    let mut received = 0;
    let grants = [(1, 500), (1, 66_000), (0, 10_000), (1, 10_000)];
    for (held, (id, delta)) in [1000, 1500, 65_536, 67_500].into_iter().zip(grants) {
        while received < held {
            let Some(Event::Data(1, bytes, _)) = client.event().await else { continue };
            received += bytes.len();
        }
        assert_eq!(received, held);
        client.ping(1).await;
        assert_eq!(client.event().await, Some(Event::Ping(1)), "nothing beyond {held}");
        client.control(&Control::WindowUpdate { stream: id, delta }).await;
    }
    sent.await.unwrap().unwrap();
}

#[tokio::test]
async fn consumed_bytes_are_granted_again_and_unread_ones_hold_the_peer_back() {
    let limits = Limits { stream_buffer: 100_000, ..Limits::default() };
    let (mut client, mut session) = pair(limits);
    client.open(&[]).await;
    let mut stream = accept(&mut session).await;
    assert_eq!(client.event().await, Some(Event::Reply(1)));
    let (mut read, mut write) = tokio::io::split(client.io);
    let flood = tokio::spawn(async move {
        for _ in 0..100 {
            write.write_all(&frame::data(1, false, &[1; 10_000])).await.unwrap();
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let held = session.shared.lock().buffered;
    assert!((100_000..100_000 + FRAME).contains(&held), "{held} bytes are buffered");
    assert!(!flood.is_finished());
    let mut all = vec![0; 1_000_000];
    let drain = tokio::spawn(async move {
        let mut sink = tokio::io::sink();
        tokio::io::copy(&mut read, &mut sink).await.unwrap()
    });
    stream.read_exact(&mut all).await.unwrap();
    flood.await.unwrap();
    assert_eq!(session.shared.lock().buffered, 0);
    drop(stream);
    session.finish(Duration::from_secs(5)).await;
    // Sixteen bytes for each grant; one for the stream and one for the connection after four frames.
    let grants = drain.await.unwrap() / 16;
    assert!((50..70).contains(&grants), "{grants} grants");
}

#[tokio::test]
async fn input_that_nobody_reads_does_not_keep_the_connection_from_ending() {
    let (mut client, mut session) = pair(Limits { stream_buffer: 1000, ..Limits::default() });
    client.open(&[]).await;
    let stream = accept(&mut session).await;
    let (mut read, mut write) = tokio::io::split(client.io);
    let flood =
        tokio::spawn(async move { while write.write_all(&frame::data(1, false, &[1; 10_000])).await.is_ok() {} });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let finishing = tokio::spawn(session.finish(Duration::from_millis(200)));
    let mut rest = Vec::new();
    read.read_to_end(&mut rest).await.unwrap();
    finishing.await.unwrap();
    drop((stream, read));
    flood.await.unwrap();
}

#[tokio::test]
async fn protocol_errors_end_the_connection_with_goaway() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x80, 2, 0, 1, 0, 0, 0, 0],
        &[0x80, 3, 0, 1, 0, 0, 0, 10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    ] {
        let (mut client, session) = pair(Limits::default());
        client.io.write_all(bytes).await.unwrap();
        if bytes[0] == 0x80 {
            assert_eq!(client.event().await, Some(Event::GoAway(1)), "{bytes:?}");
        } else {
            // "GET " is a data frame for a stream that doesn't exist.
            assert!(matches!(client.event().await, Some(Event::Reset(..))));
            drop(client);
        }
        session.closed().await;
    }
}

#[tokio::test]
async fn stream_numbers_must_be_odd_and_grow() {
    let (mut client, mut session) = pair(Limits::default());
    client.open(&[]).await;
    accept(&mut session).await.shutdown().await.unwrap();
    client.event().await;
    client.event().await;
    for stream in [1, 2] {
        let block = headers::Writer::new().write(&Headers::default()).unwrap();
        let (mut other, session) = pair(Limits::default());
        session.shared.lock().last = 1;
        let (associated, priority, fin, unidirectional) = (0, 0, false, false);
        other.control(&Control::SynStream { stream, associated, priority, fin, unidirectional, block }).await;
        assert_eq!(other.event().await, Some(Event::Reset(stream, Reset::Protocol as u32)));
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let (mut client, session) = pair(Limits { idle: Duration::from_millis(50), ..Limits::default() });
    for id in [1, 3, 5] {
        tokio::time::sleep(Duration::from_millis(20)).await;
        client.ping(id).await;
        assert_eq!(client.event().await, Some(Event::Ping(id)));
    }
    session.closed().await;
    assert_eq!(client.event().await, None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a peer sends, the session ends when the peer has gone, and nothing panics.
    #[test]
    fn hostile_bytes_end_the_session_and_nothing_else(
        frames in proptest::collection::vec(
            (any::<bool>(), 0..12u8, any::<u8>(), 0..4u8, proptest::collection::vec(any::<u8>(), 0..60)), 0..20),
        junk in proptest::collection::vec(any::<u8>(), 0..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, server) = duplex(1024);
            let mut session = Session::start(server, Limits { stream_buffer: 64, buffer: 256, streams: 3, ..Limits::default() });
            let serving = tokio::spawn(async move {
                while let Some(incoming) = session.accept().await {
                    if let Some(mut stream) = incoming.accept() {
                        tokio::spawn(async move {
                            let mut byte = [0];
                            while let Ok(1) = stream.read(&mut byte).await {
                                if stream.write_all(&byte).await.is_err() {
                                    break;
                                }
                            }
                        });
                    }
                }
            });
            let (mut read, mut write) = tokio::io::split(&mut client);
            let send = async {
                for (control, kind, flags, stream, body) in frames {
                    let length = u8::try_from(body.len()).unwrap();
                    let head = if control { [0x80, 3, 0, kind, flags, 0, 0, length] } else { [0, 0, 0, stream, flags, 0, 0, length] };
                    if write.write_all(&head).await.is_err() || write.write_all(&body).await.is_err() {
                        return;
                    }
                }
                write.write_all(&junk).await.ok();
                write.shutdown().await.ok();
            };
            let receive = async {
                let mut all = Vec::new();
                read.read_to_end(&mut all).await.ok();
            };
            tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(send, receive, async { serving.await.unwrap() }) }).await.unwrap();
        });
    }
}
