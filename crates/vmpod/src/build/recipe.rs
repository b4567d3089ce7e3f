//! The file that `vmpod image build` reads.
//!
//! ```yaml
//! from: debian:12                 # an image of the store, or of a registry
//! size: 20Gi                      # the disk, if it is to be larger
//! cpus: 2
//! memory: 2Gi
//! userData: |                     # cloud-init, before the first step
//!   #cloud-config
//!   packages: [git]
//! steps:                          # in this order, as root
//!   - copy: {from: files/motd, to: /etc/motd, mode: "0644"}
//!   - run: apt-get install -y make
//!   - script: setup.sh
//!   - ansible: {playbook: site.yml, arguments: [--diff]}
//! seal: [machine-id, ssh-host-keys, cloud-init, logs, temporary, access]
//! trim: true                      # give back what was deleted
//! labels: {team: ci}
//! timeout: 30m                    # for all of it
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::args::{parse_size, values};

/// What to build, checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Recipe {
    pub(crate) from: String,
    /// Bytes.
    pub(crate) size: Option<u64>,
    pub(crate) cpus: u32,
    /// Bytes.
    pub(crate) memory: Option<u64>,
    pub(crate) user_data: Option<String>,
    pub(crate) steps: Vec<Step>,
    pub(crate) seal: Vec<Seal>,
    pub(crate) trim: bool,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) timeout: Duration,
}

/// One thing to do in the guest. Paths of this host are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// A file, or a directory and all in it.
    Copy { from: PathBuf, to: String, mode: Option<u32> },
    /// Shell, with `set -e`.
    Run(String),
    /// A file of shell, or of whatever its first line names.
    Script(PathBuf),
    /// `ansible-playbook` on this host, against the guest.
    Ansible { playbook: PathBuf, arguments: Vec<String> },
}

/// What is wiped at the end, so that every machine of the image is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Seal {
    MachineId,
    SshHostKeys,
    /// What cloud-init knows of this boot, so that it runs again.
    CloudInit,
    Logs,
    /// `/tmp`, `/var/tmp`, the package manager's downloads.
    Temporary,
    /// The key that opened the guest for the build.
    Access,
}

