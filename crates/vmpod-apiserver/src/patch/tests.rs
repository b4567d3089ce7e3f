use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;
use crate::kinds::Registry;
use crate::schema::Type;

fn merged(original: &Value, patch: &Value) -> Result<Value, String> {
    strategic::merge(&Type::named("core.Pod"), original.clone(), patch.clone())
}

fn containers(list: &Value) -> Value {
    json!({"spec": {"containers": list}})
}

#[test]
fn keyed_lists_are_merged_item_by_item() {
    let original = containers(
        &json!([{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b", "image": "1"}]),
    );
    let patch = containers(&json!([{"name": "a", "env": [{"name": "Y", "value": "2"}]}]));
    let out = merged(&original, &patch).unwrap();
    assert_eq!(
        out["spec"]["containers"],
        json!([{"name": "a", "image": "1", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": "1"}]}, {"name": "b", "image": "1"}])
    );
    let refused = merged(&original, &containers(&json!([{"image": "2"}]))).unwrap_err();
    assert!(refused.contains("does not contain declared merge key: name"));
}

#[test]
fn directives() {
    let original = containers(&json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
    let names = |patch: Value| -> Vec<String> {
        let out = merged(&original, &patch).unwrap();
        out["spec"]["containers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(containers(&json!([{"name": "a", "$patch": "delete"}]))), ["b"]);
    assert_eq!(names(containers(&json!([{"$patch": "replace"}, {"name": "c"}]))), ["c"]);
    assert_eq!(names(json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}})), ["b", "a"]);
    assert_eq!(
        names(
            json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}], "containers": [{"name": "c"}]}})
        ),
        ["c", "a", "b"]
    );
    assert_eq!(merged(&original, &json!({"spec": {"$patch": "delete"}})).unwrap(), json!({"spec": {}}));
    assert_eq!(
        merged(&original, &json!({"spec": {"$patch": "replace", "nodeName": "n"}})).unwrap(),
        json!({"spec": {"nodeName": "n"}})
    );
    assert!(merged(&original, &json!({"spec": {"$patch": "odd"}})).is_err());
    let kept = merged(&json!({"spec": {"a": 1, "b": 2}}), &json!({"spec": {"$retainKeys": ["b"]}})).unwrap();
    assert_eq!(kept, json!({"spec": {"b": 2}}));
    let finalizers = json!({"metadata": {"finalizers": ["a", "b"]}});
    let out =
        merged(&finalizers, &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}))
            .unwrap();
    assert_eq!(out["metadata"]["finalizers"], json!(["c", "b"]));
}

fn asked(kind: PatchKind, body: &str) -> Result<Patched, Status> {
    let maps = Registry::builtin().resource("", "v1", "configmaps").unwrap();
    let old = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "ns"}, "data": {"a": "1"}});
    let groups = [];
    let context = Context {
        uid: "u",
        suffix: "abcde",
        namespace: Some("ns"),
        name: Some("c"),
        user: "admin",
        groups: &groups,
        patch: true,
        ..Context::plain("m", "2026-01-01T12:00:00Z".parse().unwrap())
    };
    apply(kind, &maps, None, Some(&old), body.as_bytes(), FieldValidation::Strict, false, &context)
}

#[test]
fn bad_patches_are_client_errors() {
    for (kind, body, code) in [
        (PatchKind::Json, "{}", 400),
        (PatchKind::Json, "[{\"op\":\"fly\",\"path\":\"/a\"}]", 400),
        (PatchKind::Json, "[{\"op\":\"remove\",\"path\":\"/nothing\"}]", 422),
        (PatchKind::Json, "[{\"op\":\"add\",\"path\":\"/kind\",\"value\":\"Pod\"}]", 400),
        (PatchKind::Merge, "[]", 400),
        (PatchKind::Merge, "{", 400),
        (PatchKind::Merge, "{\"nonsense\":1}", 400),
        (PatchKind::Strategic, "{\"data\":7}", 400),
        (PatchKind::Apply, "kind: ConfigMap", 400),
        (PatchKind::Apply, "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"nonsense\":1}", 500),
        (PatchKind::Apply, "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"other\"}}", 400),
    ] {
        assert_eq!(asked(kind, body).unwrap_err().code, code, "{body}");
    }
    assert_eq!(asked(PatchKind::Merge, "{\"data\":{\"b\":\"2\"}}").unwrap().value["data"], json!({"a": "1", "b": "2"}));
}

