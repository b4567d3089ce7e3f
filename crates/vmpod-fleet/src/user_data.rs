//! What a guest learns at its first boot: where its CI system is, the runner's token, and who it is.
//!
//! It holds the token, so it goes into a Secret, never into a Pod.

use std::fmt;

/// What a machine's user data may speak of.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    /// The CI system.
    pub url: &'a str,
    /// The token that runners of the pool use.
    pub token: &'a str,
    /// Who it is to the CI system: see [`system_id`].
    pub system_id: &'a str,
    /// The name of its Runner, for people.
    pub name: &'a str,
    /// After so many jobs it ends.
    pub jobs: u32,
}

impl fmt::Debug for Values<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values").field("url", &self.url).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A template can't be filled.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It uses a name that doesn't exist.
    #[error("the user data uses $(VMPOD_{name}), which doesn't exist; there are {names}", names = names())]
    Unknown {
        /// The name.
        name: String,
    },
}

const PREFIX: &str = "$(VMPOD_";

fn names() -> String {
    let all = ["PROVIDER_URL", "RUNNER_TOKEN", "SYSTEM_ID", "RUNNER_NAME", "MAX_JOBS"];
    all.map(|name| format!("$(VMPOD_{name})")).join(", ")
}

impl Values<'_> {
    fn value(&self, name: &str) -> Option<String> {
        Some(match name {
            // The first name was the only one while there was only one CI system.
            "PROVIDER_URL" | "GITLAB_URL" => self.url.to_owned(),
            "RUNNER_TOKEN" => self.token.to_owned(),
            "SYSTEM_ID" => self.system_id.to_owned(),
            "RUNNER_NAME" => self.name.to_owned(),
            "MAX_JOBS" => self.jobs.to_string(),
            _ => return None,
        })
    }
}

/// The `system_id` of a machine, made of its Runner's UID.
///
/// GitLab Runner takes one from its file only in this form: `r_` and twelve letters or digits.
#[must_use]
pub fn system_id(uid: &str) -> String {
    let letters: String = uid.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    format!("r_{letters:0<12}")
}

/// Puts a machine's values in place of `$(VMPOD_…)` in a pool's own user data. All else stays as it is.
pub fn fill(template: &str, values: &Values<'_>) -> Result<String, TemplateError> {
    let (mut filled, mut rest) = (String::with_capacity(template.len() + 256), template);
    while let Some((before, after)) = rest.split_once(PREFIX) {
        let name: String = after.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
        let value = values.value(&name).filter(|_| after[name.len()..].starts_with(')'));
        let Some(value) = value else { return Err(TemplateError::Unknown { name }) };
        filled.push_str(before);
        filled.push_str(&value);
        rest = &after[name.len() + 1..];
    }
    filled.push_str(rest);
    Ok(filled)
}

/// User data for an image that has cloud-init and GitLab Runner: it takes its jobs and then switches the machine off.
#[must_use]
pub fn standard(values: &Values<'_>) -> String {
    // Strings of TOML and YAML may be written as JSON's.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (name, url, token) = (quoted(values.name), quoted(values.url), quoted(values.token));
    let (system_id, jobs) = (quoted(values.system_id), values.jobs);
    format!(
        r#"#cloud-config
write_files:
  - path: /etc/gitlab-runner/config.toml
    permissions: "0600"
    content: |
      concurrent = 1
      [[runners]]
        name = {name}
        url = {url}
        token = {token}
        executor = "shell"
  - path: /etc/gitlab-runner/.runner_system_id
    permissions: "0600"
    content: {system_id}
  - path: /etc/systemd/system/vmpod-runner.service
    content: |
      [Unit]
      After=network-online.target
      Wants=network-online.target
      [Service]
      ExecStart=gitlab-runner run-single -c /etc/gitlab-runner/config.toml -r {name} --max-builds {jobs} --wait-timeout 0
      ExecStopPost=systemctl poweroff --no-block
      KillSignal=SIGQUIT
      TimeoutStopSec=infinity
runcmd:
  - [systemctl, daemon-reload]
  - [systemctl, start, --no-block, vmpod-runner.service]
"#
    )
}

/// The same for a guest that reads no seed: a script, of which the machine's end is the end. macOS has no init system that would
/// take it, and Homebrew's programs aren't on its usual path.
///
/// Told to end, GitLab Runner would break off its job; SIGQUIT lets it finish.
pub const SCRIPT: &str = r#"#!/bin/sh
umask 077
PATH=$PATH:/opt/homebrew/bin:/usr/local/bin
export PATH
dir=$(mktemp -d) || exit 1
cat >"$dir/config.toml" <<'VMPOD' || exit 1
concurrent = 1
[[runners]]
  name = "$(VMPOD_RUNNER_NAME)"
  url = "$(VMPOD_PROVIDER_URL)"
  token = "$(VMPOD_RUNNER_TOKEN)"
  executor = "shell"
