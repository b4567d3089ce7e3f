//! Whether a pod's machine boots or goes on from a template, and the making of templates.
//!
//! ```text
//!  pod ─▶ choose ─▶ template there ─▶ restore ─▶ (fails) ─▶ boot, once
//!            │ none                                 ▲
//!            ├─ auto ─▶ boot, and ask for one ──────┼──▶ keeper: waits until the node is quiet, makes it
//!            └─ snapshot ─▶ make one now ───────────┘
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{OnceCell, mpsc};
use vmpod_api::{annotations, labels};
use vmpod_image::{Digest, Store};
use vmpod_machine::{
    Accel, Disk, DiskFormat, GuestState, MachineId, Machines, SeedForm, Snapshot, Spec, State, Template, TemplateError,
    TemplateId, TemplateKey, Templates, template::surplus,
};

use crate::{
    error_chain,
    events::{Events, Kind},
    holders, pod,
    world::World,
};

/// What machines that make templates are called.
const MACHINE_PREFIX: &str = "template-";
/// How long a template that couldn't be made isn't tried again for `auto`.
const FORGET_REFUSAL: SignedDuration = SignedDuration::from_hours(1);
/// How long the node may be too busy until a wish for a template is dropped; the next pod wishes again.
const WISH: Duration = Duration::from_mins(15);

/// How a pod's machine is to start: the annotation `vmpod.dev/start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Start {
    /// From a template where there is one; else it boots, and a template is made when the node is quiet.
    #[default]
    Auto,
    /// It boots.
    Boot,
    /// From a template, which is made first if need be.
    Snapshot,
}

impl Start {
    /// What a pod asks for; an error for a word that isn't known.
    pub(crate) fn of(pod: &Pod) -> Result<Self, String> {
        match pod::annotation(pod, annotations::START) {
            None | Some("auto") => Ok(Self::Auto),
            Some("boot") => Ok(Self::Boot),
            Some("snapshot") => Ok(Self::Snapshot),
            Some(other) => Err(other.to_owned()),
        }
    }
}

/// What to do for one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    /// Boot; the reason is for the pod's events, when the pod asked for something else.
    Boot(Option<String>),
    /// Boot, and have a template made meanwhile.
    BootAndWish,
    /// Go on from the template that is there.
    Restore,
    /// Make a template first.
    Make,
}

/// What is known when it is chosen.
#[derive(Clone, Debug)]
struct Known<'a> {
    start: Start,
    /// Why this machine can't come from a template, if it can't.
    unfit: Option<&'a str>,
    /// The image says that its guest takes a new identity.
    renewable: bool,
    /// A template is there.
    there: bool,
    /// Why none could be made a while ago.
    refused: Option<&'a str>,
}

fn choose(known: &Known<'_>) -> Choice {
    match (known.start, known.unfit, known.there) {
        (Start::Boot, ..) | (Start::Auto, Some(_), _) => Choice::Boot(None),
        (Start::Snapshot, Some(why), _) => Choice::Boot(Some(why.to_owned())),
        (_, None, true) => Choice::Restore,
        (Start::Snapshot, None, false) => match known.refused {
            Some(why) => Choice::Boot(Some(why.to_owned())),
            None => Choice::Make,
        },
        (Start::Auto, None, false) if known.renewable && known.refused.is_none() => Choice::BootAndWish,
        (Start::Auto, None, false) => Choice::Boot(None),
    }
}

/// A template that somebody would have liked.
#[derive(Debug)]
struct Wish {
    key: TemplateKey,
    /// The machine that booted instead.
    spec: Spec,
    image: Digest,
}

/// What a pod's machine is, as far as this module cares.
pub(crate) struct Candidate<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) image: Digest,
    pub(crate) image_labels: &'a BTreeMap<String, String>,
    /// Sizes of the disks in bytes.
    pub(crate) disks: Vec<u64>,
    /// A restore of this machine failed already.
    pub(crate) boots: bool,
}

/// The templates of this node.
pub(crate) struct Snapshots {
    templates: Templates,
    machines: Machines,
    store: Store,
    events: Events,
    scope: String,
    accel: Accel,
    budget: u64,
    hypervisor: OnceCell<Option<String>>,
    /// One template is made at a time.
    making: tokio::sync::Mutex<()>,
    refused: Mutex<HashMap<TemplateId, (String, Timestamp)>>,
    wishes: mpsc::Sender<Wish>,
    queue: Mutex<Option<mpsc::Receiver<Wish>>>,
}

