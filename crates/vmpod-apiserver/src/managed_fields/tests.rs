use proptest::prelude::*;

use super::*;
use crate::kinds::Registry;

fn now() -> Timestamp {
    "2026-01-01T12:00:00Z".parse().unwrap()
}

fn pods() -> std::sync::Arc<Resource> {
    Registry::builtin().resource("", "v1", "pods").unwrap()
}

fn applied(live: Option<&Value>, config: &Value, manager: &str, force: bool) -> Result<Value, Status> {
    server_side_apply(&pods(), live, config, manager, force, None, now())
}

fn config(containers: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {"containers": containers}})
}

fn owners(object: &Value) -> Vec<String> {
    object["metadata"]["managedFields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| format!("{} {}", one["operation"].as_str().unwrap(), one["manager"].as_str().unwrap()))
        .collect()
}

#[test]
fn two_appliers_own_what_they_say() {
    let first = applied(None, &config(&json!([{"name": "a", "image": "1"}])), "alice", false).unwrap();
    let second = applied(Some(&first), &config(&json!([{"name": "b", "image": "1"}])), "bob", false).unwrap();
    assert_eq!(second["spec"]["containers"], json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
    assert_eq!(owners(&second), ["Apply alice", "Apply bob"]);
    let refused = applied(Some(&second), &config(&json!([{"name": "a", "image": "2"}])), "bob", false).unwrap_err();
    assert_eq!(
        refused.message,
        "Apply failed with 1 conflict: conflict with \"alice\": .spec.containers[name=\"a\"].image"
    );
    let forced = applied(Some(&second), &config(&json!([{"name": "a", "image": "2"}])), "bob", true).unwrap();
    assert_eq!(forced["spec"]["containers"], json!([{"name": "a", "image": "2"}]));
}

#[test]
fn several_conflicts_are_told_by_owner() {
    let first =
        applied(None, &config(&json!([{"name": "a", "image": "1", "workingDir": "/"}])), "alice", false).unwrap();
    let other = config(&json!([{"name": "a", "image": "2", "workingDir": "/x"}]));
    let refused = applied(Some(&first), &other, "bob", false).unwrap_err();
    assert_eq!(
        refused.message,
        "Apply failed with 2 conflicts: conflicts with \"alice\":\n- .spec.containers[name=\"a\"].image\n- .spec.containers[name=\"a\"].workingDir"
    );
}

#[test]
fn an_update_takes_over_what_it_changes() {
    let first = applied(None, &config(&json!([{"name": "a", "image": "1"}])), "alice", false).unwrap();
    let mut changed = first.clone();
    changed["spec"]["containers"][0]["image"] = "2".into();
    on_update(&pods(), Some(&first), &mut changed, "kubectl", None, now());
    assert_eq!(owners(&changed), ["Apply alice", "Update kubectl"]);
    let refused = applied(Some(&changed), &config(&json!([{"name": "a", "image": "1"}])), "alice", false).unwrap_err();
    assert!(refused.message.contains("conflict with \"kubectl\" using v1: .spec.containers[name=\"a\"].image"));
}

#[test]
fn at_most_ten_updaters_are_kept_apart() {
    let mut object =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {}});
    on_update(&pods(), None, &mut object, "first", None, now());
    for index in 0..14 {
        let old = object.clone();
        object["metadata"]["labels"][format!("l{index}")] = "x".into();
        on_update(&pods(), Some(&old), &mut object, &format!("m{index}"), None, now());
    }
    let owners = owners(&object);
    assert!(owners.len() <= MAX_UPDATE_MANAGERS && owners.contains(&"Update ancient-changes".to_owned()), "{owners:?}");
}

fn some_containers() -> impl Strategy<Value = Value> {
    proptest::collection::btree_map("[a-d]", ("[1-3]", proptest::option::of("[x-z]")), 1..4).prop_map(|map| {
        map.into_iter()
            .map(|(name, (image, directory))| match directory {
                Some(directory) => json!({"name": name, "image": image, "workingDir": directory}),
                None => json!({"name": name, "image": image}),
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn applying_twice_changes_nothing(before in some_containers(), after in some_containers()) {
        let first = applied(None, &config(&before), "alice", false).unwrap();
        let once = applied(Some(&first), &config(&after), "bob", true).unwrap();
        let twice = applied(Some(&once), &config(&after), "bob", true).unwrap();
        prop_assert_eq!(&once, &twice);
    }

    #[test]
    fn a_lone_applier_gets_exactly_what_it_says(before in some_containers(), after in some_containers()) {
        let first = applied(None, &config(&before), "alice", false).unwrap();
        let second = applied(Some(&first), &config(&after), "alice", false).unwrap();
        let mut found = second["spec"]["containers"].as_array().unwrap().clone();
        found.sort_by_key(|one| one["name"].to_string());
        prop_assert_eq!(Value::Array(found), after);
    }

    #[test]
    fn sets_survive_the_wire(a in some_containers()) {
        let fields = typed::fields(&pods().ty, &config(&a));
        prop_assert_eq!(Set::from_value(&fields.to_value()).unwrap(), fields);
    }
}
