use super::*;
use crate::directory::MachineDir;
use crate::fake::{Script, World};
use crate::spec::tests::spec as plain;
use crate::{Adopted, Machine, State};

struct Host {
    dir: tempfile::TempDir,
    world: World,
}

impl Host {
    fn new() -> Self {
        let world = World::new();
        world.set_default(Script { renewable: true, ..Script::default() });
        Self { dir: tempfile::tempdir().unwrap(), world }
    }

    fn open(&self) -> (Machines, Templates) {
        let machines = Machines::open(self.dir.path().join("machines"), self.world.hypervisor()).unwrap();
        let templates = Templates::open(self.dir.path().join("templates"), machines.clone()).unwrap();
        (machines, templates)
    }
}

fn key(image: &str) -> TemplateKey {
    TemplateKey {
        image: image.to_owned(),
        scope: String::new(),
        cpus: Cpus::ONE,
        memory: Memory::from_mib(256),
        arch: Arch::Amd64,
        accel: Accel::Tcg,
        hypervisor: "fake 1".to_owned(),
        disks: vec![4096],
        networks: 1,
    }
}

/// A machine that can become the template of `key`, with one disk.
fn base(machines: &Machines, key: &TemplateKey) -> Spec {
    let mut spec = plain("x");
    spec.id = key.machine().unwrap();
    spec.access.ready_marker = Some("ready".to_owned());
    let dir = machines.directory(&spec.id).unwrap();
    fs::write(dir.file("disk-0.raw"), b"what the guest wrote").unwrap();
    spec.disks = vec![crate::Disk { path: dir.file("disk-0.raw"), format: DiskFormat::Raw }];
    spec
}

async fn copy(machines: &Machines, name: &str, template: &Template) -> Machine {
    let mut spec = plain(name);
    spec.snapshot = Some(Snapshot::From(template.path.clone()));
    machines.create(spec).await.unwrap()
}

#[tokio::test]
async fn a_machine_becomes_a_template_and_others_go_on_from_it() {
    let host = Host::new();
    let (machines, templates) = host.open();
    let key = key("a");
    assert_eq!(templates.find(&key).unwrap(), None);
    let made = templates.make(&key, base(&machines, &key)).await.unwrap();
    assert_eq!(templates.find(&key).unwrap().unwrap().path, made.path);
    assert_eq!(fs::read(&made.disks[0].path).unwrap(), b"what the guest wrote");
    assert!(machines.list().is_empty(), "the machine that made it is still there");
    assert!(host.world.live().is_empty());
    let machine = copy(&machines, "copy-0", &made).await;
    machine.start().await.unwrap();
    assert_eq!(templates.used_by(&made), [machine.id().clone()]);
    machine.kill().await.unwrap();
    assert!(templates.used_by(&made).is_empty());
    templates.remove(&made.id).unwrap();
    assert_eq!(templates.list().unwrap(), []);
}

#[tokio::test]
async fn every_part_of_the_key_counts() {
    let host = Host::new();
    let (machines, templates) = host.open();
    let made = key("a");
    templates.make(&made, base(&machines, &made)).await.unwrap();
    let changes: [fn(&mut TemplateKey); 8] = [
        |key| key.image.push('b'),
        |key| key.scope.push('b'),
        |key| key.cpus = Cpus::new(2).unwrap(),
        |key| key.memory = Memory::from_mib(512),
        |key| key.accel = Accel::Kvm,
        |key| key.hypervisor = "fake 2".to_owned(),
        |key| key.disks = vec![8192],
        |key| key.networks = 2,
    ];
    for change in changes {
        let mut other = made.clone();
        change(&mut other);
        assert_eq!(templates.find(&other).unwrap(), None, "{other:?}");
    }
}

#[tokio::test]
async fn a_guest_without_the_program_makes_none_and_leaves_nothing() {
    let host = Host::new();
    host.world.set_default(Script::default());
    let (machines, templates) = host.open();
    let key = key("a");
    let error = templates.make(&key, base(&machines, &key)).await.unwrap_err();
    assert!(crate::machine::error_chain(&error).contains("no program that takes a new identity"), "{error}");
    assert!(machines.list().is_empty() && host.world.live().is_empty());
    assert_eq!(fs::read_dir(host.dir.path().join("machines")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.dir.path().join("templates")).unwrap().count(), 0);
}

