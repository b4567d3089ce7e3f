//! The words of `vmpod gitlab-executor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

use super::values::{KeyValue, Size, cpus, key_value, parse_size};

/// Run GitLab's jobs in throwaway machines: the programs of GitLab Runner's custom executor.
///
/// GitLab Runner calls `config`, `prepare`, `run` and `cleanup` for each job. A job gets a machine of its
/// own, a Pod in the cluster of --kubeconfig or of this home's `vmpod up`, and the machine is gone
/// afterwards. docs/gitlab.md has the runner's config.toml.
#[derive(Debug, Args)]
pub(crate) struct GitlabExecutor {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    pub(crate) machine: Machine,
    #[command(subcommand)]
    pub(crate) stage: Stage,
}

/// One of the four programs.
#[derive(Debug, Subcommand)]
pub(crate) enum Stage {
    /// Tell GitLab Runner about the job's machine (`config_exec`)
    Config,
    /// Start the job's machine (`prepare_exec`)
    Prepare,
    /// Run one of the job's scripts in its machine (`run_exec`)
    Run {
        /// The script, which GitLab Runner wrote
        #[arg(value_hint = ValueHint::FilePath)]
        script: PathBuf,
        /// The name of its stage
        stage: String,
    },
    /// Remove the job's machine (`cleanup_exec`)
    Cleanup,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Where the machines are")]
pub(crate) struct Place {
    /// The cluster's kubeconfig [default: this home's `vmpod up`]
    #[arg(long, value_name = "FILE", env = "VMPOD_EXECUTOR_KUBECONFIG", global = true, hide_env_values = true,
          value_hint = ValueHint::FilePath)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context
    #[arg(long, value_name = "NAME", env = "VMPOD_EXECUTOR_CONTEXT", global = true, hide_env_values = true)]
    pub(crate) context: Option<String>,
    /// The namespace of the pods
    #[arg(
        long,
        short,
        value_name = "NAMESPACE",
        env = "VMPOD_EXECUTOR_NAMESPACE",
        global = true,
        hide_env_values = true,
        default_value = "default"
    )]
    pub(crate) namespace: String,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What the machines are")]
pub(crate) struct Machine {
    /// The image of jobs that name none
    #[arg(long, value_name = "IMAGE", env = "VMPOD_EXECUTOR_IMAGE", global = true, hide_env_values = true)]
    pub(crate) image: Option<String>,
    /// Images that a job may ask for with `image:`; `*` stands for any letters (repeatable)
    #[arg(
        long,
        value_name = "PATTERN",
        env = "VMPOD_EXECUTOR_ALLOW_IMAGES",
        global = true,
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub(crate) allow_image: Vec<String>,
    /// The machine's processors, such as 2 or 500m
    #[arg(long, value_name = "N", env = "VMPOD_EXECUTOR_CPUS", global = true, hide_env_values = true,
          value_parser = cpus)]
    pub(crate) cpus: Option<String>,
    /// The machine's memory, such as 512Mi or 4Gi
    #[arg(long, value_name = "SIZE", env = "VMPOD_EXECUTOR_MEMORY", global = true, hide_env_values = true,
          value_parser = parse_size)]
    pub(crate) memory: Option<Size>,
    /// The machine's disk, such as 20Gi (it only grows)
    #[arg(long, value_name = "SIZE", env = "VMPOD_EXECUTOR_DISK", global = true, hide_env_values = true,
          value_parser = parse_size)]
    pub(crate) disk: Option<Size>,
    /// The Secret that holds the guest's user data (in its key `userdata`)
    #[arg(long, value_name = "NAME", env = "VMPOD_EXECUTOR_USER_DATA_SECRET", global = true, hide_env_values = true)]
    pub(crate) user_data_secret: Option<String>,
    /// A label that the machine's node must have, KEY=VALUE (repeatable)
    #[arg(long, value_name = "KEY=VALUE", env = "VMPOD_EXECUTOR_NODE_SELECTOR", global = true, hide_env_values = true,
          value_delimiter = ',', value_parser = key_value)]
    pub(crate) node_selector: Vec<KeyValue>,
    /// Where the guest keeps the job's repository
    #[arg(
        long,
        value_name = "DIR",
        env = "VMPOD_EXECUTOR_BUILDS_DIR",
        global = true,
        hide_env_values = true,
        default_value = "/builds"
    )]
    pub(crate) builds_dir: String,
    /// Where the guest keeps the job's cache
    #[arg(
        long,
        value_name = "DIR",
        env = "VMPOD_EXECUTOR_CACHE_DIR",
        global = true,
        hide_env_values = true,
        default_value = "/cache"
    )]
    pub(crate) cache_dir: String,
    /// The guest's shell, which also decides how GitLab Runner writes its scripts
    #[arg(long, value_name = "SHELL", env = "VMPOD_EXECUTOR_SHELL", global = true, hide_env_values = true,
          default_value = "bash", value_parser = ["bash", "sh"])]
    pub(crate) shell: String,
    /// How long a machine may take until it answers, such as 5m
    #[arg(long, value_name = "DURATION", env = "VMPOD_EXECUTOR_START_TIMEOUT", global = true, hide_env_values = true,
          default_value = "10m", value_parser = super::values::duration)]
    pub(crate) start_timeout: Duration,
}
