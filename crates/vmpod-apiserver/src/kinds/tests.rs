use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::status::Status;

fn resource(group: &str, plural: &str) -> Arc<Resource> {
    Registry::builtin().resource(group, "v1", plural).unwrap()
}

pub(crate) fn context() -> Context<'static> {
    Context {
        uid: "11111111-2222-3333-4444-555555555555",
        suffix: "abcde",
        namespace: Some("ns"),
        user: "admin",
        ..Context::plain("test", "2026-01-01T12:00:00Z".parse().unwrap())
    }
}

fn decoded(resource: &Resource, body: &Value, validation: FieldValidation) -> Result<decode::Decoded, Status> {
    decode(resource, body.to_string().as_bytes(), Format::Json, validation)
}

fn made(resource: &Resource, body: &Value) -> Result<Value, Status> {
    create(resource, decoded(resource, body, FieldValidation::Strict)?.value, &context())
}

fn pod(spec: &Value) -> Value {
    let mut spec = spec.clone();
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "i:1"}]);
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
}

#[test]
fn unknown_and_doubled_fields_are_told() {
    let pods = resource("", "pods");
    let body =
        r#"{"kind":"Pod","metadata":{"name":"p","name":"p"},"spec":{"containers":[{"name":"c","image":"i","x":1}]}}"#;
    let warned = decode(&pods, body.as_bytes(), Format::Json, FieldValidation::Warn).unwrap();
    assert_eq!(warned.warnings, ["duplicate field \"metadata.name\"", "unknown field \"spec.containers[0].x\""]);
    assert!(warned.value["spec"]["containers"][0].get("x").is_none());
    let refused = decode(&pods, body.as_bytes(), Format::Json, FieldValidation::Strict).unwrap_err();
    assert!(refused.message.contains("strict decoding error: duplicate field \"metadata.name\", unknown field"));
    let ignored = decode(&pods, body.as_bytes(), Format::Json, FieldValidation::Ignore).unwrap();
    assert!(ignored.warnings.is_empty());
}

#[test]
fn wrong_types_are_told_as_go_tells_them() {
    let pods = resource("", "pods");
    for (spec, wanted) in [
        (
            json!({"hostNetwork": "yes"}),
            "json: cannot unmarshal string into Go struct field PodSpec.spec.hostNetwork of type bool",
        ),
        (
            json!({"containers": [{"name": 7}]}),
            "json: cannot unmarshal number into Go struct field Container.spec.containers.name of type string",
        ),
        (
            json!({"containers": {}}),
            "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
        ),
        (
            json!({"containers": [{"resources": {"limits": {"cpu": "much"}}}]}),
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        ),
    ] {
        let refused = decoded(&pods, &pod(&spec), FieldValidation::Warn).unwrap_err();
        assert_eq!(refused.message, format!("Pod in version \"v1\" cannot be handled as a Pod: {wanted}"));
        assert_eq!(refused.code, 400);
    }
    for odd in ["", "[]", "7", "{", "{\"a\":", "nul", "{}x", "\u{0}"] {
        assert_eq!(decode(&pods, odd.as_bytes(), Format::Json, FieldValidation::Warn).unwrap_err().code, 400, "{odd}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(decode(&pods, deep.as_bytes(), Format::Json, FieldValidation::Warn).unwrap_err().code, 400);
}

#[test]
fn yaml_is_taken_too() {
    let maps = resource("", "configmaps");
    let body = b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  a: \"1\"\n";
    let decoded = decode(&maps, body, Format::Yaml, FieldValidation::Strict).unwrap();
    assert_eq!(decoded.value["data"], json!({"a": "1"}));
    assert!(Format::of(Some("application/yaml; charset=utf-8")).is_ok());
    assert_eq!(Format::of(Some("text/html")).unwrap_err().code, 415);
}

#[test]
fn what_is_wrong_with_pods() {
    let pods = resource("", "pods");
    let container = |more: Value| {
        let mut one = json!({"name": "c", "image": "i:1"});
        one.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"containers": [one]})
    };
    for (spec, wanted) in [
        (
            json!({"restartPolicy": "Sometimes"}),
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ),
        (container(json!({"name": "A"})), "spec.containers[0].name: Invalid value: \"A\": a lowercase RFC 1123 label"),
        (
            container(json!({"ports": [{"containerPort": 70000}]})),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ),
        (
            container(json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]})),
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
        ),
        (container(json!({"env": [{"name": ""}]})), "spec.containers[0].env[0].name: Required value"),
        (
            container(json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]})),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Unsupported value: \"spec.x\"",
        ),
        (
            container(json!({"livenessProbe": {"successThreshold": 2, "exec": {"command": ["a"]}}})),
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ),
        (
            container(json!({"readinessProbe": {}})),
            "spec.containers[0].readinessProbe: Required value: must specify a handler type",
        ),
        (
            container(json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}})),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            json!({"containers": [{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]}),
            "spec.containers[1].name: Duplicate value: \"c\"",
        ),
        (
            json!({"volumes": [{"name": "v", "emptyDir": {}, "secret": {"secretName": "s"}}]}),
            "spec.volumes[0].secret: Forbidden: may not specify more than 1 volume type",
        ),
        (
            json!({"tolerations": [{"operator": "Equal"}]}),
            "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty",
        ),
        (
            json!({"activeDeadlineSeconds": 0}),
            "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
        ),
    ] {
        let refused = made(&pods, &pod(&spec)).unwrap_err();
        assert_eq!(refused.code, 422, "{spec}");
        assert!(refused.message.contains(wanted), "{}\n  lacks {wanted}", refused.message);
    }
}

