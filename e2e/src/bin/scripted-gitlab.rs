//! The scripted GitLab as a program of its own: see `e2e::gitlab`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use e2e::gitlab::{Config, Gitlab};

/// A scripted GitLab: runners, jobs, traces, and the ways in which they fail.
#[derive(Debug, Parser)]
struct Args {
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The administrator's token
    #[arg(long, default_value = "glpat-scripted")]
    token: String,
    /// A directory whose files are offered as generic packages
    #[arg(long)]
    packages: Option<PathBuf>,
    /// Seconds after which a runner's token expires
    #[arg(long)]
    token_lifetime: Option<u64>,
    /// Calls a minute for one access token; 0 is no limit
    #[arg(long, default_value_t = 0)]
    api_per_minute: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let config = Config {
        access_token: args.token,
        packages: args.packages,
        token_lifetime: args.token_lifetime.map(Duration::from_secs),
        api_per_minute: args.api_per_minute,
        ..Config::default()
    };
    let gitlab = Gitlab::on(args.listen, config).await?;
    // Whoever started it reads where it is.
    write(&format!("{}\n", gitlab.url()))?;
    gitlab.serve().await
}

fn write(text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
