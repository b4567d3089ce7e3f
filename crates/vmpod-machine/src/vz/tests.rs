//! The helper and the agent's end of it, in one process, with a scripted engine.

use std::sync::Mutex;

use super::helper::{Ended, Engine, EngineError, serve};
use super::*;
use crate::id::MachineId;
use crate::spec::tests::spec as any_spec;

/// What was asked of it, and how it ends.
struct Scripted {
    asked: Mutex<Vec<&'static str>>,
    end: watch::Sender<Option<Ended>>,
    start: Result<(), EngineError>,
    /// Whether the guest hears its power button.
    obeys: bool,
}

impl Scripted {
    fn new(start: Result<(), EngineError>, obeys: bool) -> Arc<Self> {
        Arc::new(Self { asked: Mutex::default(), end: watch::Sender::new(None), start, obeys })
    }

    fn note(&self, what: &'static str) {
        self.asked.lock().unwrap().push(what);
    }

    fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().unwrap().clone()
    }
}

#[async_trait]
impl Engine for Scripted {
    async fn start(&self, _spec: &Spec, configuration: &config::Configuration) -> Result<(), EngineError> {
        assert!(configuration.console.exists(), "an autopsy would say that nothing ran here");
        self.note("start");
        self.start.clone()
    }

    async fn request_stop(&self) -> Result<(), EngineError> {
        self.note("request stop");
        if self.obeys {
            self.end.send_replace(Some(Ended::Stopped));
        }
        Ok(())
    }

    async fn stop(&self) -> Result<(), EngineError> {
        self.note("stop");
        self.end.send_replace(Some(Ended::Stopped));
        Ok(())
    }

    async fn pause(&self) -> Result<(), EngineError> {
        self.note("pause");
        Ok(())
    }

    async fn resume(&self) -> Result<(), EngineError> {
        self.note("resume");
        Err(EngineError::Failed("it isn't paused".to_owned()))
    }

    async fn ended(&self) -> Ended {
        let mut end = self.end.subscribe();
        end.wait_for(Option::is_some).await.unwrap().clone().unwrap()
    }
}

struct World {
    _root: tempfile::TempDir,
    spec: Spec,
    dir: MachineDir,
}

impl World {
    fn new(name: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut spec = any_spec(name);
        spec.arch = Arch::host().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse(name).unwrap());
        dir.make().unwrap();
        Self { _root: root, spec, dir }
    }

    fn serve(&self, engine: &Arc<Scripted>) -> tokio::task::JoinHandle<Result<Exit, helper::HelperError>> {
        let (spec, dir, engine) = (self.spec.clone(), self.dir.clone(), Arc::clone(engine) as Arc<dyn Engine>);
        tokio::spawn(async move { serve(&spec, &dir, engine).await })
    }

    /// The agent's side, once the guest runs.
    async fn process(&self) -> VzProcess {
        let control = loop {
            match Control::connect(&self.dir).await {
                Ok(control) => break control,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        VzProcess::new(&self.spec, &self.dir, control).await.unwrap()
    }
}

#[tokio::test]
async fn a_guest_that_hears_its_button_shuts_down() {
    let world = World::new("a");
    let engine = Scripted::new(Ok(()), true);
    let helper = world.serve(&engine);
    let process = world.process().await;
    assert_eq!(process.pid(), Some(std::process::id()));
    process.pause().await.unwrap();
    let error = process.resume().await.unwrap_err().to_string();
    assert_eq!(error, "resume was refused: it isn't paused");
    process.power_down().await.unwrap();
    let exit = helper.await.unwrap().unwrap();
    assert_eq!(exit.cause, ExitCause::GuestShutdown);
    assert_eq!(engine.asked(), ["start", "pause", "resume", "request stop"]);
    // An agent that comes later reads it from the directory.
    let vz = Vz { helper: "/nonexistent".into(), leases: LEASES.into() };
    assert_eq!(vz.autopsy(&world.spec, &world.dir).await.unwrap(), Some(exit));
}

#[tokio::test]
async fn who_is_stopped_was_killed_and_two_agents_may_ask() {
    let world = World::new("a");
    let engine = Scripted::new(Ok(()), false);
    let helper = world.serve(&engine);
    let (process, other) = (world.process().await, world.process().await);
    other.power_down().await.unwrap();
    process.control.ask(Command::Stop).await.unwrap();
    assert_eq!(helper.await.unwrap().unwrap().cause, ExitCause::Killed);
    assert_eq!(engine.asked(), ["start", "request stop", "stop"]);
}

#[tokio::test]
async fn a_limit_is_told_from_a_failure() {
    let world = World::new("a");
    let engine = Scripted::new(Err(EngineError::Limit("two guests run".to_owned())), false);
    let busy = world.serve(&engine).await.unwrap().unwrap_err();
    assert_eq!((busy.code(), busy.to_string().as_str()), (75, "two guests run"));
    let vz = Vz { helper: "/nonexistent".into(), leases: LEASES.into() };
    assert_eq!(vz.autopsy(&world.spec, &world.dir).await.unwrap(), None, "it may be started later");
    let engine = Scripted::new(Err(EngineError::Failed("no such disk".to_owned())), false);
    let failed = world.serve(&engine).await.unwrap().unwrap_err();
    assert_eq!((failed.code(), failed.to_string().as_str()), (1, "the guest can't be started: no such disk"));
    assert!(!world.dir.file(SOCKET).exists(), "nobody is there to speak to");
}

#[tokio::test]
async fn what_a_helper_does_not_know_it_refuses() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let world = World::new("a");
    let engine = Scripted::new(Ok(()), true);
    let helper = world.serve(&engine);
    let process = world.process().await;
    let mut stream = connect(&world.dir, SOCKET).await.unwrap();
    stream.write_all(b"{\"id\":3,\"do\":\"dance\"}\nnonsense\n").await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let answer: serde_json::Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    assert_eq!(answer["id"], 3);
    assert!(answer["error"].as_str().unwrap().contains("dance"));
    let answer: serde_json::Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    assert!(answer["error"].is_string());
    process.power_down().await.unwrap();
    helper.await.unwrap().unwrap();
}

