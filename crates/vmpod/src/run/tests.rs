use clap::Parser as _;
use serde_json::json;

use super::*;
use crate::args::{Cli, Command};

fn args(words: &[&str]) -> args::Run {
    match Cli::try_parse_from(["vmpod", "run"].iter().chain(words)).unwrap().command {
        Command::Run(run) => run,
        other => panic!("{other:?}"),
    }
}

fn made(words: &[&str]) -> Pod {
    let args = args(words);
    pod(&args, &Reference::parse(&args.image).unwrap(), None, "x")
}

fn at(status: serde_json::Value) -> Stage {
    let mut pod = json!({"metadata": {"name": "p"}});
    pod["status"] = status;
    stage(&serde_json::from_value(pod).unwrap())
}

fn container(state: serde_json::Value) -> serde_json::Value {
    let mut all = json!([{"name": "machine", "image": "", "imageID": "", "ready": false, "restartCount": 0}]);
    all[0]["state"] = state;
    all
}

#[test]
fn the_pod_is_what_was_asked_for() {
    let pod = made(&["tiny", "--cpus", "2", "-m", "1Gi", "--disk", "20Gi", "-e", "A=b c", "--", "sh", "-c", "exit 3"]);
    insta::assert_yaml_snapshot!(pod);
}

#[test]
fn with_somebody_at_the_keys_the_command_is_typed() {
    let pod = made(&["tiny", "-i", "--", "cat"]);
    assert_eq!(pod.spec.unwrap().containers[0].command, None);
    assert_eq!(typed_command(&args(&["tiny", "-i", "-e", "A=b", "--", "cat"])), ["env", "A=b", "cat"]);
    assert_eq!(typed_command(&args(&["tiny", "-it"])), ["sh", "-l"]);
}

#[test]
fn a_name_comes_of_the_image() {
    for (repository, name) in [("tiny", "tiny-x"), ("ci/Ubuntu_24", "ubuntu-24-x"), ("a/--", "machine-x")] {
        assert_eq!(default_name(repository, "x"), name);
        assert!(Cli::try_parse_from(["vmpod", "run", "i", "--name", name]).is_ok(), "{name} is no pod name");
    }
    let long = default_name(&"a".repeat(200), "bcdfg");
    assert!(long.len() <= 63, "{long}");
}

#[test]
fn letters_are_letters() {
    let some = letters(8);
    assert_eq!(some.len(), 8);
    assert!(some.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
    assert_ne!(some, letters(8));
}

#[test]
fn the_stages_follow_the_pod() {
    assert_eq!(at(json!({})), Stage::Waiting("scheduling".into()));
    let waiting = json!({"phase": "Pending", "containerStatuses": container(json!({"waiting": {"reason": "ContainerCreating"}}))});
    assert_eq!(at(waiting), Stage::Waiting("preparing the machine".into()));
    let running = |ready| json!({"phase": "Running", "conditions": [{"type": "Ready", "status": ready}], "containerStatuses": container(json!({"running": {}}))});
    assert_eq!(at(running("False")), Stage::Started { ready: false });
    assert_eq!(at(running("True")), Stage::Started { ready: true });
    let ended = json!({"phase": "Failed", "containerStatuses": container(json!({"terminated": {"exitCode": 3, "reason": "Error"}}))});
    assert_eq!(at(ended), Stage::Finished(End::Code(3)));
}

#[test]
fn what_can_not_start_is_told_at_once() {
    let pull = json!({"phase": "Pending", "containerStatuses": container(json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}}))});
    assert_eq!(at(pull), Stage::Hopeless("ErrImagePull: no such image".into()));
    let big = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient memory."}]});
    assert_eq!(at(big), Stage::Hopeless("it fits on no node: 0/1 nodes are available: 1 Insufficient memory.".into()));
    let refused = json!({"phase": "Failed", "reason": "OutOfmemory", "message": "not enough"});
    assert_eq!(at(refused), Stage::Hopeless("OutOfmemory: not enough".into()));
    let never = json!({"phase": "Failed", "containerStatuses": container(json!({"terminated": {"exitCode": 128, "reason": "StartError", "message": "no disk"}}))});
    assert_eq!(at(never), Stage::Finished(End::Lost("StartError: no disk".into())));
}