/// What [`Snapshots::open`] needs.
pub(crate) struct Parts {
    pub(crate) dir: std::path::PathBuf,
    pub(crate) machines: Machines,
    pub(crate) store: Store,
    pub(crate) events: Events,
    pub(crate) scope: String,
    pub(crate) accel: Accel,
    /// Bytes that templates may take.
    pub(crate) budget: u64,
}

impl Snapshots {
    pub(crate) fn open(parts: Parts) -> Result<Self, TemplateError> {
        let templates = Templates::open(parts.dir, parts.machines.clone())?;
        let (wishes, queue) = mpsc::channel(16);
        Ok(Self {
            templates,
            machines: parts.machines,
            store: parts.store,
            events: parts.events,
            scope: parts.scope,
            accel: parts.accel,
            budget: parts.budget,
            hypervisor: OnceCell::new(),
            making: tokio::sync::Mutex::default(),
            refused: Mutex::default(),
            wishes,
            queue: Mutex::new(Some(queue)),
        })
    }

    /// The machines in whose names templates hold their images.
    pub(crate) fn holders(&self) -> Vec<MachineId> {
        let all = self.templates.list().unwrap_or_else(|error| {
            tracing::warn!(error = error_chain(&error), "the templates can't be read");
            Vec::new()
        });
        all.iter().filter_map(|template| template.key.machine().ok()).collect()
    }

    /// Decides how a machine starts, and describes it so. Whatever goes wrong with templates, the machine boots.
    /// `unwanted` comes when the pod is to stop: no template is waited for then.
    pub(crate) async fn choose(
        &self,
        candidate: Candidate<'_>,
        spec: Spec,
        unwanted: impl Future<Output = ()>,
    ) -> Spec {
        let Candidate { pod, image, image_labels, disks, boots } = candidate;
        let start = if boots { Start::Boot } else { Start::of(pod).unwrap_or_default() };
        if start == Start::Boot {
            return spec;
        }
        let Some(hypervisor) = self.hypervisor().await else {
            if start == Start::Snapshot {
                self.tell_unavailable(pod, "this node's hypervisor takes no memory snapshots");
            }
            return spec;
        };
        let key = TemplateKey {
            image: image.to_string(),
            scope: scope(pod),
            cpus: spec.cpus,
            memory: spec.memory,
            arch: spec.arch,
            accel: spec.accel,
            hypervisor,
            disks,
            networks: spec.networks.len(),
        };
        let refused = self.refusal(&key.id());
        let mut template = self.find(pod, &key).await;
        let known = Known {
            start,
            unfit: unfit(&spec),
            renewable: image_labels.get(labels::RENEWABLE).is_some_and(|value| value == "true"),
            there: template.is_some(),
            refused: refused.as_deref(),
        };
        match choose(&known) {
            Choice::Boot(why) => {
                if let Some(why) = why {
                    self.tell_unavailable(pod, &why);
                }
                return spec;
            }
            Choice::BootAndWish => {
                // A full queue is a busy node; the next pod wishes again.
                self.wishes.try_send(Wish { key, spec: spec.clone(), image }).ok();
                return spec;
            }
            Choice::Restore => {}
            Choice::Make => {
                let what = "Making a memory snapshot of the image for this machine's size";
                self.events.container(pod, Kind::Normal, "SnapshotMaking", what);
                match self.make(Wish { key, spec: spec.clone(), image }, unwanted).await {
                    Some(Ok(made)) => template = Some(made),
                    Some(Err(error)) => self.tell_unavailable(pod, &error_chain(&error)),
                    None => {}
                }
            }
        }
        let Some(template) = template else { return spec };
        match self.on(&template, spec.clone()).await {
            Ok(spec) => {
                let what = "The machine goes on from a memory snapshot of its image";
                self.events.container(pod, Kind::Normal, "SnapshotUsed", what);
                spec
            }
            Err(why) => {
                self.tell_unavailable(pod, &why);
                spec
            }
        }
    }

    async fn hypervisor(&self) -> Option<String> {
        self.hypervisor.get_or_init(|| self.machines.snapshots(self.accel)).await.clone()
    }

