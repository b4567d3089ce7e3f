//! What configures a machine after its guest answers: a container beside it, and what that is told. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, ObjectFieldSelector,
    Pod, PodSpec, Secret, SecretKeySelector, SecretVolumeSource, Volume, VolumeMount,
};
use serde_json::{Map, Value, json};
use vmpod_api::annotations;
use vmpod_api::provision::{Connection, GitRepository, Provision};

use crate::objects;
use crate::user_data::Values;

/// The name of the container, and of the volume with what it is told.
pub const NAME: &str = "provision";
/// The container that fetches a playbook, and the volume that it puts it into.
const PLAYBOOK: &str = "playbook";
/// Where that is in the container.
const TOLD: &str = "/vmpod/provision";
const PLAYBOOKS: &str = "/vmpod/playbook";
/// Where a machine listens for SSH, as the containers beside it see it: `docs/sidecars.md`.
const SSH_PORT: u16 = 2222;
/// Where Windows listens for Windows Remote Management over HTTPS.
const WINRM_PORT: u16 = 5986;
/// A key of a login's Secret, as Kubernetes' own types of Secrets have it.
const USERNAME: &str = "username";
const PASSWORD: &str = "password";
/// The same for a private key.
pub const PRIVATE_KEY: &str = "ssh-privatekey";

/// Runs the command of its arguments, and again as often as `$0` says.
///
/// What it prints goes on without the secrets that it was told: the log, and its end in statuses and events, are read by more people
/// than Secrets. The first process of a container hears of no end unless it listens, and a shell listens only while it waits.
const RUN: &str = r#"trap 'exit 143' TERM INT
token= password=
[ ! -r "$VMPOD_PROVISION/runner-token" ] || IFS= read -r token <"$VMPOD_PROVISION/runner-token" || :
[ ! -r "$VMPOD_PROVISION/password" ] || IFS= read -r password <"$VMPOD_PROVISION/password" || :
scrub() {
    while IFS= read -r line || [ -n "$line" ]; do
        for secret in "$token" "$password"; do
            [ -n "$secret" ] || continue
            rest=$line line=
            while :; do
                case $rest in
                *"$secret"*) line="$line${rest%%"$secret"*}(secret)" rest=${rest#*"$secret"} ;;
                *) break ;;
                esac
            done
            line=$line$rest
        done
        printf '%s\n' "$line"
    done
}
exec 4>&1
{
    tried=0
    while :; do
        code=$({ { "$@" 3>&- 4>&-; echo "$?" >&3; } 2>&1 | scrub >&4; } 3>&1)
        [ "$code" != 0 ] && [ "$tried" -lt "$0" ] || exit "$code"
        tried=$((tried + 1))
        echo "vmpod: it ended with $code; try $tried of $0 more begins in 10 s" >&4
        sleep 10
    done
} &
wait "$!""#;

/// Clones a repository. Its password is in the environment, which no command line shows.
const CLONE: &str = r#"trap 'exit 143' TERM INT
set -- clone --quiet --depth 1 ${VMPOD_GIT_REFERENCE:+--branch "$VMPOD_GIT_REFERENCE"} -- "$VMPOD_GIT_URL" /vmpod/playbook
if [ -n "${VMPOD_GIT_PASSWORD:-}" ]; then
    set -- -c 'credential.helper=!f() { echo "username=$VMPOD_GIT_USERNAME"; echo "password=$VMPOD_GIT_PASSWORD"; }; f' "$@"
fi
GIT_TERMINAL_PROMPT=0 git "$@" &
wait "$!""#;

/// A way into a guest.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user, when it isn't the image's.
    pub user: Option<String>,
    /// What proves it.
    pub proof: Proof,
}

