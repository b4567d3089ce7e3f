//! `vmpod image build`: boots an image, does what a recipe says, seals it, and keeps the result.
//!
//! ```text
//! recipe ─▶ clone ─▶ boot ─▶ cloud-init ─▶ steps ─▶ seal ─▶ shut down ─▶ capture
//! ```
//!
//! The machine lives in a private home, like that of `vmpod run`: a build that is killed leaves nothing that the next
//! `vmpod` doesn't clear away, and an image appears only at the end. What comes after the shutdown reads the disks
//! and nothing else, so a variant that keeps the booted memory too is one more step before it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use vmpod_image::{CaptureOptions, CapturedDisk, DiskFormat, Image, Reference, Store, capture};
use vmpod_machine::{GuestState, Machine, MachineId, State};
use vmpod_node::{PlainMachine, plain_machine};

use crate::agent;
use crate::args;
use crate::home::{Home, Role};
use crate::image;
use crate::interrupts::Interrupts;
use crate::output::{self, Progress, talk};
use crate::report::{Exit, Remedy};
use crate::run::letters;
use crate::up;

mod guest;
mod recipe;
mod seal;

use guest::Builder;
use recipe::Recipe;

/// How long the guest gets to shut down: a database or two may have something to write.
const SHUTDOWN: Duration = Duration::from_mins(2);

/// Runs a build from its first to its last moment.
pub(crate) async fn run(home: &Home, args: args::Build) -> Result<Exit> {
    let mut interrupts = Interrupts::listen()?;
    let recipe = Recipe::read(&args.file)?;
    let name = image::reference(&args.name)?;
    let store = image::open(home)?;
    let hypervisor = agent::Hypervisor::of(&args.hypervisor)?;
    up::clear_dead_runs(home, &hypervisor).await;
    let base = base(&store, &recipe, &args).await?;

    let private = home.ephemeral(&letters(8));
    let _lock = private.lock(Role::Run).await?;
    let building = async {
        let machines = agent::machines(&private, hypervisor.clone())?;
        let accel = agent::accel(home, &hypervisor, args.accel).await;
        let id = MachineId::parse(format!("build-{}", letters(5)))?;
        let wanted = PlainMachine {
            id,
            cpus: recipe.cpus,
            memory: recipe.memory,
            disk: recipe.size,
            user_data: recipe.user_data.clone(),
            accel,
        };
        let machine = plain_machine(&store, &machines, &base, wanted).await.map_err(|error| anyhow!(error))?;
        let build = Build { recipe: &recipe, machine: &machine, key: machines.ssh_key(machine.id())?.public };
        let work = build.run();
        tokio::time::timeout(recipe.timeout, work).await.unwrap_or_else(|_| {
            Err(Remedy::new(
                format!("the build wasn't done within {}", output::seconds(recipe.timeout)),
                "give it longer with `timeout:` in the recipe",
            )
            .into())
        })?;
        keep(&store, &base, &machine, &name, &recipe).await
    };
    let result = tokio::select! {
        result = building => result.map(Some),
        interrupt = interrupts.next() => {
            talk("interrupted; removing the machine");
            up::clear(&private, hypervisor).await?;
            return Ok(Exit::Command(interrupt.code()));
        }
    };
    // Nothing may be left, whatever went wrong before.
    let cleared = up::clear(&private, hypervisor).await;
    let image = result.with_context(|| format!("can't build image {}", args.name))?;
    cleared?;
    if let Some(image) = image {
        talk(&format!("built {} ({})", args.name, output::bytes(image.transfer_bytes)));
        output::data(&format!("{}\n", image.digest))?;
    }
    Ok(Exit::Done)
}

/// The image that the recipe begins from, pulled if it isn't here.
async fn base(store: &Store, recipe: &Recipe, args: &args::Build) -> Result<Image> {
    let from = image::reference(&recipe.from)?;
    let base = match store.get(&from).with_context(|| format!("can't look up image {from}"))? {
        Some(base) => base,
        None if from.is_local() => return Err(image::missing(store, &from)),
        None => image::fetch(store, &from, &args.registry, &args.sources).await?,
    };
    if base.config.disks.is_empty() {
        return Err(Remedy::new(
            format!("image {from} has no disk, so nothing that a build does to it would last"),
            "begin from an image with a disk",
        )
        .into());
    }
    Ok(base)
}