VMPOD
printf '%s' '$(VMPOD_SYSTEM_ID)' >"$dir/.runner_system_id"
gitlab-runner run-single -c "$dir/config.toml" -r '$(VMPOD_RUNNER_NAME)' --max-builds $(VMPOD_MAX_JOBS) --wait-timeout 0 &
runner=$!
trap 'kill -QUIT "$runner" 2>/dev/null' TERM INT HUP
while :; do
    wait "$runner"
    code=$?
    # A signal ends the wait, and not the runner.
    kill -0 "$runner" 2>/dev/null || exit "$code"
done
"#;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MACHINE: Values<'static> = Values {
        url: "https://gitlab.example.com",
        token: "glrt-secret",
        system_id: "r_0123456789ab",
        name: "large-x2x4",
        jobs: 1,
    };

    #[test]
    fn a_template_gets_the_machines_values_and_nothing_else() {
        let text = "#!/bin/sh\nagent --token=$(VMPOD_RUNNER_TOKEN) --id '$(VMPOD_SYSTEM_ID)' $(date) $VMPOD_X\n";
        let filled = fill(text, &MACHINE).unwrap();
        assert_eq!(filled, "#!/bin/sh\nagent --token=glrt-secret --id 'r_0123456789ab' $(date) $VMPOD_X\n");
        assert_eq!(fill("$(VMPOD_GITLAB_URL)", &MACHINE), fill("$(VMPOD_PROVIDER_URL)", &MACHINE));
        let error = fill("$(VMPOD_TOKEN)", &MACHINE).unwrap_err();
        assert!(error.to_string().contains("$(VMPOD_TOKEN)") && error.to_string().contains("$(VMPOD_RUNNER_TOKEN)"));
    }

    /// The script, with a `gitlab-runner` of two lines, as a guest would run it.
    #[test]
    fn the_script_lets_a_job_finish_when_it_is_told_to_end() {
        use std::io::Read as _;
        use std::os::unix::fs::PermissionsExt as _;
        use std::process::{Command, Stdio};

        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
            path
        };
        // Its job ends a while after it was told to quit; TERM would end it at once. As a Go program does, it hears signals that its shell
        // has turned off for what runs beside it.
        write(
            "gitlab-runner",
            "#!/usr/bin/env python3\n\
             import os, signal, sys, time\n\
             config = sys.argv[3]\n\
             for name in (config, os.path.join(os.path.dirname(config), '.runner_system_id')): print(open(name).read())\n\
             print(*sys.argv[1:])\n\
             def quit(*_): time.sleep(0.2); print('the job is done', flush=True); sys.exit(0)\n\
             signal.signal(signal.SIGQUIT, quit)\n\
             print('runs', flush=True)\n\
             while True: time.sleep(0.05)\n",
        );
        let script = write("script", &fill(SCRIPT, &MACHINE).unwrap());
        let path = std::env::join_paths(
            [dir.path().to_owned()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        )
        .unwrap();
        let mut child = Command::new(script)
            .env_clear()
            .env("PATH", path)
            .env("TMPDIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut text = String::new();
        while !text.contains("runs\n") {
            let mut piece = [0; 512];
            let length = output.read(&mut piece).unwrap();
            assert!(length > 0, "{text}");
            text.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        output.read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success(), "{text}");
        assert!(text.ends_with("the job is done\n"), "{text}");
        assert!(text.contains("token = \"glrt-secret\"") && text.contains("\nr_0123456789ab"), "{text}");
        assert!(text.contains("-r large-x2x4 --max-builds 1 --wait-timeout 0"), "{text}");
    }

    #[test]
    fn the_standard_one_is_cloud_config_that_runs_one_machines_jobs() {
        let text = standard(&MACHINE);
        assert!(text.starts_with("#cloud-config\n"));
        insta::assert_snapshot!(text);
    }

    proptest! {
        #[test]
        fn a_system_id_has_the_form_that_gitlab_runner_takes(uid in "[ -~]{0,60}") {
            let id = system_id(&uid);
            let letters = id.strip_prefix("r_").unwrap();
            prop_assert!(letters.len() == 12 && letters.chars().all(|c| c.is_ascii_alphanumeric()));
        }

        #[test]
        fn any_template_is_filled_or_refused(text in "[ -~\n]{0,80}", at in 0_usize..80) {
                let at = at.min(text.len());
            let text = format!("{}$(VMPOD_{}", &text[..at], &text[at..]);
            drop(fill(&text, &MACHINE));
        }
    }
}
