//! `vmpod image commit`: an image of a pod's machine while it runs.
//!
//! The guest is asked to hold still: its file systems are frozen (`fsfreeze`) while the disk is copied, which is a moment where the
//! file system shares blocks and else as long as it takes to copy what the machine wrote. A guest that can't freeze writes out
//! what it has; the image then is what a power failure would have left, and that is said. A watchdog in the guest thaws it,
//! should this process die.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use vmpod_image::{CaptureOptions, DiskCopies, Image, Store, capture};

use crate::args;
use crate::build::disks;
use crate::client;
use crate::home::Home;
use crate::image;
use crate::output::{self, Progress, talk};
use crate::report::Remedy;

/// How long a guest gets to freeze.
const FREEZE: Duration = Duration::from_mins(1);

/// What the guest's shell does: freeze, say so, wait for a line, thaw. Root itself is frozen last and thawed first.
const HOLD: &str = r#"
[ "$(id -u)" = 0 ] || exec sudo -n sh -c "$0"
mounts=$(awk '$1 ~ /^\/dev\// && $4 ~ /^rw/ && !seen[$1]++ { print $2 }' /proc/mounts | sort -r)
sync
if [ -n "$mounts" ] && command -v fsfreeze >/dev/null; then
    thaw() { for m in $mounts; do fsfreeze -u "$m" 2>/dev/null; done; }
    (sleep 300; thaw) </dev/null >/dev/null 2>&1 & watchdog=$!
    frozen=
    for m in $mounts; do fsfreeze -f "$m" 2>/dev/null && frozen=1; done
    if [ -n "$frozen" ]; then echo frozen; else echo synced; fi
    read -r line
    thaw
    kill $watchdog 2>/dev/null
else
    echo synced
    read -r line
fi
echo done
"#;

/// Makes the image.
pub(crate) async fn run(home: &Home, store: &Store, args: &args::Commit) -> Result<()> {
    let name = image::reference(&args.name)?;
    let api: Api<Pod> = Api::namespaced(client::connect(home).await?, &args.namespace.namespace);
    let pod = client::pod(&api, &args.pod).await?;
    let uid = pod.metadata.uid.context("the pod has no UID")?;
    let (spec, base) = machine(home, store, &uid, &args.pod)?;
    let disks = disks(&spec);
    if disks.is_empty() {
        return Err(Remedy::new(
            format!("the machine of pod {} has no disk", args.pod),
            "commit a machine whose image has one",
        )
        .into());
    }
    let spinner = Progress::spinner("holding the guest still");
    let hold = if args.no_freeze { None } else { Some(Hold::take(&api, &args.pod).await?) };
    let frozen = hold.as_ref().is_some_and(|hold| hold.frozen);
    spinner.say("copying the disk");
    let copies = {
        let (store, disks) = (store.clone(), disks.clone());
        tokio::task::spawn_blocking(move || DiskCopies::make(&store, &disks)).await
    };
    let thawed = match hold {
        Some(hold) => hold.release().await,
        None => Ok(()),
    };
    spinner.clear();
    let copies = copies.context("copying the disk panicked")?.context("can't copy the machine's disk")?;
    if let Err(error) = thawed {
        tracing::warn!("the guest may stay frozen for up to five minutes: {error:#}");
    }
    if !frozen {
        talk("the guest could not be frozen: the image is as after a power failure");
    }
    let (meter, drawn) = image::draw("capturing".to_owned());
    let labels = args.label.iter().map(|label| (label.key.clone(), label.value.clone())).collect();
    let options = CaptureOptions { labels, progress: Some(meter) };
    let image = drawn.until(capture(store, &base, copies.disks(), &name, options)).await;
    let image = image.with_context(|| format!("can't make an image of pod {}", args.pod))?;
    talk(&format!("committed {} ({})", args.name, output::bytes(image.transfer_bytes)));
    output::data(&format!("{}\n", image.digest))
}