struct Build<'a> {
    recipe: &'a Recipe,
    machine: &'a Machine,
    key: String,
}

impl Build<'_> {
    /// Everything up to the machine's orderly end.
    async fn run(&self) -> Result<()> {
        let steps = self.recipe.steps.len();
        let begun = Instant::now();
        self.boot().await?;
        talk(&format!("the guest is up after {}", output::seconds(begun.elapsed())));
        let builder = Builder { machine: self.machine, guest: self.machine.guest() };
        builder.first_boot().await.context("the guest's first boot failed")?;
        for (number, step) in (1..).zip(&self.recipe.steps) {
            talk(&format!("step {number} of {steps}: {}", describe(step)));
            let begun = Instant::now();
            builder.step(step).await.with_context(|| format!("step {number} ({}) failed", describe(step)))?;
            tracing::debug!(number, took = ?begun.elapsed(), "step done");
        }
        talk("sealing");
        let script = seal::script(&self.recipe.seal, self.recipe.trim, &self.key);
        builder.root(&script, "sealing").await?;
        self.shut_down().await
    }

    async fn boot(&self) -> Result<()> {
        let spinner = Progress::spinner("booting");
        self.machine.start().await.context("the machine can't be started")?;
        let guest = self.machine.guest();
        let (mut ready, mut state) = (guest.ready(), self.machine.state());
        let up = tokio::select! {
            ready = ready.wait_for(|state| *state == GuestState::Ready) => ready.is_ok(),
            _ = state.wait_for(State::is_final) => false,
        };
        spinner.clear();
        ensure!(
            up,
            "the guest didn't come up: {}; its console says last:\n{}",
            words(&self.machine.state().borrow()),
            tail(&std::fs::read(self.machine.console_path()).unwrap_or_default())
        );
        Ok(())
    }

    async fn shut_down(&self) -> Result<()> {
        let spinner = Progress::spinner("shutting down");
        let ended = self.machine.stop(SHUTDOWN).await;
        spinner.clear();
        match ended.context("the machine can't be stopped")? {
            State::Stopped(exit) if exit.cause == vmpod_machine::ExitCause::GuestShutdown => Ok(()),
            // What it hadn't written yet is lost, and nobody knows what that is.
            state => {
                bail!("the guest didn't shut down by itself within {}: {}", output::seconds(SHUTDOWN), words(&state))
            }
        }
    }
}

/// Makes the image of the stopped machine's disks.
async fn keep(store: &Store, base: &Image, machine: &Machine, name: &Reference, recipe: &Recipe) -> Result<Image> {
    let (meter, drawn) = image::draw("capturing".to_owned());
    let options = CaptureOptions { labels: recipe.labels.clone(), progress: Some(meter) };
    let disks = disks(machine.spec());
    let image = drawn.until(capture(store, base, &disks, name, options)).await;
    image.context("can't capture the machine's disks")
}

/// The disks of a machine, as an image is made of them.
pub(crate) fn disks(spec: &vmpod_machine::Spec) -> Vec<CapturedDisk> {
    let disk = |disk: &vmpod_machine::Disk| CapturedDisk {
        path: disk.path.clone(),
        format: match disk.format {
            vmpod_machine::DiskFormat::Raw => DiskFormat::Raw,
            vmpod_machine::DiskFormat::Qcow2 => DiskFormat::Qcow2,
        },
    };
    spec.disks.iter().map(disk).collect()
}

fn describe(step: &recipe::Step) -> String {
    match step {
        recipe::Step::Copy { from, to, .. } => format!("copy {} to {to}", from.display()),
        recipe::Step::Run(script) => {
            let line = script.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            format!("run {}", line.trim())
        }
        recipe::Step::Script(path) => format!("script {}", path.display()),
        recipe::Step::Ansible { playbook, .. } => format!("ansible {}", playbook.display()),
    }
}

fn words(state: &State) -> String {
    match state {
        State::Stopped(exit) => exit.to_string(),
        State::Failed(why) => why.clone(),
        state => format!("it is {state:?}").to_lowercase(),
    }
}

/// The last lines of a console.
fn tail(console: &[u8]) -> String {
    let text = String::from_utf8_lossy(console);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
