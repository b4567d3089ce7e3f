//! Repository checks and benchmarks: `cargo xtask tidy`, `cargo xtask bench NAME`.

mod bench;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Repository checks and benchmarks")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check what compilers do not: crate directions, file sizes, links, words
    Tidy,
    /// Write the definitions of vmpod's kinds into the Helm chart
    Crds,
    /// Measure one thing and print a table and, as the last line, one JSON object
    Bench {
        /// Which benchmark
        name: bench::Name,
        /// Fewer rounds: under a minute, noisier
        #[arg(long)]
        quick: bool,
        /// Measure this vmpod instead of building one
        #[arg(long, value_name = "FILE")]
        program: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Tidy => tidy::run(&root()),
        Task::Crds => crds(&root()),
        Task::Bench { name, quick, program } => bench::run(name, quick, program, &root()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// What the chart renders with its usual values, for `vmpod manifests`: nothing in it says that Helm keeps it.
fn manifests(root: &Path) -> anyhow::Result<String> {
    let mut helm = std::process::Command::new(root.join("target/tools/helm"));
    helm.args(["template", "vmpod"]).arg(root.join("charts/vmpod"));
    helm.args(["--set=image=VMPOD_IMAGE", "--namespace=VMPOD_NAMESPACE"]);
    let output = helm.output().context("can't run target/tools/helm: `make tools` puts it there")?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let lines =
        text.lines().filter(|line| !line.trim_start().starts_with("helm.sh/chart:") && !line.starts_with("# Source:"));
    Ok(lines.map(|line| line.replace("managed-by: Helm", "managed-by: vmpod") + "\n").collect())
}

/// Writes what the Helm chart says of vmpod's kinds, and the operator's plain manifests.
fn crds(root: &Path) -> anyhow::Result<()> {
    for definition in vmpod_api::definitions() {
        let path = root.join("charts/vmpod/crds").join(format!("{}.json", definition.spec.names.plural));
        let text = serde_json::to_string_pretty(&definition)?;
        std::fs::write(&path, text + "\n").with_context(|| format!("can't write {}", path.display()))?;
    }
    let path = root.join("crates/vmpod/src/manifests.yaml");
    std::fs::write(&path, manifests(root)?).with_context(|| format!("can't write {}", path.display()))?;
    Ok(())
}

/// The repository's top folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// A line for people.
#[expect(clippy::print_stderr, reason = "the task runner's one place that talks")]
fn say(line: &str) {
    eprintln!("{line}");
}

/// A line of data.
#[expect(clippy::print_stdout, reason = "the task runner's one place that prints results")]
fn print(line: &str) {
    println!("{line}");
}
