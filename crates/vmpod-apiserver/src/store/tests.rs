//! The store: revisions, durability, history, concurrency.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn key(name: &str) -> Key {
    Key::new("configmaps", Some("t"), name)
}

fn object(name: &str, data: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "namespace": "t", "uid": name }, "data": { "k": data } })
}

async fn put(store: &Store, name: &str, data: &str) -> u64 {
    let outcome: Result<_, StoreError> =
        store.mutate(&key(name), None, |_, _| Ok(Change::Put(object(name, data)))).await;
    outcome.unwrap().object.revision()
}

async fn delete(store: &Store, name: &str) -> bool {
    let outcome: Result<_, StoreError> = store
        .mutate(&key(name), None, |old, _| old.map(|old| Change::Delete(old.value())).ok_or(StoreError::Closed))
        .await;
    outcome.is_ok()
}

fn data(object: &Object) -> String {
    object.value()["data"]["k"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn keeps_what_it_acknowledged_and_goes_on_counting() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    let (first, last) = {
        let store = Store::open(&file).unwrap();
        let first = put(&store, "a", "1").await;
        put(&store, "b", "1").await;
        assert!(delete(&store, "b").await);
        (first, put(&store, "a", "2").await)
    };
    assert!(first < last);
    let store = Store::open(&file).unwrap();
    assert_eq!(store.revision(), last);
    let listed = store.list("configmaps", Some("t"));
    assert_eq!(listed.objects.len(), 1);
    let found = &listed.objects[0];
    assert_eq!((found.revision(), data(found)), (last, "2".into()));
    assert_eq!(found.value()["metadata"]["resourceVersion"], last.to_string());
    assert!(put(&store, "c", "1").await > last);
    // What happened before the restart isn't known any more.
    assert!(store.watch(None, None, first).is_err());
    assert!(store.watch(None, None, last).is_ok());
}

#[tokio::test]
async fn is_open_once_and_refuses_newer_and_damaged_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    let store = Store::open(&file).unwrap();
    put(&store, "a", "1").await;
    assert!(matches!(Store::open(&file), Err(OpenError::InUse { .. })));
    drop(store);
    {
        let database = redb::Database::create(&file).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(redb::TableDefinition::<&str, u64>::new("meta")).unwrap().insert("format", 99).unwrap();
        write.commit().unwrap();
    }
    match Store::open(&file) {
        Err(error @ OpenError::Newer { found: 99, .. }) => {
            let said = error.to_string();
            assert!(said.contains(&format!("written by vmpod {}", env!("CARGO_PKG_VERSION"))), "{said}");
        }
        other => panic!("{other:?}"),
    }
    std::fs::write(&file, b"this is no database").unwrap();
    let error = Store::open(&file).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { .. } | OpenError::Io { .. }), "{error:?}");
}

#[tokio::test]
async fn an_older_format_is_brought_to_this_one_with_all_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    let last = {
        let store = Store::open(&file).unwrap();
        put(&store, "a", "1").await;
        put(&store, "b", "2").await
    };
    // As the first format was: without the table that the second one added.
    {
        let database = redb::Database::create(&file).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(redb::TableDefinition::<&str, u64>::new("meta")).unwrap().insert("format", 1).unwrap();
        assert!(write.delete_table(redb::TableDefinition::<&str, &str>::new("writer")).unwrap());
        write.commit().unwrap();
    }
    {
        let store = Store::open(&file).unwrap();
        assert_eq!(store.revision(), last);
        assert_eq!(data(&store.get(&key("b")).unwrap()), "2");
        assert!(put(&store, "c", "3").await > last);
    }
    let database = redb::Database::create(&file).unwrap();
    let read = redb::ReadableDatabase::begin_read(&database).unwrap();
    let meta = read.open_table(redb::TableDefinition::<&str, u64>::new("meta")).unwrap();
    assert_eq!(meta.get("format").unwrap().unwrap().value(), 2);
    let writer = read.open_table(redb::TableDefinition::<&str, &str>::new("writer")).unwrap();
    assert_eq!(writer.get("version").unwrap().unwrap().value(), env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn a_failed_change_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    let before = put(&store, "a", "1").await;
    let failed: Result<_, StoreError> = store.mutate(&key("a"), None, |_, _| Err(StoreError::Closed)).await;
    assert!(failed.is_err());
    let kept: Result<_, StoreError> = store.mutate(&key("a"), None, |_, _| Ok(Change::Keep)).await;
    assert_eq!(kept.unwrap().object.revision(), before);
    assert_eq!(store.revision(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_changes_of_one_object_are_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    put(&store, "n", "0").await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for _ in 0..20 {
                let done: Result<_, StoreError> = store
                    .mutate(&key("n"), None, |old, _| {
                        let count: u64 = data(old.unwrap()).parse().unwrap();
                        Ok(Change::Put(object("n", &(count + 1).to_string())))
                    })
                    .await;
                done.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(data(&store.get(&key("n")).unwrap()), "160");
}

#[tokio::test]
async fn a_dependency_that_changes_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    put(&store, "owner", "open").await;
    let owner = key("owner");
    let mut seen = Vec::new();
    let result: Result<_, StoreError> = store
        .mutate(&key("child"), Some(&owner), |_, other| {
            let state = data(other.unwrap());
            seen.push(state.clone());
            if seen.len() == 1 {
                // Somebody closes it while this change is computed.
                let store = store.clone();
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                        runtime.block_on(put(&store, "owner", "closed"));
                    });
                });
            }
            if state == "open" { Ok(Change::Put(object("child", "x"))) } else { Err(StoreError::Closed) }
        })
        .await;
    assert!(result.is_err());
    assert_eq!(seen, ["open", "closed"]);
    assert!(store.get(&key("child")).is_none());
}