#[test]
fn options_of_a_patch() {
    assert!(check_options(PatchKind::Apply, Some("me"), Some(true)).is_ok());
    assert_eq!(check_options(PatchKind::Apply, None, None).unwrap_err().code, 422);
    assert!(
        check_options(PatchKind::Merge, None, Some(true))
            .unwrap_err()
            .message
            .contains("may not be specified for non-apply patch")
    );
    assert_eq!(PatchKind::of(Some("application/json")).unwrap_err().code, 415);
}

/// The merge patch by containers' names that leads from one list to another.
fn difference(from: &[(String, u8)], to: &[(String, u8)]) -> Value {
    let order: Vec<Value> = to.iter().map(|(name, _)| json!({"name": name})).collect();
    let mut items: Vec<Value> =
        to.iter().map(|(name, image)| json!({"name": name, "image": image.to_string()})).collect();
    let gone = from.iter().filter(|(name, _)| !to.iter().any(|(other, _)| other == name));
    items.extend(gone.map(|(name, _)| json!({"name": name, "$patch": "delete"})));
    json!({"spec": {"$setElementOrder/containers": order, "containers": items}})
}

fn of(list: &[(String, u8)]) -> Value {
    let items: Vec<Value> =
        list.iter().map(|(name, image)| json!({"name": name, "image": image.to_string()})).collect();
    containers(&items.into())
}

fn named() -> impl Strategy<Value = Vec<(String, u8)>> {
    proptest::collection::btree_map("[a-e]", any::<u8>(), 1..5)
        .prop_map(|map| map.into_iter().collect::<Vec<_>>())
        .prop_shuffle()
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i8>().prop_map(Value::from),
        "[a-z$/]{0,6}".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let key = prop_oneof![
            Just("spec".to_owned()),
            Just("containers".to_owned()),
            Just("name".to_owned()),
            Just("$patch".to_owned()),
            Just("$retainKeys".to_owned()),
            Just("$setElementOrder/containers".to_owned()),
            Just("metadata".to_owned()),
            Just("finalizers".to_owned()),
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            proptest::collection::vec((key, inner), 0..4)
                .prop_map(|list| Value::Object(list.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

proptest! {
    #[test]
    fn the_difference_of_two_lists_leads_from_one_to_the_other(from in named(), to in named()) {
        prop_assert_eq!(merged(&of(&from), &difference(&from, &to)).unwrap(), of(&to));
    }

    #[test]
    fn a_merge_done_twice_is_a_merge_done_once(from in named(), to in named()) {
        let patch = of(&to);
        let once = merged(&of(&from), &patch).unwrap();
        prop_assert_eq!(merged(&once, &patch).unwrap(), once);
    }

    #[test]
    fn no_patch_panics(original in any_json(), patch in any_json()) {
        let _strategic = merged(&original, &patch);
        let mut object = original;
        let _json = json_patch_to(&mut object, patch);
    }

    #[test]
    fn no_bytes_panic(body in ".{0,60}") {
        for kind in [PatchKind::Json, PatchKind::Merge, PatchKind::Strategic, PatchKind::Apply] {
            let _answer = asked(kind, &body);
        }
    }
}

#[test]
fn a_json_patch_cannot_grow_without_bounds() {
    let deeper = json!({"op": "copy", "from": "/a", "path": "/a/b/b/b/b/b/b/b/b/b/b"});
    let mut object = json!({"a": {"b": {}}});
    for _ in 0..9 {
        object["a"] = json!({"b": object["a"].clone()});
    }
    let refused = json_patch_to(&mut object, vec![deeper; 1000].into()).unwrap_err();
    assert_eq!((refused.code, refused.message.contains("nested")), (422, true));
    assert!(measure(&object).0 <= MAX_NESTING);
    // Each pair of operations would double the object.
    let wider: Vec<Value> = (0..60)
        .flat_map(|at| {
            [
                json!({"op": "copy", "from": "/data", "path": "/other"}),
                json!({"op": "copy", "from": "/other", "path": format!("/data/{at}")}),
            ]
        })
        .collect();
    let refused = json_patch_to(&mut json!({"data": {"k": "v"}}), wider.into()).unwrap_err();
    assert_eq!((refused.code, refused.message.contains("size")), (422, true));
    let path = "/a".repeat(MAX_NESTING + 1);
    let refused = json_patch_to(&mut json!({}), json!([{"op": "add", "path": path, "value": 1}])).unwrap_err();
    assert!(refused.message.contains("nested"));
}