#[test]
fn what_may_change_in_a_pod() {
    let pods = resource("", "pods");
    let old = made(&pods, &pod(&json!({}))).unwrap();
    let put = |change: fn(&mut Value)| {
        let mut new = old.clone();
        change(&mut new);
        update(&pods, None, &old, new, &Context { name: Some("p"), ..context() })
    };
    assert_eq!(put(|_| ()).unwrap(), old);
    let changed = put(|pod| pod["spec"]["containers"][0]["image"] = "i:2".into()).unwrap();
    assert_eq!(changed["metadata"]["generation"], 2);
    let refused = put(|pod| pod["spec"]["restartPolicy"] = "Never".into()).unwrap_err();
    assert!(
        refused
            .message
            .starts_with("Pod \"p\" is invalid: spec: Forbidden: pod updates may not change fields other than")
    );
    let refused = put(|pod| pod["spec"]["tolerations"] = json!([])).unwrap_err();
    assert!(refused.message.contains("existing toleration can not be modified"));
    let refused = put(|pod| pod["metadata"]["name"] = "q".into()).unwrap_err();
    assert_eq!((refused.code, refused.message.contains("does not match the name on the URL")), (400, true));
}

#[test]
fn the_status_is_written_by_itself() {
    let pods = resource("", "pods");
    let old = made(&pods, &pod(&json!({}))).unwrap();
    let mut new = old.clone();
    new["status"]["phase"] = "Running".into();
    new["spec"]["restartPolicy"] = "Never".into();
    let at = Context { name: Some("p"), ..context() };
    let plain = {
        let mut new = new.clone();
        new["spec"] = old["spec"].clone();
        new
    };
    assert_eq!(update(&pods, None, &old, plain, &at).unwrap(), old);
    let written = update(&pods, Some("status"), &old, new, &at).unwrap();
    assert_eq!((written["status"]["phase"].as_str(), &written["spec"]), (Some("Running"), &old["spec"]));
    assert_eq!(written["metadata"]["generation"], 1);
}

#[test]
fn what_is_wrong_with_other_kinds() {
    let wrong = |group: &str, plural: &str, body: Value| made(&resource(group, plural), &body).unwrap_err().message;
    let name = |kind: &str, more: Value| {
        let mut body = json!({"kind": kind, "metadata": {"name": "x"}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    assert!(
        wrong("", "configmaps", name("ConfigMap", json!({"data": {"a/b": ""}})))
            .contains("data[a/b]: Invalid value: \"a/b\": a valid config key")
    );
    assert!(
        wrong("", "secrets", name("Secret", json!({"type": "kubernetes.io/tls"})))
            .contains("data[tls.crt]: Required value, data[tls.key]: Required value")
    );
    assert!(
        wrong("", "events", name("Event", json!({"involvedObject": {"namespace": "other"}})))
            .contains("does not match event.namespace")
    );
    assert!(
        wrong("coordination.k8s.io", "leases", name("Lease", json!({"spec": {"leaseDurationSeconds": 0}})))
            .contains("spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0")
    );
    let labelled =
        json!({"kind": "ConfigMap", "metadata": {"name": "x", "labels": {"a": "b c"}, "finalizers": ["bad name"]}});
    let message = wrong("", "configmaps", labelled);
    assert!(
        message.contains("metadata.labels: Invalid value: \"b c\"")
            && message.contains("metadata.finalizers: Invalid value")
    );
    let big = name("ConfigMap", json!({"data": {"a": "x".repeat(1 << 21)}}));
    assert!(wrong("", "configmaps", big).contains("Too long: may not be more than 1048576 bytes"));
}

#[test]
fn a_bound_pod_stays_where_it_is() {
    let pods = resource("", "pods");
    let old = made(&pods, &pod(&json!({}))).unwrap();
    let binding = json!({"target": {"kind": "Node", "name": "n"}});
    let bound = bind(&pods, &old, &binding, &context()).unwrap();
    assert_eq!(bound["spec"]["nodeName"], "n");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    let refused = bind(&pods, &bound, &binding, &context()).unwrap_err();
    assert!(refused.message.ends_with("pod p is already assigned to node \"n\""));
}

proptest! {
    #[test]
    fn decoding_what_was_decoded_changes_nothing(name in "[a-z]{1,8}", image in "[a-z:/@.]{0,12}", seconds in 0_i64..100, on in any::<bool>()) {
        let pods = resource("", "pods");
        let body = pod(&json!({"hostNetwork": on, "terminationGracePeriodSeconds": seconds, "containers": [{"name": name, "image": image}]}));
        let once = decoded(&pods, &body, FieldValidation::Strict).unwrap().value;
        let mut defaulted = once.clone();
        defaults::default(&pods, &mut defaulted);
        let twice = decoded(&pods, &defaulted, FieldValidation::Strict).unwrap().value;
        prop_assert_eq!(&twice, &defaulted);
        let mut again = twice.clone();
        defaults::default(&pods, &mut again);
        prop_assert_eq!(again, twice);
    }

    #[test]
    fn any_bytes_are_answered(body in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _json = decode(&resource("", "pods"), &body, Format::Json, FieldValidation::Warn);
        let _yaml = decode(&resource("", "pods"), &body, Format::Yaml, FieldValidation::Warn);
    }
}