    fn tell_unavailable(&self, pod: &Pod, why: &str) {
        let text = format!("The machine boots instead of going on from a memory snapshot: {why}");
        self.events.container(pod, Kind::Warning, "SnapshotUnavailable", text);
    }

    async fn find(&self, pod: &Pod, key: &TemplateKey) -> Option<Template> {
        let (templates, wanted) = (self.templates.clone(), key.clone());
        let found = tokio::task::spawn_blocking(move || templates.find(&wanted)).await;
        match found {
            Ok(Ok(template)) => template,
            Ok(Err(error)) => {
                self.tell_unavailable(pod, &error_chain(&error));
                None
            }
            Err(error) => {
                self.tell_unavailable(pod, &error.to_string());
                None
            }
        }
    }

    /// The machine on top of a template: its disks become overlays of the template's.
    async fn on(&self, template: &Template, mut spec: Spec) -> Result<Spec, String> {
        if template.disks.len() != spec.disks.len() {
            return Err("the template has another number of disks".to_owned());
        }
        let into = self.machines.directory(&spec.id).map_err(|error| error_chain(&error))?;
        let (bases, sizes) = (template.disks.clone(), template.key.disks.clone());
        let disks = tokio::task::spawn_blocking(move || {
            let made = bases.iter().zip(sizes).enumerate().map(|(index, (base, size))| {
                let format = match base.format {
                    DiskFormat::Raw => vmpod_image::DiskFormat::Raw,
                    DiskFormat::Qcow2 => vmpod_image::DiskFormat::Qcow2,
                };
                vmpod_image::clone_disk(&base.path, format, into.path(), index, size)
            });
            made.collect::<Result<Vec<_>, _>>()
        });
        let disks = disks.await.map_err(|error| error.to_string())?.map_err(|error| error_chain(&error))?;
        spec.disks = disks.into_iter().map(|disk| Disk { path: disk.path, format: format(disk.format) }).collect();
        spec.snapshot = Some(Snapshot::From(template.path.clone()));
        Ok(spec)
    }

    /// Makes a template, unless somebody else just did; none when it is `unwanted` before it is there. Then nothing of it stays.
    async fn make(&self, wish: Wish, unwanted: impl Future<Output = ()>) -> Option<Result<Template, TemplateError>> {
        let mut unwanted = std::pin::pin!(unwanted);
        let _one = tokio::select! {
            one = self.making.lock() => one,
            () = &mut unwanted => return None,
        };
        let key = wish.key.clone();
        let id = match (self.templates.find(&key), key.machine()) {
            (Ok(Some(template)), _) => return Some(Ok(template)),
            (Err(error), _) | (_, Err(error)) => return Some(Err(error)),
            (Ok(None), Ok(id)) => id,
        };
        let made = match self.prepare(wish, &id).await {
            Ok(spec) => {
                tracing::info!(template = %key.id(), image = key.image, "making a memory snapshot");
                tokio::select! {
                    made = self.templates.make(&key, spec) => Some(made),
                    () = &mut unwanted => None,
                }
            }
            Err(error) => Some(Err(error)),
        };
        match &made {
            Some(Ok(template)) => {
                tracing::info!(template = %template.id, bytes = template.bytes, "the memory snapshot is there");
                self.trim().await;
            }
            Some(Err(error)) => {
                let why = error_chain(error);
                tracing::warn!(template = %key.id(), error = why, "no memory snapshot could be made");
                self.lock_refused().insert(key.id(), (why, Timestamp::now()));
                self.clear(&id).await;
            }
            None => self.clear(&id).await,
        }
        made
    }

    /// The machine that is to become a template, with its disk. Runs to its end: a clone that goes on behind would be left.
    async fn prepare(&self, wish: Wish, id: &MachineId) -> Result<Spec, TemplateError> {
        let Wish { key, mut spec, image } = wish;
        let machine = |source| TemplateError::Machine { id: key.id(), source };
        self.machines.remove(id, true).await.map_err(machine)?;
        let unfit = |why: String| TemplateError::Unfit { id: key.id(), why };
        let into = self.machines.directory(id).map_err(machine)?;
        let (store, holder, size) = (self.store.clone(), holders::holder(id, &self.scope), key.disks.first().copied());
        let clone = tokio::task::spawn_blocking(move || {
            let image = store.image(image)?.ok_or(vmpod_image::StoreError::NoImage(image))?;
            store.clone_image(&image, into.path(), size, &holder)
        });
        let clone = clone.await.map_err(|error| unfit(error.to_string()))?;
        let clone = clone.map_err(|error| unfit(error_chain(&error)))?;
        spec.id = id.clone();
        spec.disks =
            clone.disks.into_iter().map(|disk| Disk { path: disk.path, format: format(disk.format) }).collect();
        Ok(spec)
    }