#[tokio::test]
async fn one_changed_byte_is_found_and_never_used() {
    for name in [MEMORY, STATE, "disk-0.raw"] {
        let host = Host::new();
        let (machines, templates) = host.open();
        let key = key("a");
        let made = templates.make(&key, base(&machines, &key)).await.unwrap();
        let path = made.path.join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(&path, bytes).unwrap();
        // The same agent sees the file's time, another one reads it whole.
        let error = templates.find(&key).unwrap_err();
        assert!(matches!(&error, TemplateError::Damaged { .. }), "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(templates.find(&key).unwrap(), None, "a damaged one was kept");
    }
}

#[tokio::test]
async fn a_fresh_agent_checks_what_it_finds() {
    let host = Host::new();
    let key = key("a");
    let made = {
        let (machines, templates) = host.open();
        templates.make(&key, base(&machines, &key)).await.unwrap()
    };
    fs::write(made.path.join(STATE), b"state of template-x").unwrap();
    fs::remove_file(made.path.join(MEMORY)).unwrap();
    let (_, templates) = host.open();
    let error = templates.find(&key).unwrap_err();
    assert!(matches!(error, TemplateError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn half_made_templates_are_gone_after_a_restart() {
    let host = Host::new();
    let (_, templates) = host.open();
    drop(templates);
    let root = host.dir.path().join("templates");
    for name in [".new-0123", ".old-0123"] {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join(MEMORY), b"half").unwrap();
    }
    host.open();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

#[tokio::test]
async fn a_restore_that_fails_fails_the_machine() {
    let host = Host::new();
    let (machines, templates) = host.open();
    let key = key("a");
    let made = templates.make(&key, base(&machines, &key)).await.unwrap();
    host.world.set_default(Script { restore_fails: Some("bad magic".to_owned()), ..Script::default() });
    let machine = copy(&machines, "copy-0", &made).await;
    let error = machine.start().await.unwrap_err();
    assert!(error.to_string().contains("bad magic"), "{error}");
    assert!(matches!(&*machine.state().borrow(), State::Failed(_)));
}

#[tokio::test]
async fn a_copy_that_ended_before_it_was_itself_is_known_as_failed() {
    let host = Host::new();
    let (machines, templates) = host.open();
    let key = key("a");
    let made = templates.make(&key, base(&machines, &key)).await.unwrap();
    let machine = copy(&machines, "copy-0", &made).await;
    machine.start().await.unwrap();
    let dir = MachineDir::new(machines.root(), machine.id());
    // As if the agent had died while the guest was waking up, and the process after it.
    fs::remove_file(dir.file(crate::renewal::DONE)).unwrap();
    drop((machine, machines, templates));
    host.world.crash(&"copy-0".parse_id());
    let machines = Machines::open(host.dir.path().join("machines"), host.world.hypervisor()).unwrap();
    let found = machines.adopt().await.unwrap();
    assert!(matches!(found.as_slice(), [(_, Adopted::Unrestored(_))]), "{found:?}");
    let machine = machines.get(&"copy-0".parse_id()).unwrap();
    assert!(matches!(&*machine.state().borrow(), State::Failed(_)));
}

trait ParseId {
    fn parse_id(&self) -> MachineId;
}

impl ParseId for str {
    fn parse_id(&self) -> MachineId {
        MachineId::parse(self).unwrap()
    }
}

fn template(name: char, bytes: u64, used: i64) -> Template {
    Template {
        id: TemplateId(name.to_string()),
        path: PathBuf::from(name.to_string()),
        key: key("a"),
        disks: Vec::new(),
        made: Timestamp::UNIX_EPOCH,
        bytes,
        used: Timestamp::from_second(used).unwrap(),
    }
}

proptest::proptest! {
    #[test]
    fn what_is_removed_is_enough_old_and_unused(
        all in proptest::collection::vec((1..100u64, 0..1000i64, proptest::bool::ANY), 0..12), budget in 0..500u64,
    ) {
        let all: Vec<(Template, bool)> = all.into_iter().zip('a'..).map(|((b, u, busy), n)| (template(n, b, u), busy)).collect();
        let busy = |t: &Template| all.iter().any(|(other, busy)| other.id == t.id && *busy);
        let list: Vec<Template> = all.iter().map(|(t, _)| t.clone()).collect();
        let gone = surplus(&list, budget, busy);
        let left: u64 = list.iter().filter(|t| !gone.iter().any(|g| g.id == t.id)).map(|t| t.bytes).sum();
        let free = list.iter().filter(|t| !busy(t)).count();
        proptest::prop_assert!(left <= budget || gone.len() == free, "not enough");
        proptest::prop_assert!(gone.iter().all(|t| !busy(t)));
        let without_last: u64 = left + gone.last().map_or(0, |t| t.bytes);
        proptest::prop_assert!(gone.is_empty() || without_last > budget, "too much");
        let newest_gone = gone.iter().map(|t| t.used).max();
        let oldest_left = list.iter().filter(|t| !busy(t) && !gone.iter().any(|g| g.id == t.id)).map(|t| t.used).min();
        proptest::prop_assert!(newest_gone <= oldest_left || oldest_left.is_none());
    }
}
