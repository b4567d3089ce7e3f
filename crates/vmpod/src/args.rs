//! The command line's words: what can be typed, and nothing about what it does.
//!
//! Every help text is held by a snapshot in `args/tests.rs`, so that a change of the surface shows
//! as a diff.

mod api;
mod eviction;
mod gitlab_executor;
mod guest_login;
mod hypervisor;
mod keda;
mod manifests;
mod network;
mod node;
mod service;
pub(crate) mod values;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

pub(crate) use api::{Api, ApiCommand, Token, TokenCommand, TokenCreate};
pub(crate) use eviction::Eviction;
pub(crate) use gitlab_executor::{GitlabExecutor, Stage};
pub(crate) use guest_login::GuestLogin;
pub(crate) use hypervisor::{Hypervisor, Kind, MachineVz};
pub(crate) use keda::Keda;
pub(crate) use manifests::Manifests;
pub(crate) use network::Network;
pub(crate) use node::{DockerHost, Node, NodeObject};
pub(crate) use service::{Manager, Part, Service, ServiceCommand, ServiceInstall, ServiceUninstall};
pub(crate) use values::{Devices, Firmware, KeyValue, Seed, Size, Source, parse_size};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Kubernetes Pods that are virtual machines.
///
/// `vmpod up` makes this host a Kubernetes node with an API of its own. `vmpod node` joins it to a
/// cluster that is already there. `vmpod run` starts one throwaway machine.
#[derive(Debug, Parser)]
#[command(
    name = "vmpod",
    version,
    styles = STYLES,
    max_term_width = 100,
    propagate_version = false,
    disable_help_subcommand = true,
    after_help = EXIT_CODES
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong usage; 125 vmpod failed before the command of `run` or `exec`
could start; otherwise that command's own.";

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where vmpod keeps its state [default: the XDG state directory, or /var/lib/vmpod for root]
    #[arg(long, value_name = "DIR", env = "VMPOD_HOME", global = true, hide_env_values = true,
          value_hint = ValueHint::DirPath)]
    pub(crate) home: Option<PathBuf>,

    /// Which log lines go to standard error, such as `debug` or `warn,vmpod_node=trace`
    #[arg(long, value_name = "FILTER", env = "VMPOD_LOG", global = true, hide_env_values = true)]
    pub(crate) log: Option<String>,

    /// How log lines look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Human, global = true,
          hide_possible_values = false)]
    pub(crate) log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Up(Up),
    Node(Node),
    Controller(Controller),
    Run(Run),
    Ps(Ps),
    Logs(Logs),
    Exec(Exec),
    Cp(Cp),
    Stop(Stop),
    Image(Image),
    Api(Api),
    Token(Token),
    GitlabExecutor(GitlabExecutor),
    Service(Service),
    Manifests(Manifests),
    #[command(hide = true)]
    MachineVz(MachineVz),
    Doctor(Doctor),
    Completions(Completions),
    Version(Version),
}

/// Where results go and how they look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Names only, one a line.
    Name,
}

#[derive(Debug, Args)]
pub(crate) struct Output {
    /// How the result is printed
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

/// Make this host a Kubernetes node with its own API.
///
/// Starts the Kubernetes API and the node agent in this process, writes a kubeconfig into the home
/// and runs until it is interrupted. Interrupted once, it stops the machines and ends; twice, it ends
/// at once and leaves the machines to the next `vmpod up`, which takes them over.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// The port of the Kubernetes API; 0 picks a free one
    #[arg(long, value_name = "PORT", default_value_t = 6443)]
    pub(crate) api_port: u16,
    #[command(flatten)]
    pub(crate) kubelet: Kubelet,
    /// The address that the Kubernetes API listens on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) listen: IpAddr,
    /// One more name or address for the API's certificate (repeatable)
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_san: Vec<String>,
    /// The node's name [default: this host's name]
    #[arg(long, value_name = "NAME", value_parser = values::node_name)]
    pub(crate) name: Option<String>,
    /// Keep the API as the manifests in this directory say, and follow their changes
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) apply: Option<PathBuf>,
    /// Keep no runner pools
    #[arg(long, conflicts_with_all = ["metrics_listen", "keda_listen"])]
    pub(crate) no_fleet: bool,
    #[command(flatten)]
    pub(crate) fleet: Fleet,
    #[command(flatten)]
    pub(crate) machines: NodeMachines,
}

