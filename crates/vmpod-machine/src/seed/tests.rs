use std::process::Command;

use super::*;
use crate::Network;
use crate::spec::tests::spec;
use crate::{MacAddr, MachineId};

fn seed() -> Seed {
    Seed {
        form: SeedForm::Nocloud,
        instance_id: "a: \"b\"".to_owned(),
        hostname: "node-1".to_owned(),
        authorized_keys: vec!["ssh-ed25519 AAAA # not: a comment".to_owned()],
        user_data: Some("#cloud-config\nruncmd: [echo hi]\n".to_owned()),
        vendor_data: None,
        network_config: None,
    }
}

#[test]
fn values_with_quotes_stay_one_value() {
    let files = files(&spec("a"), &seed());
    let meta: Value = serde_json::from_str(&files["meta-data"]).unwrap();
    assert_eq!(meta["instance-id"], "a: \"b\"");
    assert_eq!(meta["public-keys"], json!(["ssh-ed25519 AAAA # not: a comment"]));
    assert_eq!(files["user-data"], "#cloud-config\nruncmd: [echo hi]\n");
    assert!(!files.contains_key("vendor-data") && !files.contains_key("network-config"));
}

#[test]
fn a_guest_on_the_user_network_is_told_its_address() {
    let mut spec = spec("a");
    spec.networks = vec![Network::User {
        address: [127, 64, 0, 1].into(),
        ssh_port: 22,
        forwards: vec![],
        host_ports: Vec::new(),
        mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
    }];
    insta::assert_snapshot!(files(&spec, &seed())["network-config"]);
    let own = Seed { network_config: Some("version: 1\n".to_owned()), ..seed() };
    assert_eq!(files(&spec, &own)["network-config"], "version: 1\n");
}

/// Read back by a program that knows nothing of ours.
#[test]
fn another_program_reads_the_image() {
    let root = tempfile::tempdir().unwrap();
    let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
    dir.make().unwrap();
    let big = Seed { user_data: Some("x".repeat(300_000)), ..seed() };
    write(&dir, &spec("a"), &big).unwrap();
    let iso = dir.file(FILE);
    let image = std::fs::read(&iso).unwrap();
    assert_eq!(&image[16 * 2048 + 1..16 * 2048 + 6], b"CD001");
    assert_eq!(&image[16 * 2048 + 40..16 * 2048 + 46], b"cidata");
    let out = root.path().join("out");
    let status = Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(&iso)
        .args(["-extract", "/"])
        .arg(&out)
        .output()
        .expect("this test needs xorriso: install the package xorriso");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    assert_eq!(std::fs::read_to_string(out.join("user-data")).unwrap(), "x".repeat(300_000));
    let meta: Value = serde_json::from_slice(&std::fs::read(out.join("meta-data")).unwrap()).unwrap();
    assert_eq!(meta["local-hostname"], "node-1");
}

#[test]
fn a_config_drive_is_laid_out_as_openstack_does() {
    let drive = Seed { form: SeedForm::ConfigDrive, ..seed() };
    let files = config_drive(&spec("a"), &drive);
    let meta: Value = serde_json::from_str(&files["openstack/latest/meta_data.json"]).unwrap();
    assert_eq!(
        (&meta["hostname"], &meta["public_keys"]["vmpod-0"]),
        (&json!("node-1"), &json!("ssh-ed25519 AAAA # not: a comment"))
    );
    assert_eq!(files["openstack/latest/user_data"], "#cloud-config\nruncmd: [echo hi]\n");
    // Answers of Windows' own set-up are where that looks for them, and nothing runs them as a script.
    let answers = "<?xml version=\"1.0\"?><unattend/>".to_owned();
    let files = config_drive(&spec("a"), &Seed { user_data: Some(answers.clone()), ..drive });
    assert_eq!((&files["autounattend.xml"], &files["unattend.xml"]), (&answers, &answers));
    assert!(!files.contains_key("openstack/latest/user_data"));
}

/// Read back by a program that knows nothing of ours, directories and all.
#[test]
fn another_program_reads_a_config_drive() {
    let root = tempfile::tempdir().unwrap();
    let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
    dir.make().unwrap();
    write(&dir, &spec("a"), &Seed { form: SeedForm::ConfigDrive, ..seed() }).unwrap();
    let iso = dir.file(FILE);
    assert_eq!(&std::fs::read(&iso).unwrap()[16 * 2048 + 40..16 * 2048 + 48], b"config-2");
    let out = root.path().join("out");
    let mut command = Command::new("xorriso");
    let command = command.args(["-osirrox", "on", "-indev"]).arg(&iso).args(["-extract", "/"]).arg(&out);
    assert!(command.output().unwrap().status.success());
    let read = std::fs::read_to_string(out.join("openstack/latest/user_data")).unwrap();
    assert_eq!(read, "#cloud-config\nruncmd: [echo hi]\n");
}
