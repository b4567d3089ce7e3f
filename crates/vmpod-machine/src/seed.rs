//! First-boot data: an ISO 9660 image labelled `cidata` in the `NoCloud` form, `config-2` in that of a config drive.
//!
//! The files and their meaning are cloud-init's (<https://docs.cloudinit.io/en/latest/reference/datasources/nocloud.html>).
//! Structured files are written as JSON, which is YAML, so that no value needs YAML's quoting rules.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;

use hadris_iso::joliet::JolietLevel;
use hadris_iso::read::PathSeparator;
use hadris_iso::rrip::RripOptions;
use hadris_iso::write::options::{BaseIsoLevel, CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{File, InputFiles, IsoImageWriter};
use serde_json::{Value, json};

use crate::directory::{MachineDir, write_whole};
use crate::spec::{Seed, SeedForm, Spec};

/// The seed's file in a machine's directory.
pub(crate) const FILE: &str = "seed.iso";

/// Why a seed couldn't be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The image couldn't be laid out.
    #[error("can't lay out the ISO image: {0}")]
    Layout(String),
    /// The file couldn't be written.
    #[error("can't write the ISO image")]
    Io(#[from] std::io::Error),
}

/// Writes `seed.iso` into the machine's directory, for its owner only: user data may hold secrets.
pub(crate) fn write(dir: &MachineDir, spec: &Spec, seed: &Seed) -> Result<(), SeedError> {
    let (label, files) = match seed.form {
        SeedForm::Nocloud => ("cidata", files(spec, seed)),
        SeedForm::ConfigDrive => ("config-2", config_drive(spec, seed)),
    };
    Ok(write_whole(&dir.file(FILE), &image(label, &files)?)?)
}

/// The files of a config drive, as `OpenStack`'s compute service writes them and cloudbase-init reads them
/// (<https://docs.openstack.org/nova/latest/admin/config-drive.html>). User data that is XML is for Windows' own set-up, which looks for
/// answers under these names in the roots of discs
/// (<https://learn.microsoft.com/windows-hardware/manufacture/desktop/windows-setup-automation-overview>).
fn config_drive(spec: &Spec, seed: &Seed) -> BTreeMap<&'static str, String> {
    let keys: serde_json::Map<String, Value> = seed
        .authorized_keys
        .iter()
        .enumerate()
        .map(|(index, key)| (format!("vmpod-{index}"), key.as_str().into()))
        .collect();
    let meta = json!({
        "uuid": spec.id.uuid().to_string(),
        "hostname": seed.hostname,
        "name": seed.hostname,
        "public_keys": keys,
    });
    let mut files = BTreeMap::from([("openstack/latest/meta_data.json", lines(&meta))]);
    match &seed.user_data {
        Some(answers) if answers.trim_start_matches('\u{feff}').trim_start().starts_with('<') => {
            files.insert("autounattend.xml", answers.clone());
            files.insert("unattend.xml", answers.clone());
        }
        Some(data) => drop(files.insert("openstack/latest/user_data", data.clone())),
        None => {}
    }
    files
}

/// The files of a seed.
fn files(spec: &Spec, seed: &Seed) -> BTreeMap<&'static str, String> {
    let mut files = BTreeMap::from([
        (
            "meta-data",
            lines(&json!({
                "instance-id": seed.instance_id,
                "local-hostname": seed.hostname,
                "public-keys": seed.authorized_keys,
            })),
        ),
        // cloud-init takes no seed without this file.
        ("user-data", seed.user_data.clone().unwrap_or_else(|| "#cloud-config\n{}\n".to_owned())),
    ]);
    if let Some(vendor) = &seed.vendor_data {
        files.insert("vendor-data", vendor.clone());
    }
    if let Some(network) = seed.network_config.clone().or_else(|| network(spec).as_ref().map(lines)) {
        files.insert("network-config", network);
    }
    files
}

/// Network configuration: a guest whose address is known before it boots need not wait for DHCP. Version 2, see
/// <https://docs.cloudinit.io/en/latest/reference/network-config-format-v2.html>.
fn network(spec: &Spec) -> Option<Value> {
    let [network] = spec.networks.as_slice() else { return None };
    let mut interface = json!({"match": {"macaddress": network.mac().to_string()}});
    match network.assigned() {
        Some(assigned) => {
            interface["addresses"] = json!([format!("{}/{}", assigned.address, assigned.prefix)]);
            interface["gateway4"] = json!(assigned.gateway);
            interface["nameservers"] = json!({"addresses": [assigned.dns]});
        }
        None => interface["dhcp4"] = true.into(),
    }
    Some(json!({"version": 2, "ethernets": {"nic0": interface}}))
}

fn lines(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Files and directories, from paths.
fn tree<'a>(files: impl Iterator<Item = (&'a str, &'a String)>) -> Vec<File> {
    let mut directories: BTreeMap<&str, Vec<(&str, &String)>> = BTreeMap::new();
    let mut all = Vec::new();
    for (path, text) in files {
        match path.split_once('/') {
            Some((directory, rest)) => directories.entry(directory).or_default().push((rest, text)),
            None => all.push(File::File { name: Arc::new(path.to_owned()), contents: text.clone().into_bytes() }),
        }
    }
    all.extend(
        directories.into_iter().map(|(name, inside)| File::Directory {
            name: Arc::new(name.to_owned()),
            children: tree(inside.into_iter()),
        }),
    );
    all
}

/// Lays files out as an ISO 9660 image with Rock Ridge and Joliet names.
fn image(label: &str, files: &BTreeMap<&'static str, String>) -> Result<Vec<u8>, SeedError> {
    let input = InputFiles {
        path_separator: PathSeparator::ForwardSlash,
        files: tree(files.iter().map(|(path, text)| (*path, text))),
    };
    let options = IsoFormatOptions {
        volume_name: label.to_owned(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: 2048,
        features: CreationFeatures {
            filenames: BaseIsoLevel::Level1 { supports_lowercase: false, supports_rrip: true },
            joliet: Some(JolietLevel::Level3),
            rock_ridge: Some(RripOptions::default()),
            ..CreationFeatures::default()
        },
        path_separator: PathSeparator::ForwardSlash,
        // "cidata" in lower case is what every reader of seeds looks for, whatever ISO 9660 allows.
        strict_charset: false,
    };
    let content: usize = files.values().map(|text| text.len().next_multiple_of(2048)).sum();
    let mut buffer = Cursor::new(vec![0; content + (1 << 20)]);
    IsoImageWriter::create(&mut buffer, input, options).map_err(|error| SeedError::Layout(format!("{error:?}")))?;
    let mut bytes = buffer.into_inner();
    // The layout's length stands in the primary volume descriptor: blocks, little-endian, at byte 80 of sector 16.
    let blocks = bytes
        .get(16 * 2048 + 80..16 * 2048 + 84)
        .and_then(|field| <[u8; 4]>::try_from(field).ok())
        .map(u32::from_le_bytes)
        .and_then(|blocks| usize::try_from(blocks).ok())
        .ok_or_else(|| SeedError::Layout("no volume descriptor".to_owned()))?;
    bytes.truncate((blocks * 2048).max(64 << 10));
    Ok(bytes)
}

#[cfg(test)]
mod tests;
