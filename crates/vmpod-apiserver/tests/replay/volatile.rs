//! Everything that differs between any two servers, and how to tell that it agrees all the same.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// The day of the recording: times of that day were made by the server's clock.
const RECORDED_DAY: &str = "2026-11-22T";
/// What stands in the recordings for a bearer token.
const TOKEN: &str = "REDACTED-JWT";

/// Which value of ours stands for which recorded one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    uids: BTreeMap<String, String>,
    revisions: BTreeMap<u64, u64>,
    suffixes: BTreeMap<String, String>,
    token: Option<String>,
    continue_token: Option<(String, String)>,
}

impl Names {
    /// Whether two values at a path agree though they may not be equal. Learns new pairs.
    pub(crate) fn agree(&mut self, path: &str, recorded: &Value, ours: &Value) -> bool {
        let key = path.rsplit('/').next().unwrap_or_default();
        if let (Some(recorded), Some(ours)) = (recorded.as_u64(), ours.as_u64()) {
            // How many objects a page left out depends on how many the control plane made.
            return key == "remainingItemCount" && recorded.abs_diff(ours) <= 1;
        }
        let (Some(recorded), Some(ours)) = (recorded.as_str(), ours.as_str()) else { return false };
        if recorded == ours && key != "uid" && key != "resourceVersion" {
            return true;
        }
        match key {
            "uid" => self.uid(recorded, ours),
            // A list's revision also counts what the rest of the control plane wrote meanwhile.
            "resourceVersion"
                if path == "/body/metadata/resourceVersion" && !self.revisions.contains_key(&number(recorded)) =>
            {
                self.revisions.insert(number(recorded), number(ours));
                true
            }
            "resourceVersion" => self.revision(number(recorded), number(ours)),
            "continue" => {
                self.continue_token = Some((recorded.to_owned(), ours.to_owned()));
                !ours.is_empty()
            }
            "token" if recorded == TOKEN => {
                self.token = Some(ours.to_owned());
                ours.split('.').count() == 3
            }
            "ca.crt" => ours.starts_with("-----BEGIN CERTIFICATE-----"),
            "serverAddress" | "gitVersion" => !ours.is_empty(),
            "buildDate" | "gitCommit" | "gitTreeState" | "goVersion" | "compiler" | "platform" => true,
            "serverRelativeURL" => recorded.split("?hash=").next() == ours.split("?hash=").next(),
            _ => self.text(path, recorded, ours),
        }
    }

    fn uid(&mut self, recorded: &str, ours: &str) -> bool {
        if let Some(known) = self.uids.get(recorded) {
            return known == ours;
        }
        let fresh = ours.len() == 36 && !self.uids.values().any(|one| one == ours);
        self.uids.insert(recorded.to_owned(), ours.to_owned());
        fresh || recorded == ours
    }

    fn revision(&mut self, recorded: u64, ours: u64) -> bool {
        if let Some(known) = self.revisions.get(&recorded) {
            return *known == ours;
        }
        let below = self.revisions.range(..recorded).next_back().is_none_or(|(_, one)| *one <= ours);
        self.revisions.insert(recorded, ours);
        below && ours > 0
    }

    fn text(&mut self, path: &str, recorded: &str, ours: &str) -> bool {
        if recorded.starts_with(RECORDED_DAY) && recorded.len() >= 20 {
            return ours.parse::<jiff::Timestamp>().is_ok() && ours.ends_with('Z');
        }
        if path.contains("/cells/") && age(recorded) && age(ours) {
            return true;
        }
        if let (Some(before), Some(now)) = (random_end(recorded), random_end(ours)) {
            let same_start = recorded.strip_suffix(before) == ours.strip_suffix(now);
            let known = self.suffixes.entry(recorded.to_owned()).or_insert_with(|| ours.to_owned());
            return same_start && known == ours;
        }
        self.replaced(recorded) == ours || (recorded.starts_with("JTI=") && ours.starts_with("JTI="))
    }

    /// A recorded text with every recorded name in it replaced by ours.
    pub(crate) fn replaced(&self, text: &str) -> String {
        let mut out = text.to_owned();
        for (recorded, ours) in self.uids.iter().chain(&self.suffixes) {
            out = out.replace(recorded, ours);
        }
        if let Some(token) = &self.token {
            out = out.replace(TOKEN, token);
        }
        out
    }