/// The machine of a pod that runs on this host, and the image that it was cloned from.
fn machine(home: &Home, store: &Store, uid: &str, pod: &str) -> Result<(vmpod_machine::Spec, Image)> {
    let machines = home.machines();
    let elsewhere = || {
        Remedy::new(
            format!("pod {pod} has no machine in {}", machines.display()),
            "commit it on the host that runs it, with that host's --home",
        )
    };
    let entries = std::fs::read_dir(&machines).with_context(|| format!("can't list {}", machines.display()))?;
    let mut newest: Option<(std::time::SystemTime, vmpod_machine::Spec)> = None;
    for entry in entries {
        let entry = entry.with_context(|| format!("can't list {}", machines.display()))?;
        if !entry.file_name().to_string_lossy().starts_with(uid) {
            continue;
        }
        // A restarted pod has the machines of its earlier attempts until they are removed.
        let Some(spec) = read_spec(&entry.path().join("spec.json"))? else { continue };
        let made = entry.metadata()?.modified()?;
        if newest.as_ref().is_none_or(|(time, _)| made > *time) {
            newest = Some((made, spec));
        }
    }
    let (_, spec) = newest.ok_or_else(elsewhere)?;
    let scope = vmpod_node::holder_scope(&machines);
    let holder = format!("{}@{scope}", spec.id);
    let holders = store.holders().context("can't read who holds images")?;
    let digest = holders.into_iter().find(|held| held.name == holder).map(|held| held.image);
    let base = match digest {
        Some(digest) => store.image(digest).context("can't look up the machine's image")?,
        None => None,
    };
    let base = base.with_context(|| format!("the image of machine {} is not in this store", spec.id))?;
    Ok((spec, base))
}

fn read_spec(path: &Path) -> Result<Option<vmpod_machine::Spec>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| format!("can't read {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

/// A guest that holds still.
struct Hold {
    process: AttachedProcess,
    /// Kept open: the guest's shell would end at a closed pipe.
    _output: Box<dyn AsyncBufRead + Send + Unpin>,
    frozen: bool,
}

impl Hold {
    async fn take(api: &Api<Pod>, pod: &str) -> Result<Self> {
        let params = AttachParams { stdin: true, stdout: true, stderr: false, ..AttachParams::default() };
        let command = ["sh", "-c", HOLD, HOLD].map(str::to_owned);
        let mut process =
            api.exec(pod, command, &params).await.with_context(|| format!("can't run a command in pod {pod}"))?;
        let output = process.stdout().context("the exec has no output")?;
        let mut out: Box<dyn AsyncBufRead + Send + Unpin> = Box::new(BufReader::new(output));
        let mut said = String::new();
        let read = tokio::time::timeout(FREEZE, out.read_line(&mut said)).await;
        read.with_context(|| format!("the guest of pod {pod} didn't hold still within {}", output::seconds(FREEZE)))?
            .context("the connection to the guest broke")?;
        match said.trim_end() {
            "frozen" => Ok(Self { process, _output: out, frozen: true }),
            "synced" => Ok(Self { process, _output: out, frozen: false }),
            other => {
                bail!("the guest of pod {pod} can't hold still (it said {other:?}); --no-freeze takes it as it is")
            }
        }
    }

    async fn release(mut self) -> Result<()> {
        let mut input = self.process.stdin().context("the exec has no input")?;
        input.write_all(b"go\n").await.context("the guest can't be told to go on")?;
        input.flush().await.context("the guest can't be told to go on")?;
        let status = self.process.take_status().context("the exec has no status")?;
        let status = tokio::time::timeout(FREEZE, status).await.context("the guest doesn't say that it goes on")?;
        let succeeded = status.and_then(|status| status.status).as_deref() == Some("Success");
        ensure!(succeeded, "the command that held the guest failed");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_shell_can_read_what_holds_a_guest() {
        for shell in ["dash", "bash"] {
            let status = std::process::Command::new(shell).args(["-n", "-c", super::HOLD]).status().unwrap();
            assert!(status.success(), "{shell}");
        }
    }
}
