//! The command line: arguments in, other crates' work put together, results out.

mod agent;
mod apply;
mod archive;
mod args;
mod bootstrap;
mod build;
mod client;
mod commit;
mod controller;
mod doctor;
mod exec;
mod gitlab_executor;
mod home;
mod identity;
mod image;
mod interrupts;
mod keda;
mod logging;
mod machine_vz;
mod manifests;
mod metrics;
mod node;
mod output;
mod pods;
mod ports;
mod report;
mod run;
mod service;
mod stack;
mod terminal;
mod token;
mod up;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser as _};
use serde::Serialize;

use args::{Cli, Command, Format};
use home::Home;
use logging::Level;
use report::{BEFORE_COMMAND, Exit};

/// The embedded API makes and drops small objects on all processors at once, which the C library's allocator makes wait for each
/// other: a third more creates a second. Settings are in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let failed = match cli.command {
        // Their own failures must not be taken for the command's.
        Command::Run(_) | Command::Exec(_) => ExitCode::from(BEFORE_COMMAND),
        _ => ExitCode::FAILURE,
    };
    match start(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            report::print(&error);
            failed
        }
    }
}

/// Makes what every command needs and runs it.
fn start(cli: Cli) -> Result<Exit> {
    let level = match cli.command {
        Command::Up(_) | Command::Node(_) | Command::Controller(_) | Command::MachineVz(_) => Level::Service,
        _ => Level::Command,
    };
    logging::start(cli.global.log.as_deref(), cli.global.log_format, level)?;
    // One provider of cryptography for the process; libraries panic when none was chosen.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a provider of cryptography was chosen already");
    }
    #[cfg(target_os = "macos")]
    if let Command::MachineVz(args) = &cli.command {
        machine_vz::main(args.dir.clone());
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the runtime")?;
    let result = runtime.block_on(dispatch(cli));
    // A thread that still waits for standard input must not hold the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

async fn dispatch(cli: Cli) -> Result<Exit> {
    let home = || Home::resolve(cli.global.home.as_deref());
    match cli.command {
        Command::Up(args) => up::run(&home()?, args).await,
        Command::Node(args) => node::run(&home()?, args).await,
        Command::Controller(args) => controller::run(args).await,
        Command::Run(args) => run::run(&home()?, args).await,
        Command::Ps(args) => pods::ps(&home()?, &args).await,
        Command::Logs(args) => pods::logs(&home()?, &args).await,
        Command::Exec(args) => exec::exec(&home()?, args).await,
        Command::Cp(args) => exec::copy(&home()?, args).await,
        Command::Stop(args) => pods::stop(&home()?, &args).await,
        Command::Doctor(args) => doctor::run(&home()?, &args).await,
        Command::Image(args) => image::run(&home()?, args.command).await,
        Command::Api(args) => archive::run(&home()?, args.command).await,
        Command::Token(args) => token::run(&home()?, args.command).await,
        Command::GitlabExecutor(args) => gitlab_executor::run(home, args).await,
        Command::Service(args) => service::run(home()?, args).await,
        Command::Manifests(args) => manifests::run(&args),
        Command::MachineVz(args) => machine_vz::run(&args),
        Command::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "vmpod", &mut script);
            output::data(&String::from_utf8(script).context("the completion script is not UTF-8")?)?;
            Ok(Exit::Done)
        }
        Command::Version(args) => version(args.output.output),
    }
}

/// What `vmpod version -o json` says.
#[derive(Serialize)]
struct Build {
    version: &'static str,
    os: &'static str,
    architecture: &'static str,
}

fn version(format: Format) -> Result<Exit> {
    let build =
        Build { version: env!("CARGO_PKG_VERSION"), os: std::env::consts::OS, architecture: std::env::consts::ARCH };
    match format {
        Format::Table | Format::Name => output::data(&format!("vmpod {}\n", build.version))?,
        format => output::value(format, &build)?,
    }
    Ok(Exit::Done)
}