impl Seal {
    pub(crate) const ALL: [Self; 6] =
        [Self::MachineId, Self::SshHostKeys, Self::CloudInit, Self::Logs, Self::Temporary, Self::Access];
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Text {
    from: String,
    size: Option<String>,
    cpus: Option<u32>,
    memory: Option<String>,
    user_data: Option<String>,
    #[serde(default)]
    steps: Vec<TextStep>,
    seal: Option<Vec<Seal>>,
    trim: Option<bool>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum TextStep {
    Copy(TextCopy),
    Run(String),
    Script(PathBuf),
    Ansible(TextAnsible),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TextCopy {
    from: PathBuf,
    to: String,
    mode: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TextAnsible {
    playbook: PathBuf,
    #[serde(default)]
    arguments: Vec<String>,
}

impl Recipe {
    /// Reads a file. Paths in it are relative to it, and must be there: a build fails before it boots, not after.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = dir.canonicalize().with_context(|| format!("can't find {}", dir.display()))?;
        Self::parse(&text, &dir).with_context(|| format!("{} is no recipe for an image", path.display()))
    }

    fn parse(text: &str, dir: &Path) -> Result<Self> {
        let text: Text = serde_saphyr::from_str(text)?;
        let bytes = |what: &str, size: Option<String>| {
            let size = size.map(|size| parse_size(&size).map_err(|error| anyhow::anyhow!("{what}: {error}")));
            Ok::<_, anyhow::Error>(size.transpose()?.map(|size| size.bytes))
        };
        let steps = text
            .steps
            .into_iter()
            .enumerate()
            .map(|(index, step)| step_of(step, dir).with_context(|| format!("step {} can't be done", index + 1)));
        let recipe = Self {
            from: text.from,
            size: bytes("size", text.size)?,
            cpus: text.cpus.unwrap_or(2),
            memory: bytes("memory", text.memory)?,
            user_data: text.user_data,
            steps: steps.collect::<Result<_>>()?,
            seal: text.seal.unwrap_or_else(|| Seal::ALL.to_vec()),
            trim: text.trim.unwrap_or(true),
            labels: text.labels,
            timeout: match text.timeout {
                Some(timeout) => values::duration(&timeout).map_err(|error| anyhow::anyhow!("timeout: {error}"))?,
                None => Duration::from_hours(1),
            },
        };
        ensure!(recipe.cpus > 0, "cpus must be at least 1");
        ensure!(!recipe.from.trim().is_empty(), "from names no image");
        Ok(recipe)
    }
}

fn step_of(step: TextStep, dir: &Path) -> Result<Step> {
    let there = |path: PathBuf| {
        let path = dir.join(path);
        ensure!(path.exists(), "there is no {}", path.display());
        Ok(path)
    };
    Ok(match step {
        TextStep::Run(script) => Step::Run(script),
        TextStep::Script(path) => Step::Script(there(path)?),
        TextStep::Ansible(TextAnsible { playbook, arguments }) => {
            Step::Ansible { playbook: there(playbook)?, arguments }
        }
        TextStep::Copy(TextCopy { from, to, mode }) => {
            ensure!(to.starts_with('/'), "{to:?} is no absolute path in the guest");
            let mode = mode.map(|mode| {
                u32::from_str_radix(&mode, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .with_context(|| format!("{mode:?} is no file mode: octal digits such as \"0644\" are wanted"))
            });
            Step::Copy { from: there(from)?, to, mode: mode.transpose()? }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Recipe> {
        Recipe::parse(text, Path::new(env!("CARGO_MANIFEST_DIR")))
    }

    #[test]
    fn a_whole_recipe() {
        let recipe = parse(
            "from: debian:12\nsize: 20Gi\ncpus: 4\nmemory: 2Gi\nuserData: |\n  #cloud-config\n  packages: [git]\n\
             steps:\n- copy: {from: Cargo.toml, to: /etc/x, mode: \"0640\"}\n- run: |\n    echo a\n    echo b\n\
             - script: src/main.rs\n- ansible: {playbook: Cargo.toml, arguments: [--diff]}\n\
             seal: [machine-id, logs]\ntrim: false\nlabels: {team: ci}\ntimeout: 5m\n",
        )
        .unwrap();
        let at = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        assert_eq!(
            recipe.steps,
            [
                Step::Copy { from: at("Cargo.toml"), to: "/etc/x".to_owned(), mode: Some(0o640) },
                Step::Run("echo a\necho b\n".to_owned()),
                Step::Script(at("src/main.rs")),
                Step::Ansible { playbook: at("Cargo.toml"), arguments: vec!["--diff".to_owned()] },
            ]
        );
        assert_eq!((recipe.size, recipe.memory, recipe.cpus), (Some(20 << 30), Some(2 << 30), 4));
        assert_eq!((recipe.seal, recipe.trim), (vec![Seal::MachineId, Seal::Logs], false));
        assert_eq!(recipe.timeout, Duration::from_mins(5));
        assert_eq!(recipe.user_data.as_deref(), Some("#cloud-config\npackages: [git]\n"));
    }

    #[test]
    fn the_least_recipe_seals_everything() {
        let recipe = parse("from: debian").unwrap();
        assert_eq!((recipe.seal.as_slice(), recipe.trim, recipe.steps.len()), (&Seal::ALL[..], true, 0));
    }

    #[test]
    fn mistakes_are_told_before_anything_boots() {
        for (text, told) in [
            ("steps: []", "from"),
            ("from: x\nstep: []", "step"),
            ("from: x\nsteps: [{dance: now}]", "dance"),
            ("from: x\nsteps: [{script: no/such.sh}]", "there is no"),
            ("from: x\nsteps: [{copy: {from: Cargo.toml, to: relative}}]", "no absolute path"),
            ("from: x\nsteps: [{copy: {from: Cargo.toml, to: /x, mode: \"9\"}}]", "no file mode"),
            ("from: x\nsize: huge", "size"),
            ("from: x\nseal: [everything]", "everything"),
            ("from: x\ncpus: 0", "cpus"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