/// How runner pools are kept.
#[derive(Debug, Args)]
pub(crate) struct Fleet {
    /// How often CI systems are asked about waiting jobs and their machines
    #[arg(long = "fleet-poll", value_name = "DURATION", default_value = "3s", value_parser = values::duration)]
    pub(crate) poll: std::time::Duration,
    /// Where the fleet's metrics are offered, in Prometheus' form, to anybody who asks; without it nowhere
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics_listen: Option<std::net::SocketAddr>,
    #[command(flatten)]
    pub(crate) keda: Keda,
}

/// Keep runner pools in a Kubernetes cluster.
///
/// Runs the fleet operator alone, against the API that a kubeconfig names, until it is interrupted. Of several, one acts at a
/// time. `vmpod up` has it built in.
#[derive(Debug, Args)]
pub(crate) struct Controller {
    /// The kubeconfig of the API [default: as kubectl finds it, or the pod's own service account]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "CONTEXT", requires = "kubeconfig")]
    pub(crate) context: Option<String>,
    /// The namespace of the lease by which operators agree who acts
    #[arg(long, value_name = "NAMESPACE", default_value = "default")]
    pub(crate) lease_namespace: String,
    /// This operator's name among others [default: this host's name and process number]
    #[arg(long, value_name = "NAME")]
    pub(crate) identity: Option<String>,
    /// Leave the definitions of the kinds of the fleet to somebody else
    #[arg(long)]
    pub(crate) no_install: bool,
    #[command(flatten)]
    pub(crate) fleet: Fleet,
}

#[derive(Debug, Args)]
pub(crate) struct Kubelet {
    /// The port of the node's kubelet API; 0 picks a free one
    #[arg(long, value_name = "PORT", default_value_t = 10250)]
    pub(crate) kubelet_port: u16,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct NodeMachines {
    /// Leave the machines running when this process ends
    #[arg(long)]
    pub(crate) keep_vms: bool,
    /// How many pods this node takes
    #[arg(long, value_name = "N", default_value_t = 110)]
    pub(crate) max_pods: u32,
    #[command(flatten)]
    pub(crate) object: NodeObject,
    /// Memory that isn't given to machines, such as 2Gi
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) reserve_memory: Option<Size>,
    /// How much of the disk memory snapshots of images may take; 0 turns them off
    #[arg(long, value_name = "SIZE", default_value = "20Gi", value_parser = values::parse_size_or_none)]
    pub(crate) snapshots: Size,
    /// How long machines may take to shut down when this process ends
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    pub(crate) shutdown_grace: std::time::Duration,
    #[command(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    pub(crate) docker: DockerHost,
    /// What executes the guests [default: KVM or Hypervisor.framework where it works, else software]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) accel: Option<Accel>,
    #[command(flatten)]
    pub(crate) hypervisor: Hypervisor,
    #[command(flatten)]
    pub(crate) guest_login: GuestLogin,
    /// A registry that may be spoken to without TLS, HOST or HOST:PORT (repeatable; loopback always may)
    #[arg(long, value_name = "HOST")]
    pub(crate) plain_http: Vec<String>,
    /// One more certificate authority for registries, PEM (repeatable)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) registry_ca: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) sources: Sources,
    #[command(flatten)]
    pub(crate) images: NodeImages,
    #[command(flatten)]
    pub(crate) eviction: Eviction,
}

/// Which images the node keeps.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeImages {
    /// The most room that images take, such as 200Gi; the longest unused go first [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) image_budget: Option<Size>,
    /// Images that nobody uses are removed when so many percent of their file system are used
    #[arg(long, value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) image_gc_high: u8,
    /// And until no more than so many percent are
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) image_gc_low: u8,
    /// An image to have before any pod asks for it (repeatable)
    #[arg(long, value_name = "IMAGE")]
    pub(crate) prefetch: Vec<String>,
}

impl Default for NodeImages {
    fn default() -> Self {
        Self { image_budget: None, image_gc_high: 85, image_gc_low: 80, prefetch: Vec::new() }
    }
}

/// What executes the guests' instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accel {
    /// Linux's KVM.
    Kvm,
    /// macOS's Hypervisor.framework.
    Hvf,
    /// Software emulation: works everywhere, several times slower.
    Tcg,
}

