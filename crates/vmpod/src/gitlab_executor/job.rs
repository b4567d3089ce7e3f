//! A job as GitLab Runner tells of it, and the pod that is made for it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;
use sha2::{Digest as _, Sha256};
use vmpod_api::annotations;

use crate::args::GitlabExecutor;
use crate::report::Exit;

/// Which place of which runner a pod serves. Only one job is in a place at a time.
pub(super) const SLOT: &str = "vmpod.dev/gitlab-slot";
/// The job's number.
const JOB: &str = "vmpod.dev/gitlab-job";
/// The job's project, for people.
const PROJECT: &str = "vmpod.dev/gitlab-project";
/// Where people see the job.
const URL: &str = "vmpod.dev/gitlab-job-url";
/// What a machine may live longer than its job may run: starting, the scripts around the job's own, the end.
const AROUND: i64 = 30 * 60;

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Well.
    Well,
    /// The job's own script failed, with this exit code.
    Build(Option<u8>),
    /// Something else did.
    System,
}

/// The job asks for what it can't have; that is its author's to mend.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

/// A job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Job {
    id: u64,
    server: String,
    runner: String,
    place: String,
    host: String,
    project: String,
    url: String,
    image: Option<String>,
    timeout: Option<i64>,
    build_failure: u8,
    system_failure: u8,
    /// Where GitLab Runner wants to read the script's exit code.
    pub(super) exit_code_file: Option<PathBuf>,
}