#[tokio::test]
async fn a_slow_watcher_is_cut_off_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    let mut slow = store.watch_now(Some("configmaps"));
    let mut quick = store.watch_now(Some("configmaps"));
    let events = 6000;
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for batch in 0..events / 500 {
                let writes = (0..500).map(|index| {
                    let store = &store;
                    async move { put(store, &format!("o{batch}-{index}"), "x").await }
                });
                futures::future::join_all(writes).await;
            }
        }
    });
    let mut got = 0;
    while got < events {
        quick.events.recv().await.unwrap();
        got += 1;
    }
    writer.await.unwrap();
    let mut received = 0;
    while slow.events.recv().await.is_some() {
        received += 1;
    }
    assert!(received < events, "{received}");
}

#[tokio::test]
async fn old_history_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    let first = put(&store, "big", "").await;
    let filler = "x".repeat(1 << 20);
    for _ in 0..40 {
        put(&store, "big", &filler).await;
    }
    let expired = store.watch(None, None, first).unwrap_err();
    assert_eq!((expired.asked, expired.newest), (first, store.revision()));
    assert!(store.list_at("configmaps", None, first).is_err());
    assert!(store.watch(None, None, expired.oldest).is_ok());
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..6_u8, any::<u8>()).prop_map(|(name, data)| Step::Put(name, data)),
        3 => (0..6_u8).prop_map(Step::Delete),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever happens, the store holds what a map would, every earlier state can be listed, and
    /// a watch tells exactly what was done.
    #[test]
    fn agrees_with_a_map(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("store.redb");
            let mut store = Store::open(&file).unwrap();
            let mut model: BTreeMap<String, String> = BTreeMap::new();
            let mut states: Vec<(u64, BTreeMap<String, String>)> = vec![(store.revision(), model.clone())];
            let mut told: Vec<(EventKind, String)> = Vec::new();
            for step in steps {
                match step {
                    Step::Put(name, value) => {
                        let revision = put(&store, &name.to_string(), &value.to_string()).await;
                        assert!(revision > states.last().unwrap().0);
                        model.insert(name.to_string(), value.to_string());
                        told.push((EventKind::Put, name.to_string()));
                        states.push((revision, model.clone()));
                    }
                    Step::Delete(name) => {
                        let was = model.remove(&name.to_string()).is_some();
                        assert_eq!(delete(&store, &name.to_string()).await, was);
                        if was {
                            told.push((EventKind::Delete, name.to_string()));
                            states.push((store.revision(), model.clone()));
                        }
                    }
                    Step::Reopen => {
                        drop(store);
                        store = Store::open(&file).unwrap();
                        states = vec![(store.revision(), model.clone())];
                        told.clear();
                    }
                }
            }
            let as_map = |listed: Listed| -> BTreeMap<String, String> {
                listed.objects.iter().map(|object| (object.key().name.to_string(), data(object))).collect()
            };
            assert_eq!(as_map(store.list("configmaps", Some("t"))), model);
            for (revision, state) in &states {
                assert_eq!(&as_map(store.list_at("configmaps", Some("t"), *revision).unwrap()), state);
            }
            let feed = store.watch(Some("configmaps"), Some("t"), states[0].0).unwrap();
            let past: Vec<(EventKind, String)> = feed.past.iter().map(|event| (event.kind, event.object.key().name.to_string())).collect();
            assert_eq!(past, told);
        });
    }
}

#[tokio::test]
async fn keeps_only_what_it_can_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    let nested = |depth: usize| {
        let mut value = object("deep", "x");
        // The object itself is one level. Brackets in text are none.
        value["data"] = (1..depth).fold(json!("[[{\\\"[["), |inner, _| json!([inner]));
        value
    };
    {
        let store = Store::open(&file).unwrap();
        let write = async |depth: usize| -> Result<Outcome, StoreError> {
            store.mutate(&key("deep"), None, |_, _| Ok(Change::Put(nested(depth)))).await
        };
        write(MAX_NESTING).await.unwrap();
        assert!(matches!(write(MAX_NESTING + 1).await, Err(StoreError::TooDeep)));
        assert!(matches!(write(1000).await, Err(StoreError::TooDeep)));
    }
    let store = Store::open(&file).unwrap();
    assert_eq!(store.get(&key("deep")).unwrap().value()["data"], nested(MAX_NESTING)["data"]);
}

#[tokio::test]
async fn a_refusal_waits_for_what_it_tells_of() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb")).unwrap();
    for round in 0..20 {
        let name = format!("n{round}");
        let first = put(&store, &name, "1");
        let second = async {
            let refused: Result<Outcome, StoreError> = store
                .mutate(&key(&name), None, |old, _| {
                    assert!(old.is_some(), "the first write is in the overlay at least");
                    Err(StoreError::Serialise("taken".into()))
                })
                .await;
            assert!(matches!(refused, Err(StoreError::Serialise(_))));
            assert!(store.get(&key(&name)).is_some(), "the refusal came before the write was visible");
        };
        // In this order: the first has joined the queue when the second is computed.
        tokio::join!(biased; first, second);
    }
}
