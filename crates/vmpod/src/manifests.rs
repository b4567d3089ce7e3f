//! `vmpod manifests`: the fleet's operator for a cluster, without Helm.

use anyhow::Result;
use serde_json::json;
use vmpod_image::Reference;

use crate::args::Manifests;
use crate::output;
use crate::report::{Exit, Remedy};

/// What the chart renders with its usual values (`cargo xtask crds` writes it), with words in place of what is chosen here.
const OPERATOR: &str = include_str!("manifests.yaml");
const IMAGE: &str = "VMPOD_IMAGE";
const NAMESPACE: &str = "VMPOD_NAMESPACE";

/// Prints them.
pub(crate) fn run(args: &Manifests) -> Result<Exit> {
    output::data(&text(args)?)?;
    Ok(Exit::Done)
}

fn text(args: &Manifests) -> Result<String> {
    // JSON is YAML.
    let kinds = vmpod_api::definitions().into_iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    let kinds = kinds.iter().map(|kind| format!("---\n{kind:#}\n")).collect::<Vec<_>>().concat();
    let Some(image) = &args.image else { return Ok(kinds) };
    if let Err(error) = Reference::parse(image) {
        return Err(Remedy::new(
            format!("{image:?} is no container image: {error}"),
            "name one, such as registry.example.com/vmpod:1",
        )
        .into());
    }
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let namespace = &args.namespace;
    if namespace.is_empty() || namespace.len() > 63 || !namespace.chars().all(label) {
        return Err(Remedy::new(
            format!("{namespace:?} can't be a namespace"),
            "a namespace has up to 63 lower case letters, digits and '-'",
        )
        .into());
    }
    let place = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
    let operator = OPERATOR.replace(IMAGE, image).replace(NAMESPACE, namespace);
    Ok(format!("---\n{place:#}\n{kinds}{operator}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(image: &str, namespace: &str) -> Result<String> {
        text(&Manifests { image: Some(image.to_owned()), namespace: namespace.to_owned(), kinds_only: false })
    }

    #[test]
    fn what_is_chosen_is_everywhere() {
        let text = of("registry.example.com/vmpod:1", "fleet").unwrap();
        assert!(
            !text.contains(IMAGE)
                && !text.contains(NAMESPACE)
                && text.contains("namespace: fleet")
                && text.contains("\"registry.example.com/vmpod:1\"")
        );
        let kinds = super::text(&Manifests { image: None, namespace: "x".to_owned(), kinds_only: true }).unwrap();
        assert_eq!(kinds.matches("\"kind\": \"CustomResourceDefinition\"").count(), 3);
    }

    #[test]
    fn what_would_be_other_yaml_is_refused() {
        assert!(of("a\"\n- b", "fleet").unwrap_err().to_string().contains("is no container image"));
        assert!(of("a", "Fleet").unwrap_err().to_string().contains("can't be a namespace"));
    }
}