/// Run a command in a throwaway machine.
///
/// Boots IMAGE, runs CMD in it as its main process, prints its output and ends with its exit code;
/// the machine is gone afterwards. Without CMD the machine's console is printed until it powers
/// itself off; with -i or -t a shell runs instead. Uses the `vmpod up` of the same home when one is
/// running, else a private one for the time it takes.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches of a command line")]
pub(crate) struct Run {
    /// The image: a name in the store (`vmpod image ls`) or a registry reference
    pub(crate) image: String,
    /// The command and its arguments
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// The machine's processors, such as 2 or 500m
    #[arg(long, value_name = "N", value_parser = values::cpus)]
    pub(crate) cpus: Option<String>,
    /// The machine's memory, such as 512Mi or 4Gi
    #[arg(long, short, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<Size>,
    /// The machine's disk, such as 20Gi (it only grows)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) disk: Option<Size>,
    /// The pod's name [default: the image's, and a few letters]
    #[arg(long, value_name = "NAME", value_parser = values::pod_name)]
    pub(crate) name: Option<String>,
    /// Pass standard input to the command
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
    /// An environment variable for the command, KEY=VALUE (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = values::key_value)]
    pub(crate) env: Vec<KeyValue>,
    #[command(flatten)]
    pub(crate) hypervisor: Hypervisor,
    #[command(flatten)]
    pub(crate) guest_login: GuestLogin,
    /// Cloud-init user data for the guest, from a file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) user_data: Option<PathBuf>,
    /// Remove the pod at the end (the default)
    #[arg(long, overrides_with = "keep", hide = true)]
    pub(crate) rm: bool,
    /// Leave the finished pod to `vmpod ps` and `vmpod logs` (needs a running `vmpod up`)
    #[arg(long, overrides_with = "rm")]
    pub(crate) keep: bool,
    /// Print the pod's name and don't wait (needs a running `vmpod up`)
    #[arg(short, long, conflicts_with_all = ["stdin", "tty"])]
    pub(crate) detach: bool,
    /// Say nothing but what the command says
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Namespace {
    /// The namespace
    #[arg(short, long, value_name = "NAMESPACE", default_value = "default")]
    pub(crate) namespace: String,
}

/// List the machines.
#[derive(Debug, Args)]
pub(crate) struct Ps {
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(crate) all_namespaces: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Print what a machine wrote: its main process, or its console.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// The pod
    pub(crate) pod: String,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// The container [default: the first, which is the machine]
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Keep printing as more is written
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Of the instance before the last restart
    #[arg(short, long)]
    pub(crate) previous: bool,
    /// With the time of each line
    #[arg(long)]
    pub(crate) timestamps: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u32>,
    /// Only the last while, such as 90s or 2h
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(crate) since: Option<std::time::Duration>,
}

/// Run a command in a running machine and end with its exit code.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// The pod
    pub(crate) pod: String,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// The container [default: the first, which is the machine]
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Pass standard input to the command
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
}

/// Copy a file into a machine or out of it.
///
/// One of FROM and TO is POD:PATH, the other a local path. `-` is standard input or output.
#[derive(Debug, Args)]
pub(crate) struct Cp {
    /// The source
    pub(crate) from: String,
    /// The destination
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
}

/// Stop machines and remove them.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// The pods
    #[arg(required = true, value_name = "POD")]
    pub(crate) pods: Vec<String>,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// How long a guest may take to shut down [default: the pod's grace period]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(crate) grace: Option<std::time::Duration>,
}

/// Manage machine images.
///
/// A name without a registry host, such as `tiny` or `debian:12`, is local to this host's store. A name
/// with one, such as `registry.example.com/ci/debian:12`, can be pulled and pushed.
#[derive(Debug, Args)]
pub(crate) struct Image {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    Import(Box<Import>),
    Build(Box<Build>),
    Commit(Commit),
    Export(Export),
    Convert(Convert),
    Ls(Ls),
    Inspect(Inspect),
    Rm(Rm),
    Pull(Pull),
    Push(Push),
    Verify(Verify),
    Prune(Prune),
}

