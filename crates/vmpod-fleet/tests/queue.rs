//! The HTTP provider against a scripted queue.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail like tests")]

use std::collections::BTreeMap;

use e2e::queue::{Queue as Scripted, RUNNER_TOKEN, TOKEN};
use jiff::{SignedDuration, Timestamp};
use vmpod_api::pool::{HttpQueue, SecretKey};
use vmpod_fleet::provider::{Machine, Provider as _, Secrets};
use vmpod_fleet::queue::{Queue, Queues};

fn secret(name: &str) -> SecretKey {
    SecretKey { name: name.to_owned(), key: "token".to_owned() }
}

fn spec(url: &str) -> HttpQueue {
    HttpQueue {
        url: url.to_owned(),
        token_secret_ref: Some(secret("queue")),
        runner_token_secret_ref: Some(secret("runner")),
        ca_secret_ref: None,
    }
}

fn secrets(token: &str) -> Secrets {
    let of = |name: &str, value: &str| ((name.to_owned(), "token".to_owned()), format!("{value}\n").into_bytes());
    Secrets(BTreeMap::from([of("queue", token), of("runner", RUNNER_TOKEN)]))
}

fn open(url: &str, token: &str) -> Queue {
    drop(rustls::crypto::ring::default_provider().install_default());
    Queue::open(&Queues::default(), &spec(url), "ci/large", &secrets(token)).unwrap()
}

#[tokio::test]
async fn it_tells_what_waits_and_who_works() {
    let scripted = Scripted::start().await.unwrap();
    scripted.with(|state| {
        state.pending.push_back(tokio::time::Instant::now());
        state.runners.extend([("a".to_owned(), true), ("b".to_owned(), false)]);
    });
    let (queue, now) = (open(&scripted.url(), TOKEN), Timestamp::now());
    let keep = queue.register(None, now).await.unwrap().keep;
    let waiting = queue.waiting(&keep, now).await.unwrap();
    assert!(waiting.count == 1 && waiting.oldest.is_some_and(|oldest| oldest <= now), "{waiting:?}");
    let busy: Vec<bool> = queue.machines(&keep, now).await.unwrap().values().map(|seen| seen.busy).collect();
    assert_eq!(busy, [true, false]);
    // One call served both questions, and it said for whom.
    assert_eq!(scripted.with(|state| state.pools.clone()), ["ci/large"]);
    // Before something that can't be undone it is asked anew.
    scripted.with(|state| state.runners.insert("b".to_owned(), true));
    assert!(queue.is_busy(&keep, "b", now).await.unwrap() && !queue.is_busy(&keep, "c", now).await.unwrap());
}

#[tokio::test]
async fn what_it_does_not_say_is_trouble_and_never_nothing() {
    let scripted = Scripted::start().await.unwrap();
    let queue = open(&scripted.url(), TOKEN);
    let mut now = Timestamp::now();
    let keep = queue.register(None, now).await.unwrap().keep;
    let long = format!("{{\"pending\": 0, \"runners\": {{}}, \"x\": \"{}\"}}", "x".repeat(5 << 20));
    let cases = [
        (200, "{\"pending\": 1}".to_owned(), "makes no sense"),
        (200, "<html>".to_owned(), "makes no sense"),
        (200, long, "longer than 4 MiB"),
        (204, String::new(), "answers 204"),
        (302, String::new(), "answers 302"),
        (404, "{\"message\": \"no such pool\"}".to_owned(), "no such pool"),
        (500, "oh".to_owned(), "answers 500"),
    ];
    for (status, body, said) in cases {
        scripted.with(|state| state.faults.push_back((status, body, None)));
        let trouble = queue.machines(&keep, now).await.unwrap_err();
        assert!(trouble.why.contains(said), "{status}: {trouble}");
        now = trouble.retry.unwrap_or(now).checked_add(SignedDuration::from_secs(1)).unwrap();
    }
    // When it wants to be left alone, it is.
    scripted.with(|state| state.faults.push_back((503, String::new(), Some(30))));
    let retry = queue.waiting(&keep, now).await.unwrap_err().retry.unwrap();
    assert_eq!(retry.duration_since(now).as_secs(), 30);
    let trouble = queue.waiting(&keep, now).await.unwrap_err();
    assert!(trouble.why.contains("left alone until"), "{trouble}");
    assert!(queue.waiting(&keep, retry).await.is_ok());
}

#[tokio::test]
async fn tokens_are_checked_and_shown_to_nobody() {
    let scripted = Scripted::start().await.unwrap();
    let (queue, now) = (open(&scripted.url(), "wrong"), Timestamp::now());
    let keep = queue.register(None, now).await.unwrap().keep;
    let trouble = queue.waiting(&keep, now).await.unwrap_err();
    assert!(trouble.why.contains("tokenSecretRef") && !trouble.why.contains("wrong"), "{trouble}");
    let missing = Queue::open(&Queues::default(), &spec(&scripted.url()), "ci/large", &Secrets::default()).unwrap_err();
    assert!(missing.why.contains("queue"), "{missing}");
    let bad = Queue::open(&Queues::default(), &spec("ftp://x"), "ci/large", &secrets(TOKEN)).unwrap_err();
    assert!(bad.why.contains("no URL"), "{bad}");
    assert!(!format!("{keep:?} {:?}", secrets(TOKEN)).contains("secret"), "a token is shown");
    // Who gets another token is another machine: it is replaced.
    let mut other = secrets(TOKEN);
    other.0.insert(("runner".to_owned(), "token".to_owned()), b"new".to_vec());
    let other = Queue::open(&Queues::default(), &spec(&scripted.url()), "ci/large", &other).unwrap();
    assert_ne!(other.register(Some(&keep), now).await.unwrap().keep, keep);
    let machine = Machine { id: "large-1", name: "large-1", jobs: 1 };
    let data =
        queue.user_data(&keep, Some("$(VMPOD_PROVIDER_URL) $(VMPOD_RUNNER_TOKEN) $(VMPOD_RUNNER_NAME)"), machine);
    assert_eq!(data.unwrap(), format!("{} {RUNNER_TOKEN} large-1", scripted.url()));
    assert!(queue.user_data(&keep, None, machine).is_err());
}