impl Job {
    /// Reads what GitLab Runner told in the environment: the job's variables with `CUSTOM_ENV_` before them, and its own.
    pub(super) fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let ci = |name: &str| get(&format!("CUSTOM_ENV_{name}"));
        let code = |name: &str, otherwise| get(name).and_then(|code| code.parse().ok()).unwrap_or(otherwise);
        let Some(id) = ci("CI_JOB_ID").and_then(|id| id.parse().ok()) else {
            return Err(crate::report::Remedy::new(
                "CUSTOM_ENV_CI_JOB_ID tells no job",
                "these are the programs of GitLab Runner's custom executor: it calls them, see docs/gitlab.md",
            )
            .into());
        };
        let text = |name: &str| ci(name).unwrap_or_default();
        Ok(Self {
            id,
            server: text("CI_SERVER_URL"),
            runner: ci("CI_RUNNER_ID").unwrap_or_else(|| text("CI_RUNNER_SHORT_TOKEN")),
            place: text("CI_CONCURRENT_ID"),
            host: sysinfo::System::host_name().unwrap_or_default(),
            project: text("CI_PROJECT_PATH"),
            url: text("CI_JOB_URL"),
            image: ci("CI_JOB_IMAGE"),
            timeout: ci("CI_JOB_TIMEOUT").and_then(|seconds| seconds.parse().ok()),
            build_failure: code("BUILD_FAILURE_EXIT_CODE", 1),
            system_failure: code("SYSTEM_FAILURE_EXIT_CODE", 2),
            exit_code_file: get("BUILD_EXIT_CODE_FILE").map(PathBuf::from),
        })
    }

    /// The exit code that GitLab Runner wants for an ending.
    pub(super) fn exit(&self, ending: Ending) -> Exit {
        match ending {
            Ending::Well => Exit::Done,
            Ending::Build(_) => Exit::Command(self.build_failure),
            Ending::System => Exit::Command(self.system_failure),
        }
    }

    /// The pod's name: the same in every call for this job, and no other job's of any GitLab.
    pub(super) fn pod_name(&self) -> String {
        format!("ci-{}-{}", self.id, short_hash(&[&self.server]))
    }

    /// The place that this job has in its runner on this host, as a label's value.
    pub(super) fn slot(&self) -> String {
        short_hash(&[&self.server, &self.host, &self.runner, &self.place])
    }

    /// The image of the job's machine: the one that it asks for, if that is allowed, else the runner's.
    pub(super) fn image(&self, otherwise: Option<&str>, allowed: &[String]) -> Result<String> {
        match (&self.image, otherwise) {
            (None, Some(image)) => Ok(image.to_owned()),
            (None, None) => Err(Refused("the job names no image, and the runner has none (--image)".into()).into()),
            (Some(image), otherwise) => {
                if otherwise == Some(image) || allowed.iter().any(|pattern| matches(pattern, image)) {
                    return Ok(image.clone());
                }
                let may = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
                Err(Refused(format!(
                    "the job asks for the image {image}, and this runner allows {may} (--allow-image)"
                ))
                .into())
            }
        }
    }

    /// The pod of the job.
    pub(super) fn pod(&self, image: &str, args: &GitlabExecutor) -> Pod {
        let machine = &args.machine;
        let sizes: BTreeMap<String, Quantity> = [
            ("cpu", machine.cpus.clone()),
            ("memory", machine.memory.as_ref().map(|size| size.quantity.clone())),
            ("ephemeral-storage", machine.disk.as_ref().map(|size| size.quantity.clone())),
        ]
        .into_iter()
        .filter_map(|(name, size)| Some((name.to_owned(), Quantity(size?))))
        .collect();
        let resources = (!sizes.is_empty()).then(|| ResourceRequirements {
            requests: Some(sizes.clone()),
            limits: Some(sizes),
            claims: None,
        });
        let labels = [
            ("app.kubernetes.io/managed-by", "vmpod-gitlab-executor".to_owned()),
            (SLOT, self.slot()),
            (JOB, self.id.to_string()),
        ];
        let mut notes = vec![(PROJECT, self.project.clone()), (URL, self.url.clone())];
        notes.extend(machine.user_data_secret.clone().map(|name| (annotations::USER_DATA_SECRET, name)));
        let map = |pairs: Vec<(&str, String)>| -> BTreeMap<String, String> {
            pairs
                .into_iter()
                .filter(|(_, value)| !value.is_empty())
                .map(|(key, value)| (key.to_owned(), value))
                .collect()
        };
        let selector = machine.node_selector.iter().map(|pair| (pair.key.as_str(), pair.value.clone())).collect();
        let selector = map(selector);
        Pod {
            metadata: ObjectMeta {
                name: Some(self.pod_name()),
                labels: Some(map(labels.into())),
                annotations: Some(map(notes)),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                restart_policy: Some("Never".into()),
                automount_service_account_token: Some(false),
                // When GitLab Runner dies, nobody else ends the machine.
                active_deadline_seconds: self.timeout.map(|seconds| seconds.saturating_add(AROUND)),
                node_selector: (!selector.is_empty()).then_some(selector),
                containers: vec![Container {
                    name: "machine".into(),
                    image: Some(image.to_owned()),
                    image_pull_policy: Some("IfNotPresent".into()),
                    resources,
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            status: None,
        }
    }
}

/// Ten hexadecimal digits of some words.
fn short_hash(words: &[&str]) -> String {
    let mut hash = Sha256::new();
    for word in words {
        hash.update(word.len().to_le_bytes());
        hash.update(word);
    }
    let digits = |byte: &u8| [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16));
    hash.finalize().iter().take(5).flat_map(digits).flatten().collect()
}

/// Whether a text is as a pattern says, where `*` stands for any letters.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::args::{Cli, Command};

    fn job(more: &[(&str, &str)]) -> Result<Job> {
        let mut all: BTreeMap<&str, &str> = BTreeMap::from([
            ("CUSTOM_ENV_CI_JOB_ID", "42"),
            ("CUSTOM_ENV_CI_SERVER_URL", "https://gitlab.example.com"),
            ("CUSTOM_ENV_CI_RUNNER_ID", "7"),
            ("CUSTOM_ENV_CI_CONCURRENT_ID", "0"),
            ("CUSTOM_ENV_CI_JOB_TIMEOUT", "3600"),
            ("BUILD_FAILURE_EXIT_CODE", "1"),
            ("SYSTEM_FAILURE_EXIT_CODE", "2"),
        ]);
        all.extend(more.iter().copied());
        let mut job = Job::from_environment(|name| all.get(name).map(|&value| value.to_owned()))?;
        job.host = "runner-host".into();
        Ok(job)
    }

    fn args(words: &[&str]) -> GitlabExecutor {
        let words = ["vmpod", "gitlab-executor"].iter().chain(words).chain(&["prepare"]);
        match Cli::try_parse_from(words).unwrap().command {
            Command::GitlabExecutor(args) => args,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn a_jobs_pod_has_one_name_in_all_calls_and_no_other_jobs() {
        let name = job(&[]).unwrap().pod_name();
        assert_eq!(name, job(&[("CUSTOM_ENV_CI_CONCURRENT_ID", "1"), ("JOB_ENV", "x")]).unwrap().pod_name());
        assert_ne!(name, job(&[("CUSTOM_ENV_CI_JOB_ID", "43")]).unwrap().pod_name());
        assert_ne!(name, job(&[("CUSTOM_ENV_CI_SERVER_URL", "https://other.example.com")]).unwrap().pod_name());
        assert!(job(&[("CUSTOM_ENV_CI_JOB_ID", "")]).is_err());
    }

    #[test]
    fn a_place_is_one_of_a_runner_on_a_host() {
        let slot = job(&[]).unwrap().slot();
        assert_eq!(
            slot,
            job(&[("CUSTOM_ENV_CI_JOB_ID", "43")]).unwrap().slot(),
            "the next job comes to the same place"
        );
        for other in [("CUSTOM_ENV_CI_CONCURRENT_ID", "1"), ("CUSTOM_ENV_CI_RUNNER_ID", "8")] {
            assert_ne!(slot, job(&[other]).unwrap().slot());
        }
        let mut elsewhere = job(&[]).unwrap();
        elsewhere.host = "other-host".into();
        assert_ne!(slot, elsewhere.slot());
    }

    #[test]
    fn a_job_gets_no_image_that_the_runner_does_not_allow() {
        let allowed = ["registry.example.com/ci/*:2*".to_owned(), "debian".to_owned()];
        let asks = |image: &str| job(&[("CUSTOM_ENV_CI_JOB_IMAGE", image)]).unwrap().image(Some("tiny"), &allowed);
        for image in ["tiny", "debian", "registry.example.com/ci/ubuntu:24.04"] {
            assert_eq!(asks(image).unwrap(), image);
        }
        for image in ["debian2", "evil.example.com/registry.example.com/ci/x:2", "registry.example.com/ci/ubuntu:1"] {
            let error = asks(image).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains("--allow-image"), "{image}: {error}");
        }
        assert_eq!(job(&[]).unwrap().image(Some("tiny"), &[]).unwrap(), "tiny");
        assert!(job(&[]).unwrap().image(None, &allowed).unwrap_err().is::<Refused>());
    }

    #[test]
    fn patterns() {
        for (pattern, text, fits) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*", "a", true),
            ("a*a", "a", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxcyyb", false),
            ("*b", "ab", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn exit_codes_are_gitlab_runners() {
        let job = job(&[("BUILD_FAILURE_EXIT_CODE", "101"), ("SYSTEM_FAILURE_EXIT_CODE", "102")]).unwrap();
        assert_eq!(job.exit(Ending::Well), Exit::Done);
        assert_eq!(job.exit(Ending::Build(Some(3))), Exit::Command(101));
        assert_eq!(job.exit(Ending::System), Exit::Command(102));
    }

    #[test]
    fn the_pod_of_a_job() {
        let args = args(&["--cpus", "2", "--memory", "4Gi", "--node-selector", "site=bkk", "--user-data-secret", "ci"]);
        let pod = job(&[("CUSTOM_ENV_CI_PROJECT_PATH", "group/app")]).unwrap().pod("tiny", &args);
        insta::assert_json_snapshot!(json!(pod));
    }
}