    /// Removes what is left of a machine that was to become a template.
    async fn clear(&self, id: &MachineId) {
        match self.machines.remove(id, true).await {
            // The template may have been in place already.
            Ok(()) if self.holders().contains(id) => {}
            Ok(()) => self.release(id).await,
            // Its image stays held while its disk may be in use; the next agent tries again.
            Err(error) => {
                tracing::warn!(machine = %id, error = error_chain(&error), "a machine that made a template is left");
            }
        }
    }

    async fn release(&self, id: &MachineId) {
        let (store, holder) = (self.store.clone(), holders::holder(id, &self.scope));
        match tokio::task::spawn_blocking(move || store.release(&holder)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = error_chain(&error), "a template's image can't be let go"),
            Err(error) => tracing::warn!(%error, "a template's image can't be let go"),
        }
    }

    /// Removes templates that can't be used any more, and the longest unused ones while they take more than they may.
    pub(crate) async fn trim(&self) {
        let Some(hypervisor) = self.hypervisor().await else { return };
        let all = match self.templates.list() {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "the templates can't be read");
                return;
            }
        };
        let used = |template: &Template| !self.templates.used_by(template).is_empty();
        let stale = all.iter().filter(|template| template.key.hypervisor != hypervisor && !used(template));
        let mut gone: Vec<&Template> = stale.collect();
        let current: Vec<Template> = all.iter().filter(|template| !gone.contains(template)).cloned().collect();
        gone.extend(surplus(&current, self.budget, used));
        for template in gone {
            if let Err(error) = self.templates.remove(&template.id) {
                tracing::warn!(template = %template.id, error = error_chain(&error), "a template can't be removed");
            } else if let Ok(id) = template.key.machine() {
                self.release(&id).await;
            }
        }
    }

    fn refusal(&self, id: &TemplateId) -> Option<String> {
        let refused = self.lock_refused();
        let (why, when) = refused.get(id)?;
        (Timestamp::now().duration_since(*when) < FORGET_REFUSAL).then(|| why.clone())
    }

    fn lock_refused(&self) -> std::sync::MutexGuard<'_, HashMap<TemplateId, (String, Timestamp)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machines that make templates; to be called when nobody makes one any more, and when an agent begins.
    pub(crate) async fn remove_makers(machines: &Machines, ids: impl IntoIterator<Item = MachineId>) {
        for id in ids.into_iter().filter(makes) {
            if let Err(error) = machines.remove(&id, true).await {
                tracing::warn!(machine = %id, error = error_chain(&error), "a machine that made a template can't be removed");
            }
        }
    }

    /// Ends what is being made.
    pub(crate) async fn stop(&self) {
        let ids: Vec<MachineId> = self.machines.list().iter().map(|machine| machine.id().clone()).collect();
        Self::remove_makers(&self.machines, ids).await;
    }
}

/// Makes the templates that pods wished for, when the node is quiet. Never ends by itself.
pub(crate) async fn keep(world: Arc<World>) {
    let Some(snapshots) = &world.snapshots else { return };
    snapshots.trim().await;
    let queue = snapshots.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut queue) = queue else { return };
    while let Some(wish) = queue.recv().await {
        if snapshots.refusal(&wish.key.id()).is_some() {
            continue;
        }
        if tokio::time::timeout(WISH, until_quiet(&world, wish.spec.memory.bytes())).await.is_err() {
            tracing::debug!(template = %wish.key.id(), "the node is too busy to make a template");
            continue;
        }
        // Why it failed is logged where it failed.
        snapshots.make(wish, std::future::pending()).await;
    }
}