/// Make an image of a disk, a kernel or an OCI layout.
///
/// PATH is a raw or qcow2 disk, or a directory that holds an OCI image layout; leave it out for a guest
/// that is only a kernel and an initrd.
#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The disk or the OCI layout, then the image's name; only the name for a guest without a disk
    #[arg(value_names = ["PATH", "NAME"], num_args = 1..=2, required = true)]
    pub(crate) path_and_name: Vec<String>,
    /// What PATH is [default: looked up in the file]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) format: Option<Source>,
    #[command(flatten)]
    pub(crate) boot: ImportBoot,
    #[command(flatten)]
    pub(crate) guest: ImportGuest,
    #[command(flatten)]
    pub(crate) facts: ImportFacts,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "How it boots")]
pub(crate) struct ImportBoot {
    /// Boot this kernel directly
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's first userland
    #[arg(long, value_name = "FILE", requires = "kernel", value_hint = ValueHint::FilePath)]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "WORDS", requires = "kernel", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// The firmware that boots the disk [default: uefi]
    #[arg(long, value_name = "KIND", value_enum, conflicts_with = "kernel")]
    pub(crate) firmware: Option<Firmware>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "How the guest is reached")]
pub(crate) struct ImportGuest {
    /// The user that vmpod logs in as
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// A file with that user's password, for guests that take no key
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) password_file: Option<PathBuf>,
    /// The port of the guest's SSH server [default: 22]
    #[arg(long, value_name = "PORT")]
    pub(crate) ssh_port: Option<u16>,
    /// How the guest learns its name and key [default: nocloud]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) seed: Option<Seed>,
    /// A line that the guest prints on its console once its SSH server listens
    #[arg(long, value_name = "TEXT")]
    pub(crate) ready_marker: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What it is")]
pub(crate) struct ImportFacts {
    /// The guest's operating system: linux, darwin, windows or freebsd [default: linux]
    #[arg(long, value_name = "OS")]
    pub(crate) os: Option<vmpod_image::Os>,
    /// The guest's architecture, amd64 or arm64 [default: this host's]
    #[arg(long, value_name = "ARCH")]
    pub(crate) arch: Option<vmpod_image::Architecture>,
    /// The fewest processors that it works with
    #[arg(long, value_name = "N")]
    pub(crate) min_cpus: Option<u32>,
    /// The least memory that it works with, such as 512Mi
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) min_memory: Option<Size>,
    /// The kind of its disks' and network's devices [default: virtio]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) devices: Option<Devices>,
    /// It needs a TPM 2.0, as Windows 11 does
    #[arg(long)]
    pub(crate) tpm: bool,
    /// A label, KEY=VALUE (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::key_value)]
    pub(crate) label: Vec<KeyValue>,
}

/// Make an image of another one: boot it, do what a file says, seal it.
///
/// FILE is YAML: `from:` names the image to begin from, `steps:` what to do in its guest (copy, run, script, ansible),
/// `seal:` what is wiped at the end. Nothing is left of the machine, and there is no image unless every step succeeded.
#[derive(Debug, Args)]
pub(crate) struct Build {
    /// The recipe
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// The new image's name
    pub(crate) name: String,
    /// What executes the guest [default: KVM or Hypervisor.framework where it works, else software]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) accel: Option<Accel>,
    #[command(flatten)]
    pub(crate) hypervisor: Hypervisor,
    #[command(flatten)]
    pub(crate) registry: Registry,
    #[command(flatten)]
    pub(crate) sources: Sources,
}

/// Make an image of a pod's machine while it runs on this host.
///
/// The guest's file systems are frozen while its disk is copied. The image keeps the machine's identity (its
/// machine-id, its SSH host keys): `vmpod image build` makes images for many machines.
#[derive(Debug, Args)]
pub(crate) struct Commit {
    /// The pod
    pub(crate) pod: String,
    /// The new image's name
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// Copy the disk as it is, as after a power failure
    #[arg(long)]
    pub(crate) no_freeze: bool,
    /// A label, KEY=VALUE (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::key_value)]
    pub(crate) label: Vec<KeyValue>,
}

/// Write an image to a file or a directory that other tools read.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The image
    pub(crate) image: String,
    /// The file or directory to make
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// What to write
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Target::Oci)]
    pub(crate) format: Target,
}

/// Turn an image or a disk of one format into another.
///
/// FROM is an image of the store, a raw or qcow2 disk, or an OCI layout (whatever image it holds). TO is a
/// name for `--to native`, else a file or directory.
#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// The image, disk or OCI layout
    pub(crate) from: String,
    /// The name, file or directory to make
    pub(crate) to: String,
    /// What to make
    #[arg(long = "to", value_name = "FORMAT", value_enum, default_value_t = Target::Native)]
    pub(crate) format: Target,
    #[command(flatten)]
    pub(crate) boot: ConvertBoot,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertBoot {
    /// The firmware that boots a raw or qcow2 disk [default: uefi]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) firmware: Option<Firmware>,
}

