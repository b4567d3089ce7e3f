//! Repository checks and benchmarks: `cargo xtask tidy`, `cargo xtask bench NAME`.

mod bench;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