#[tokio::test]
async fn another_machines_helper_is_not_taken_for_ours() {
    let world = World::new("a");
    let engine = Scripted::new(Ok(()), true);
    let helper = world.serve(&engine);
    let process = world.process().await;
    let mut other = world.spec.clone();
    other.id = MachineId::parse("b").unwrap();
    let control = Control::connect(&world.dir).await.unwrap();
    let error = VzProcess::new(&other, &world.dir, control).await.err().unwrap();
    assert!(error.to_string().contains("and not machine b"), "{error}");
    process.power_down().await.unwrap();
    helper.await.unwrap().unwrap();
}

#[tokio::test]
async fn long_paths_and_short_ones_lead_to_the_same_socket() {
    let root = tempfile::tempdir().unwrap();
    let deep = root.path().join("d".repeat(60)).join("e".repeat(60));
    std::fs::create_dir_all(&deep).unwrap();
    let dir = MachineDir::new(&deep, &MachineId::parse("a").unwrap());
    dir.make().unwrap();
    let listener = bind(&dir, SOCKET);
    if cfg!(target_os = "linux") {
        let listener = listener.unwrap();
        let (accepted, connected) = tokio::join!(listener.accept(), connect(&dir, SOCKET));
        accepted.unwrap();
        connected.unwrap();
    } else {
        assert!(listener.unwrap_err().to_string().contains("shorter home"));
    }
}

/// The program that is started isn't always there, or isn't what it should be.
#[tokio::test]
async fn a_helper_that_can_not_be_started_is_named() {
    let world = World::new("a");
    let vz = Vz { helper: "/nonexistent/vmpod".into(), leases: LEASES.into() };
    let error = vz.start(&world.spec, &world.dir).await.err().unwrap();
    assert!(matches!(&error, HypervisorError::Program { program, .. } if program == "/nonexistent/vmpod"), "{error}");
    let vz = Vz { helper: "/bin/false".into(), leases: LEASES.into() };
    let error = vz.start(&world.spec, &world.dir).await.err().unwrap();
    assert!(matches!(error, HypervisorError::DiedAtStart { hypervisor: NAME, .. }), "{error}");
    assert_eq!(vz.autopsy(&world.spec, &world.dir).await.unwrap(), None, "nothing ran");
    assert!(vz.find(&world.spec, &world.dir).await.unwrap().is_none());
}