    /// A recorded request path, to be asked here.
    pub(crate) fn translate_path(&self, path: &str) -> String {
        // Nothing happens while a recorded watch is open: a second is as good as two.
        let mut out = self.replaced(path).replace("timeoutSeconds=2", "timeoutSeconds=1");
        if let Some((recorded, ours)) = &self.continue_token {
            out = out.replace(&format!("continue={recorded}"), &format!("continue={ours}"));
        }
        if let Some((head, rest)) = out.clone().split_once("resourceVersion=") {
            let end = rest.find('&').unwrap_or(rest.len());
            if let Some(ours) = rest[..end].parse().ok().and_then(|version: u64| self.revisions.get(&version)) {
                out = format!("{head}resourceVersion={ours}{}", &rest[end..]);
            }
        }
        out
    }

    /// A recorded request body, to be sent here.
    pub(crate) fn translate(&self, body: &Value) -> Value {
        match body {
            Value::String(text) => self.replaced(text).into(),
            Value::Array(list) => list.iter().map(|one| self.translate(one)).collect(),
            Value::Object(map) => map
                .iter()
                // The server knows when it made the object; a client may leave that out.
                .filter(|(key, value)| {
                    *key != "creationTimestamp" || !value.as_str().unwrap_or_default().starts_with(RECORDED_DAY)
                })
                .map(|(key, value)| {
                    let version = value.as_str().filter(|_| key == "resourceVersion").map(number);
                    let ours = version.and_then(|version| self.revisions.get(&version));
                    (key.clone(), ours.map_or_else(|| self.translate(value), |ours| ours.to_string().into()))
                })
                .collect(),
            other => other.clone(),
        }
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

fn age(text: &str) -> bool {
    let digits = text.trim_end_matches(|letter: char| "smhd".contains(letter));
    text != digits
        && !digits.is_empty()
        && digits.chars().all(|letter| letter.is_ascii_digit() || "smh".contains(letter))
}

/// The five letters at the end of a generated name.
fn random_end(text: &str) -> Option<&str> {
    let (_, end) = text.rsplit_once('-')?;
    let fits = end.len() == 5 && end.chars().all(|letter| "bcdfghjklmnpqrstvwxz2456789".contains(letter));
    fits.then_some(end)
}

/// What in the recording isn't the API server's.
///
/// It was made on a distribution that adds a second certificate bundle to every namespace and pod, and with
/// control plane processes that are clients of their own: we have no such processes, and what our controllers
/// write has no field manager.
pub(crate) fn drop_foreign_parts(value: &mut Value) {
    const VENDOR: &str = "openshift-service-ca.crt";
    const PROCESSES: [&str; 3] = ["kapi", "kcm", "ksched"];
    let is_vendor = |one: &Value| {
        one["metadata"]["name"] == VENDOR
            || one["configMap"]["name"] == VENDOR
            || one["object"]["metadata"]["name"] == VENDOR
    };
    let is_process = |one: &Value| one["manager"].as_str().is_some_and(|manager| PROCESSES.contains(&manager));
    match value {
        Value::Array(list) => {
            list.retain(|one| !is_vendor(one) && !is_process(one));
            list.iter_mut().for_each(drop_foreign_parts);
        }
        Value::Object(map) => {
            map.values_mut().for_each(drop_foreign_parts);
            if map.get("managedFields").and_then(Value::as_array).is_some_and(Vec::is_empty) {
                map.remove("managedFields");
            }
        }
        _ => {}
    }
}

/// Requests that must have been made between two recorded ones, for what follows is only so after them.
pub(crate) fn unrecorded() -> Vec<(&'static str, Value)> {
    let merge = json!({"Content-Type": "application/merge-patch+json"});
    let maps = "/api/v1/namespaces/t/configmaps";
    vec![
        (
            "11-delete/9",
            json!({"method": "PATCH", "path": format!("{maps}/fin"), "headers": merge, "body": {"metadata": {"finalizers": null}}}),
        ),
        (
            "11-delete/9",
            json!({"method": "DELETE", "path": format!("{maps}?labelSelector=odd=1"), "headers": {}, "body": null}),
        ),
        (
            "12-server-side-apply/4",
            json!({"method": "PATCH", "path": format!("{maps}/ssa?fieldManager=carol"), "headers": merge, "body": {"data": {"a": "9"}}}),
        ),
    ]
}
