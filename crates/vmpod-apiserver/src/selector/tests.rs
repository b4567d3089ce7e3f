use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::kinds::Registry;

fn labelled(labels: &Value) -> Value {
    json!({"metadata": {"name": "x", "labels": labels}})
}

#[test]
fn label_selectors() {
    let object = labelled(&json!({"n": "1", "odd": "1"}));
    for (selector, wanted) in [
        ("", true),
        ("odd=1", true),
        ("odd==1", true),
        ("odd!=1", false),
        ("n in (1,2)", true),
        ("n in(1, 2 )", true),
        ("n notin (1,2)", false),
        ("other notin (1)", true),
        ("odd", true),
        ("!odd", false),
        ("! odd", false),
        ("!other", true),
        ("n>0,n<2", true),
        ("n>1", false),
        ("n=1,odd=2", false),
        ("other=", false),
        ("in in (a)", false),
    ] {
        assert_eq!(LabelSelector::parse(selector).unwrap().matches(&object), wanted, "{selector}");
    }
}

#[test]
fn what_is_no_label_selector() {
    let message = |selector: &str| LabelSelector::parse(selector).unwrap_err().message;
    assert_eq!(message("=="), "found '==', expected: !, identifier, or 'end of string'");
    assert_eq!(message("a,"), "found '', expected: identifier after ','");
    assert!(message("a b").starts_with("found 'b', expected: in, notin"));
    assert!(message("a in b").contains("'('"));
    assert!(message("a=b/c").contains("a valid label must be"));
    assert!(message("-=b").contains("name part must consist of"));
}

#[test]
fn field_selectors() {
    let registry = Registry::builtin();
    let pods = registry.resource("", "v1", "pods").unwrap();
    let pod = json!({"metadata": {"name": "p"}, "spec": {}, "status": {"phase": "Pending"}});
    for (selector, wanted) in [
        ("spec.nodeName=", true),
        ("status.phase!=Running,metadata.name==p", true),
        ("metadata.name=q", false),
        ("spec.hostNetwork=false", true),
    ] {
        assert_eq!(FieldSelector::parse(&pods, selector).unwrap().matches(&pod), wanted, "{selector}");
    }
    let message = FieldSelector::parse(&pods, "spec.nonsense=1").unwrap_err().message;
    assert_eq!(message, "field label not supported: spec.nonsense");
    let maps = registry.resource("", "v1", "configmaps").unwrap();
    let message = FieldSelector::parse(&maps, "data.k=1").unwrap_err().message;
    assert_eq!(message, "\"data.k\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"");
    assert!(FieldSelector::parse(&maps, "nonsense").is_err());
}

proptest! {
    #[test]
    fn parsing_never_panics(selector in ".{0,60}") {
        let _label = LabelSelector::parse(&selector);
        let pods = Registry::builtin().resource("", "v1", "pods").unwrap();
        let _field = FieldSelector::parse(&pods, &selector);
    }

    #[test]
    fn selectors_out_of_their_own_letters_never_panic(selector in "[a-c!=<>(), innot]{0,40}") {
        if let Ok(parsed) = LabelSelector::parse(&selector) {
            let _matches = parsed.matches(&labelled(&json!({"a": "b"})));
        }
    }
}