/// What a user of a guest has to show. It is secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Proof {
    /// A password.
    Password(String),
    /// A private key in OpenSSH's format.
    Key(String),
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Login {
    /// The login that a Secret holds; none when there is neither key nor password in it.
    #[must_use]
    pub fn of(secret: &Secret) -> Option<Self> {
        let text = |key: &str| String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok();
        let proof = text(PRIVATE_KEY).map(Proof::Key).or_else(|| text(PASSWORD).map(Proof::Password))?;
        Some(Self { user: text(USERNAME), proof })
    }
}

/// What the container finds in its directory: an inventory with everything, and each value in a file of its own.
#[must_use]
pub fn told(provision: &Provision, login: &Login, values: &Values<'_>) -> BTreeMap<String, String> {
    let user = login.user.as_ref().or(provision.user.as_ref());
    let mut files = BTreeMap::from([
        ("provider-url", values.url.to_owned()),
        ("runner-token", values.token.to_owned()),
        ("system-id", values.system_id.to_owned()),
        ("runner-name", values.name.to_owned()),
        ("max-jobs", values.jobs.to_string()),
    ]);
    let mut host = Map::new();
    let mut tell = |name: &str, value: Value| drop(host.insert(name.to_owned(), value));
    for (name, value) in &provision.variables {
        tell(name, value.as_str().into());
    }
    for (name, value) in &files {
        tell(&format!("vmpod_{}", name.replace('-', "_")), value.as_str().into());
    }
    tell("ansible_host", "{{ lookup('env', 'VMPOD_MACHINE') }}".into());
    tell("ansible_port", port(provision).into());
    tell("ansible_user", user.map_or("root", String::as_str).into());
    match provision.connection {
        Connection::Ssh => {
            tell("ansible_connection", "ssh".into());
            // The machine is as new as its key, and on a network with nobody else.
            let trust = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
            tell("ansible_ssh_common_args", trust.into());
        }
        Connection::Winrm => {
            tell("ansible_connection", "winrm".into());
            tell("ansible_winrm_scheme", "https".into());
            tell("ansible_winrm_transport", "ntlm".into());
            tell("ansible_winrm_server_cert_validation", "ignore".into());
        }
    }
    match &login.proof {
        Proof::Password(password) => {
            tell("ansible_password", password.as_str().into());
            files.insert(PASSWORD, password.clone());
        }
        Proof::Key(pem) => {
            tell("ansible_ssh_private_key_file", format!("{TOLD}/{PRIVATE_KEY}").into());
            files.insert(PRIVATE_KEY, pem.clone());
        }
    }
    if let Some(user) = user {
        files.insert(USERNAME, user.clone());
    }
    // JSON is YAML.
    files.insert("inventory.yml", json!({"all": {"hosts": {"machine": host}}}).to_string());
    files.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn port(provision: &Provision) -> u16 {
    match provision.connection {
        Connection::Ssh => SSH_PORT,
        Connection::Winrm => provision.port.unwrap_or(WINRM_PORT),
    }
}

/// Adds the container to a runner's pod. `secret` is the Secret with what it is [`told`].
pub fn add(pod: &mut Pod, provision: &Provision, secret: &str) {
    let notes = pod.metadata.annotations.get_or_insert_default();
    notes.insert(annotations::AFTER_MACHINE.to_owned(), NAME.to_owned());
    notes.insert(annotations::GUEST_LOGIN_SECRET.to_owned(), secret.to_owned());
    let Some(spec) = &mut pod.spec else { return };
    if provision.connection == Connection::Winrm
        && let Some(machine) = spec.containers.first_mut()
    {
        let port = ContainerPort { container_port: port(provision).into(), ..ContainerPort::default() };
        machine.ports.get_or_insert_default().push(port);
    }
    let mut mounts = vec![mount(NAME, TOLD)];
    let source = SecretVolumeSource {
        secret_name: Some(secret.to_owned()),
        // SSH clients take no key that others may read.
        default_mode: Some(0o400),
        ..SecretVolumeSource::default()
    };
    let volumes = spec.volumes.get_or_insert_default();
    volumes.push(Volume { name: NAME.to_owned(), secret: Some(source), ..Volume::default() });
    let mut command = provision.command.clone();
    if let Some(playbook) = &provision.playbook {
        let mut volume = Volume { name: PLAYBOOK.to_owned(), ..Volume::default() };
        if let Some(git) = &playbook.git {
            volume.empty_dir = Some(EmptyDirVolumeSource::default());
            spec.init_containers.get_or_insert_default().push(clone(&provision.image, git));
        } else {
            let name = playbook.config_map_ref.as_ref().map(|map| map.name.clone()).unwrap_or_default();
            volume.config_map = Some(ConfigMapVolumeSource { name, ..ConfigMapVolumeSource::default() });
        }
        volumes.push(volume);
        mounts.push(mount(PLAYBOOK, PLAYBOOKS));
        let words = ["ansible-playbook", "-i", "/vmpod/provision/inventory.yml"];
        command = words.map(str::to_owned).to_vec();
        command.push(format!("{PLAYBOOKS}/{}", playbook.file));
    }
    let runner = ["/bin/sh", "-c", RUN].map(str::to_owned).into_iter();
    let command = runner.chain([provision.retries.to_string()]).chain(command).collect();
    let field = ObjectFieldSelector { field_path: "status.podIP".to_owned(), ..ObjectFieldSelector::default() };
    let address = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    spec.containers.push(Container {
        name: NAME.to_owned(),
        image: Some(provision.image.clone()),
        command: Some(command),
        env: Some(vec![
            EnvVar { name: "VMPOD_MACHINE".to_owned(), value_from: Some(address), ..EnvVar::default() },
            plain("VMPOD_MACHINE_PORT", &port(provision).to_string()),
            plain("VMPOD_PROVISION", TOLD),
            plain("ANSIBLE_FORCE_COLOR", "0"),
            plain("PYTHONUNBUFFERED", "1"),
        ]),
        // The end of its log is why a runner failed.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    });
}

/// The init container that fetches a playbook: without it no machine is made.
fn clone(image: &str, git: &GitRepository) -> Container {
    let mut env = vec![plain("VMPOD_GIT_URL", &git.url)];
    env.extend(git.reference.as_deref().map(|reference| plain("VMPOD_GIT_REFERENCE", reference)));
    if let Some(secret) = &git.secret_ref {
        for (name, key) in [("VMPOD_GIT_USERNAME", USERNAME), ("VMPOD_GIT_PASSWORD", PASSWORD)] {
            let key = SecretKeySelector { name: secret.name.clone(), key: key.to_owned(), optional: None };
            let source = EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() };
            env.push(EnvVar { name: name.to_owned(), value_from: Some(source), ..EnvVar::default() });
        }
    }
    Container {
        name: PLAYBOOK.to_owned(),
        image: Some(image.to_owned()),
        command: Some(["/bin/sh", "-c", CLONE].map(str::to_owned).to_vec()),
        env: Some(env),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(vec![mount(PLAYBOOK, PLAYBOOKS)]),
        ..Container::default()
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.to_owned(), mount_path: path.to_owned(), ..VolumeMount::default() }
}

fn plain(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

/// How far a guest's provisioning is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It hasn't ended; why it doesn't run, if that matters.
    Open(Option<String>),
    /// It succeeded.
    Done,
    /// It failed for good, and why.
    Failed(String),
}

/// How far a pod's provisioning is; none when it has none.
#[must_use]
pub fn progress(pod: &Pod) -> Option<Progress> {
    let has = |spec: &PodSpec| spec.containers.iter().skip(1).any(|container| container.name == NAME);
    if !pod.spec.as_ref().is_some_and(has) {
        return None;
    }
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let Some(status) = statuses.iter().find(|status| status.name == NAME) else { return Some(Progress::Open(None)) };
    let Some(state) = &status.state else { return Some(Progress::Open(None)) };
    Some(match (&state.terminated, &state.waiting) {
        (Some(ended), _) if ended.exit_code == 0 => Progress::Done,
        (Some(ended), _) => {
            let said = ended.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
            Progress::Failed(match said {
                Some(said) => format!("it ended with {}: {said}", ended.exit_code),
                None => format!("it ended with {}", ended.exit_code),
            })
        }
        (None, Some(waiting)) => Progress::Open(objects::trouble(waiting)),
        (None, None) => Progress::Open(None),
    })
}

/// Whether the container of a pod's machine is ready: the pod as a whole is not, once its provisioning has ended.
#[must_use]
pub fn machine_ready(pod: &Pod) -> bool {
    let machine = pod.spec.as_ref().and_then(|spec| spec.containers.first()).map(|container| &container.name);
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    statuses.iter().any(|status| Some(&status.name) == machine && status.ready)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn provision(fields: Value) -> Provision {
        let mut all =
            json!({"image": "registry.example.com/ansible:10", "playbook": {"configMapRef": {"name": "windows"}}});
        if let (Some(all), Value::Object(fields)) = (all.as_object_mut(), fields) {
            all.extend(fields);
        }
        serde_json::from_value(all).unwrap()
    }

    const VALUES: Values<'static> = Values {
        url: "https://gitlab.example.com",
        token: "glrt-\"quoted\"",
        system_id: "r_0123456789ab",
        name: "large-x2x4",
        jobs: 1,
    };

    fn added(provision: &Provision) -> Pod {
        let mut pod: Pod = serde_json::from_value(json!({"metadata": {"name": "large-x2x4"},
            "spec": {"containers": [{"name": "runner", "image": "windows:2022"}]}}))
        .unwrap();
        add(&mut pod, provision, "large-x2x4");
        pod
    }

    #[test]
    fn a_playbook_of_a_config_map_runs_in_a_container_of_its_own() {
        insta::assert_json_snapshot!(added(&provision(json!({}))));
    }

    #[test]
    fn a_playbook_of_a_repository_is_fetched_first() {
        let git =
            json!({"url": "https://git.example.com/ci/plays.git", "reference": "v1", "secretRef": {"name": "git"}});
        let pod =
            added(&provision(json!({"playbook": {"file": "windows/site.yml", "git": git}, "connection": "winrm"})));
        let spec = pod.spec.unwrap();
        insta::assert_json_snapshot!(spec.init_containers);
        assert!(spec.volumes.unwrap()[1].empty_dir.is_some());
        assert_eq!(spec.containers[0].ports.as_ref().unwrap()[0].container_port, 5986);
        let command = spec.containers[1].command.clone().unwrap();
        assert_eq!(command.last().unwrap(), "/vmpod/playbook/windows/site.yml");
    }

    #[test]
    fn the_inventory_has_the_way_in_and_who_the_runner_is() {
        let key = Login { user: None, proof: Proof::Key("PEM".to_owned()) };
        let files = told(&provision(json!({"variables": {"edition": "2022"}, "user": "debian"})), &key, &VALUES);
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "inventory.yml",
                "max-jobs",
                "provider-url",
                "runner-name",
                "runner-token",
                "ssh-privatekey",
                "system-id",
                "username"
            ]
        );
        let read: Value = serde_json::from_str(&files["inventory.yml"]).unwrap();
        insta::assert_json_snapshot!(read);
        let password = Login { user: Some("Administrator".to_owned()), proof: Proof::Password("hunter2".to_owned()) };
        let files = told(&provision(json!({"connection": "winrm"})), &password, &VALUES);
        let read: Value = serde_json::from_str(&files["inventory.yml"]).unwrap();
        let host = &read["all"]["hosts"]["machine"];
        assert_eq!((&host["ansible_user"], &host["ansible_port"]), (&json!("Administrator"), &json!(5986)));
        assert_eq!(host["ansible_password"], "hunter2");
        assert!(!format!("{password:?}").contains("hunter2"));
    }

    /// The script as a shell runs it, with a `sleep` that doesn't.
    fn shell(dir: &std::path::Path, retries: &str, words: &[&str]) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("sleep() {{ :; }}\n{RUN}"), retries]).args(words);
        command.current_dir(dir).env("VMPOD_PROVISION", dir);
        command
    }

    #[test]
    fn it_is_tried_again_as_often_as_it_says() {
        let run = |fails: &str, retries: &str| {
            let dir = tempfile::tempdir().unwrap();
            let step = r#"echo x >>tries; [ "$(wc -l <tries)" -gt "$1" ] || exit 7"#;
            let done = shell(dir.path(), retries, &["/bin/sh", "-c", step, "step", fails]).output().unwrap();
            let tries = std::fs::read_to_string(dir.path().join("tries")).unwrap().lines().count();
            (done.status.code().unwrap(), tries)
        };
        assert_eq!(run("0", "2"), (0, 1));
        assert_eq!(run("2", "2"), (0, 3));
        assert_eq!(run("3", "2"), (7, 3));
        assert_eq!(run("1", "0"), (7, 1));
    }

    #[test]
    fn what_it_prints_has_no_secret_in_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("runner-token"), "glrt-a*b").unwrap();
        std::fs::write(dir.path().join("password"), "hunter2").unwrap();
        let step = r"echo 'url --token=glrt-a*b --token=glrt-a*b glrt-aXb'; echo 'hunter2 \ end' >&2; printf last";
        let done = shell(dir.path(), "0", &["/bin/sh", "-c", step]).output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        assert_eq!(text, "url --token=(secret) --token=(secret) glrt-aXb\n(secret) \\ end\nlast\n");
        assert!(done.status.success() && done.stderr.is_empty());
    }

    #[test]
    fn it_ends_when_it_is_told_to() {
        use std::io::Read as _;
        use std::os::unix::process::CommandExt as _;
        let dir = tempfile::tempdir().unwrap();
        let mut command = shell(dir.path(), "2", &["/bin/sh", "-c", "echo runs; exec sleep 60"]);
        let mut child = command.stdout(std::process::Stdio::piped()).process_group(0).spawn().unwrap();
        let mut said = [0; 5];
        child.stdout.take().unwrap().read_exact(&mut said).unwrap();
        let began = std::time::Instant::now();
        assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(143));
        assert!(began.elapsed() < std::time::Duration::from_secs(30));
        // In a container all that it started ends with the first process; here somebody has to see to that.
        let group = format!("-{}", child.id());
        assert!(Command::new("kill").args(["-KILL", "--", &group]).status().unwrap().success());
    }

    #[test]
    fn its_progress_is_read_from_the_pod() {
        let read = |state: Value| {
            let mut pod = added(&provision(json!({})));
            pod.status = serde_json::from_value(json!({"containerStatuses": [
                {"name": "runner", "image": "", "imageID": "", "ready": true, "restartCount": 0},
                {"name": "provision", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]}))
            .unwrap();
            assert!(machine_ready(&pod));
            progress(&pod).unwrap()
        };
        assert_eq!(read(json!({"waiting": {"reason": "WaitingForMachine", "message": "x"}})), Progress::Open(None));
        assert_eq!(
            read(json!({"waiting": {"reason": "ErrImagePull", "message": "no"}})),
            Progress::Open(Some("ErrImagePull: no".to_owned()))
        );
        assert_eq!(read(json!({"running": {}})), Progress::Open(None));
        assert_eq!(read(json!({"terminated": {"exitCode": 0}})), Progress::Done);
        assert_eq!(
            read(json!({"terminated": {"exitCode": 2, "message": "fatal: [machine]\n"}})),
            Progress::Failed("it ended with 2: fatal: [machine]".to_owned())
        );
        let pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        assert_eq!(progress(&pod), None);
    }
}