/// What an image is turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// An image of this store, in vmpod's format
    Native,
    /// An OCI layout in vmpod's format
    Oci,
    /// An OCI layout with a containerDisk, as `KubeVirt` takes it
    Containerdisk,
    /// The first disk as it is
    Raw,
    /// The first disk as a qcow2 file
    Qcow2,
}

/// List the images.
#[derive(Debug, Args)]
pub(crate) struct Ls {
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Show what an image is made of.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The image
    pub(crate) image: String,
    /// How the result is printed
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Json)]
    pub(crate) output: Format,
}

/// Remove images from the store.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// The images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// Read images whole and say what is damaged.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The images [default: all]
    #[arg(value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// Make room in the store.
///
/// Removes what unfinished pulls left. Images that a machine uses, and images with a local name, always stay.
#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Remove the images of registries that no machine uses, too
    #[arg(long)]
    pub(crate) unused: bool,
    /// Of those, only as many as it takes, the longest unused first, until the store has this size
    #[arg(long, value_name = "SIZE", requires = "unused", value_parser = parse_size)]
    pub(crate) down_to: Option<Size>,
}

/// Fetch an image from a registry.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The image, with its registry's host
    pub(crate) image: String,
    #[command(flatten)]
    pub(crate) registry: Registry,
    #[command(flatten)]
    pub(crate) sources: Sources,
}

/// From where images may come, and who must vouch for them.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Sources {
    /// A registry to ask before another one, REGISTRY=HOST or REGISTRY=HOST:PORT/PATH (repeatable)
    #[arg(long, value_name = "REGISTRY=MIRROR")]
    pub(crate) registry_mirror: Vec<vmpod_image::Mirror>,
    /// Take images of SCOPE (a registry or the beginning of a name; * for all) only when cosign's key in FILE signed them (repeatable)
    #[arg(long, value_name = "SCOPE=FILE", value_parser = values::key_value)]
    pub(crate) require_signature: Vec<KeyValue>,
}

/// Send an image to a registry.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// The image in the store
    pub(crate) image: String,
    /// The name in the registry, with its host [default: IMAGE]
    pub(crate) to: Option<String>,
    /// What to make of it
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Pushed::Native)]
    pub(crate) format: Pushed,
    /// An annotation of the manifest, KEY=VALUE (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::key_value)]
    pub(crate) annotation: Vec<KeyValue>,
    /// Where the image's source is kept: annotation org.opencontainers.image.source
    #[arg(long, value_name = "URL")]
    pub(crate) source: Option<String>,
    /// The revision of the source: annotation org.opencontainers.image.revision
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Say when it was pushed: annotation org.opencontainers.image.created
    #[arg(long)]
    pub(crate) created: bool,
    /// A repository of the same registry that may have the layers already
    #[arg(long, value_name = "REPOSITORY")]
    pub(crate) mount_from: Option<String>,
    #[command(flatten)]
    pub(crate) registry: Registry,
}

/// What an image is pushed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pushed {
    /// Vmpod's format
    Native,
    /// A containerDisk, as `KubeVirt` takes it
    Containerdisk,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Registry")]
pub(crate) struct Registry {
    /// Speak HTTP without TLS (always allowed to a loopback address)
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// One more certificate authority to trust, PEM
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ca: Option<PathBuf>,
    /// A docker configuration file with credentials [default: the user's]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) auth_file: Option<PathBuf>,
}

/// Say what this host can and can't do, and how to mend it.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) hypervisor: Hypervisor,
    #[command(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    pub(crate) docker: DockerHost,
    /// The port of the Kubernetes API that should be free
    #[arg(long, value_name = "PORT", default_value_t = 6443)]
    pub(crate) api_port: u16,
    #[command(flatten)]
    pub(crate) kubelet: Kubelet,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Print a completion script for a shell.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Print the version.
#[derive(Debug, Args)]
pub(crate) struct Version {
    #[command(flatten)]
    pub(crate) output: Output,
}

#[cfg(test)]
mod tests;