/// Waits until no guest is booting and there is memory for one more machine.
async fn until_quiet(world: &World, memory: u64) {
    loop {
        let mut views: Vec<_> = world.pods().values().map(|handle| handle.view.clone()).collect();
        let booting = views.iter_mut().any(|view| {
            let view = view.borrow_and_update();
            view.machine.as_ref().is_some_and(|machine| {
                let live = matches!(&*machine.state().borrow(), State::Booting | State::Running);
                live && !matches!(&*machine.guest().ready().borrow(), GuestState::Ready)
            })
        });
        if !booting && world.ledger.free_memory() >= memory {
            return;
        }
        let changes = views.iter_mut().map(|view| Box::pin(view.changed()));
        let any = async {
            if world.pods().is_empty() {
                std::future::pending::<()>().await;
            }
            // A pod whose worker ended is a change as well.
            futures::future::select_all(changes).await.0.ok();
        };
        // Pods that came since aren't among those that are watched.
        tokio::time::timeout(Duration::from_secs(5), any).await.ok();
    }
}

/// Whether a machine is one that makes a template.
pub(crate) fn makes(id: &MachineId) -> bool {
    id.as_str().starts_with(MACHINE_PREFIX)
}

/// Why a machine can't go on from any template.
fn unfit(spec: &Spec) -> Option<&'static str> {
    if spec.access.ready_marker.is_none() {
        return Some("the image names no line that its guest prints when it is ready");
    }
    if spec.learns().is_some() {
        return Some("the machine is on a bridge where its address has to be learnt");
    }
    if !spec.shares.is_empty() {
        return Some("the machine shares a volume with the containers beside it, which needs memory of its own");
    }
    if spec.tpm {
        return Some("the machine has a TPM, and what that knows isn't in memory");
    }
    if spec.seed.as_ref().is_none_or(|seed| seed.form != SeedForm::Nocloud) {
        return Some("the image reads no first-boot seed, so its guest can't take a new identity");
    }
    None
}

/// Who may share a template. An image that needs a secret to be pulled is the namespace's own.
fn scope(pod: &Pod) -> String {
    let secrets = pod::spec(pod).and_then(|spec| spec.image_pull_secrets.as_ref());
    if secrets.is_some_and(|secrets| !secrets.is_empty()) { pod::namespace(pod).to_owned() } else { String::new() }
}

fn format(format: vmpod_image::DiskFormat) -> DiskFormat {
    match format {
        vmpod_image::DiskFormat::Raw => DiskFormat::Raw,
        vmpod_image::DiskFormat::Qcow2 => DiskFormat::Qcow2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(start: Start) -> Known<'static> {
        Known { start, unfit: None, renewable: true, there: false, refused: None }
    }

    #[test]
    fn a_template_is_used_where_it_is_wanted_and_fits() {
        let there = |start| choose(&Known { there: true, ..known(start) });
        assert_eq!(there(Start::Auto), Choice::Restore);
        assert_eq!(there(Start::Snapshot), Choice::Restore);
        assert_eq!(there(Start::Boot), Choice::Boot(None));
        let unfit = |start| choose(&Known { there: true, unfit: Some("no marker"), ..known(start) });
        assert_eq!(unfit(Start::Auto), Choice::Boot(None));
        assert_eq!(unfit(Start::Snapshot), Choice::Boot(Some("no marker".to_owned())));
    }

    #[test]
    fn one_that_is_missing_is_made_now_or_later() {
        assert_eq!(choose(&known(Start::Auto)), Choice::BootAndWish);
        assert_eq!(choose(&known(Start::Snapshot)), Choice::Make);
        // Nobody said that the guest can: `auto` doesn't try, `snapshot` does.
        let silent = |start| choose(&Known { renewable: false, ..known(start) });
        assert_eq!(silent(Start::Auto), Choice::Boot(None));
        assert_eq!(silent(Start::Snapshot), Choice::Make);
        let refused = |start| choose(&Known { refused: Some("no program"), ..known(start) });
        assert_eq!(refused(Start::Auto), Choice::Boot(None));
        assert_eq!(refused(Start::Snapshot), Choice::Boot(Some("no program".to_owned())));
    }

    #[test]
    fn an_image_behind_a_secret_is_its_namespaces_own() {
        let pod = |secrets: serde_json::Value| -> Pod {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "a", "namespace": "ci"},
                "spec": {"containers": [], "imagePullSecrets": secrets},
            }))
            .unwrap()
        };
        assert_eq!(scope(&pod(serde_json::json!([]))), "");
        assert_eq!(scope(&pod(serde_json::json!([{"name": "registry"}]))), "ci");
    }
}
