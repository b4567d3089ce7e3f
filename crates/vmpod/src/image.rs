//! `vmpod image`: the store's verbs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use tokio::sync::watch;
use vmpod_image::{
    Boot, Config, Credentials, DeviceKind, ExportFormat, GuestConfig, Hardware, Image, ImportOptions,
    Progress as Transfer, PublicKey, PullOptions, PushFormat, PushOptions, Reference, SeedKind, SignaturePolicy,
    Source, Store, media,
};

use crate::args::{self, Format, ImageCommand};
use crate::home::Home;
use crate::output::{self, Progress, talk};
use crate::report::{Exit, Remedy};

/// Runs one verb.
pub(crate) async fn run(home: &Home, command: ImageCommand) -> Result<Exit> {
    if let ImageCommand::Build(args) = command {
        return Box::pin(crate::build::run(home, *args)).await;
    }
    let store = open(home)?;
    match command {
        ImageCommand::Import(args) => import(&store, *args).await?,
        ImageCommand::Build(_) => {}
        ImageCommand::Commit(args) => crate::commit::run(home, &store, &args).await?,
        ImageCommand::Export(args) => export(&store, &args).await?,
        ImageCommand::Convert(args) => convert(&store, &args).await?,
        ImageCommand::Ls(args) => ls(&store, args.output.output)?,
        ImageCommand::Inspect(args) => inspect(&store, &args)?,
        ImageCommand::Rm(args) => rm(&store, &args)?,
        ImageCommand::Pull(args) => pull(&store, &args).await?,
        ImageCommand::Push(args) => push(&store, &args).await?,
        ImageCommand::Verify(args) => verify(&store, &args).await?,
        ImageCommand::Prune(args) => prune(&store, &args)?,
    }
    Ok(Exit::Done)
}

/// Opens the home's store.
pub(crate) fn open(home: &Home) -> Result<Store> {
    home.make()?;
    Store::open(&home.images()).with_context(|| format!("can't open the image store {}", home.images().display()))
}

/// Parses a name of an image as it was typed.
pub(crate) fn reference(text: &str) -> Result<Reference> {
    Reference::parse(text).map_err(|error| {
        anyhow::Error::new(error).context(Remedy::new(
            format!("{text:?} is not an image's name"),
            "write NAME[:TAG] for an image of this host, HOST/REPOSITORY[:TAG] for one of a registry",
        ))
    })
}

/// The image of this name, or an error that tells what is like it.
pub(crate) fn find(store: &Store, reference: &Reference) -> Result<Image> {
    let found = store.get(reference).with_context(|| format!("can't look up image {reference}"))?;
    found.ok_or_else(|| missing(store, reference))
}

/// The error of an image that isn't there.
pub(crate) fn missing(store: &Store, reference: &Reference) -> anyhow::Error {
    let names: Vec<String> =
        store.list().unwrap_or_default().iter().flat_map(|image| image.references.iter().map(short)).collect();
    let near = near_names(&short(reference), &names);
    let mut remedy = match near.as_slice() {
        [] if names.is_empty() => "the store is empty; add an image with `vmpod image import PATH NAME`".to_owned(),
        [] => "see the names with `vmpod image ls`".to_owned(),
        near => format!("did you mean {}?", near.join(" or ")),
    };
    if !reference.is_local() {
        remedy = format!("fetch it with `vmpod image pull {reference}`; {remedy}");
    }
    Remedy::new(format!("there is no image {} in the store", short(reference)), remedy).into()
}

/// A name as a person types it: without the tag that goes without saying.
fn short(reference: &Reference) -> String {
    let text = reference.to_string();
    text.strip_suffix(":latest").map_or(text.clone(), str::to_owned)
}

/// The names that are like `wanted`, the nearest first, at most three.
fn near_names(wanted: &str, names: &[String]) -> Vec<String> {
    let mut near: Vec<(usize, &String)> = names
        .iter()
        .map(|name| {
            let part = name.contains(wanted) || wanted.contains(name.as_str());
            (if part { 1 } else { distance(wanted, name) }, name)
        })
        .filter(|(distance, name)| *distance <= 1 + wanted.len().min(name.len()) / 3)
        .collect();
    near.sort();
    near.dedup();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

/// How many letters must change to make one name the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

async fn import(store: &Store, args: args::Import) -> Result<()> {
    let (path, name) = match args.path_and_name.as_slice() {
        [path, name] => (Some(PathBuf::from(path)), name.clone()),
        [name] => (None, name.clone()),
        words => anyhow::bail!("PATH and NAME are wanted, not {} words", words.len()),
    };
    let source = match (path, args.format) {
        (Some(path), Some(args::Source::Raw)) => Source::Raw(path),
        (Some(path), Some(args::Source::Qcow2)) => Source::Qcow2(path),
        (Some(path), Some(args::Source::Oci)) => Source::OciLayout(path),
        (Some(path), None) => {
            Source::detect(&path).with_context(|| format!("can't tell what {} is", path.display()))?
        }
        (None, _) if args.boot.kernel.is_some() => Source::Kernel,
        (None, _) => {
            return Err(Remedy::new(
                format!("there is nothing to make image {name} of"),
                format!("give a disk or an OCI layout (`vmpod image import PATH {name}`), or a kernel with --kernel"),
            )
            .into());
        }
    };
    let password = match &args.guest.password_file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("can't read the password file {}", path.display()))?;
            Some(text.trim_end_matches(['\r', '\n']).to_owned())
        }
        None => None,
    };
    let usual = GuestConfig::default();
    let defaults = ImportOptions::default();
    let (meter, drawn) = draw(format!("importing {name}"));
    let options = ImportOptions {
        os: args.facts.os.unwrap_or(defaults.os),
        architecture: args.facts.arch.unwrap_or(defaults.architecture),
        firmware: firmware(args.boot.firmware, defaults.firmware),
        kernel: args.boot.kernel,
        initrd: args.boot.initrd,
        cmdline: args.boot.cmdline.unwrap_or_default(),
        min_cpus: args.facts.min_cpus,
        min_memory: args.facts.min_memory.map(|size| size.bytes),
        hardware: Hardware {
            devices: match args.facts.devices {
                Some(args::Devices::Emulated) => DeviceKind::Emulated,
                Some(args::Devices::Virtio) | None => DeviceKind::Virtio,
            },
            tpm: args.facts.tpm,
        },
        guest: GuestConfig {
            user: args.guest.user.unwrap_or(usual.user),
            ssh_port: args.guest.ssh_port.unwrap_or(usual.ssh_port),
            password,
            seed: match args.guest.seed {
                None => usual.seed,
                Some(args::Seed::Nocloud) => SeedKind::Nocloud,
                Some(args::Seed::Configdrive) => SeedKind::Configdrive,
                Some(args::Seed::None) => SeedKind::None,
            },
            ready_marker: args.guest.ready_marker,
        },
        labels: args.facts.label.into_iter().map(|label| (label.key, label.value)).collect(),
        progress: Some(meter),
    };
    let name = reference(&name)?;
    let image = drawn.until(vmpod_image::import(store, source, &name, options)).await;
    let image = image.with_context(|| format!("can't import image {}", short(&name)))?;
    talk(&format!("imported {} ({})", short(&name), output::bytes(image.transfer_bytes)));
    output::data(&format!("{}\n", image.digest))
}

async fn export(store: &Store, args: &args::Export) -> Result<()> {
    let name = reference(&args.image)?;
    let image = find(store, &name)?;
    let Some(format) = file_format(args.format) else {
        return Err(Remedy::new(
            "an image of the store is no file",
            format!("make one with `vmpod image convert {} NEW-NAME`", short(&name)),
        )
        .into());
    };
    write_out(store, &image, &name, &args.path, format).await
}

/// The format of a file or directory; none for an image of the store.
fn file_format(target: args::Target) -> Option<ExportFormat> {
    match target {
        args::Target::Native => None,
        args::Target::Oci => Some(ExportFormat::OciLayout),
        args::Target::Containerdisk => Some(ExportFormat::ContainerDisk),
        args::Target::Raw => Some(ExportFormat::Raw),
        args::Target::Qcow2 => Some(ExportFormat::Qcow2),
    }
}

async fn write_out(store: &Store, image: &Image, name: &Reference, path: &Path, format: ExportFormat) -> Result<()> {
    let spinner = Progress::spinner(format!("exporting {}", short(name)));
    let done = vmpod_image::export(store, image, path, format, name).await;
    spinner.clear();
    done.with_context(|| format!("can't export image {} to {}", short(name), path.display()))?;
    talk(&format!("exported {} to {}", short(name), path.display()));
    Ok(())
}

async fn convert(store: &Store, args: &args::Convert) -> Result<()> {
    let path = Path::new(&args.from);
    // Whoever means a file of the name of an image writes ./NAME.
    let named = reference(&args.from).ok().and_then(|name| store.get(&name).ok().flatten().map(|image| (name, image)));
    if let (Some((name, image)), None) = (&named, file_format(args.format)) {
        let to = reference(&args.to)?;
        let made = vmpod_image::convert(store, image, &to).await;
        let made = made.with_context(|| format!("can't convert image {}", short(name)))?;
        return output::data(&format!("{}\n", made.digest));
    }
    if let (Some((name, image)), Some(format)) = (&named, file_format(args.format)) {
        return write_out(store, image, name, Path::new(&args.to), format).await;
    }
    if !path.exists() {
        return Err(match reference(&args.from) {
            Ok(name) => missing(store, &name),
            Err(error) => error,
        });
    }
    let source = Source::detect(path).with_context(|| format!("can't tell what {} is", path.display()))?;
    let options = ImportOptions {
        firmware: firmware(args.boot.firmware, ImportOptions::default().firmware),
        ..ImportOptions::default()
    };
    let Some(format) = file_format(args.format) else {
        let to = reference(&args.to)?;
        let image = vmpod_image::import(store, source, &to, options).await;
        let image = image.with_context(|| format!("can't import {}", path.display()))?;
        let image = vmpod_image::convert(store, &image, &to).await?;
        return output::data(&format!("{}\n", image.digest));
    };
    // Through a store of its own beside the target: what isn't asked for mustn't stay in this one.
    let to = Path::new(&args.to);
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let scratch = tempfile::Builder::new()
        .prefix(".vmpod-convert-")
        .tempdir_in(dir)
        .with_context(|| format!("can't make a directory in {}", dir.display()))?;
    let between = Store::open(scratch.path())?;
    let name = reference("converted")?;
    let (meter, drawn) = draw(format!("reading {}", path.display()));
    let options = ImportOptions { progress: Some(meter), ..options };
    let image = drawn.until(vmpod_image::import(&between, source, &name, options)).await;
    let image = image.with_context(|| format!("can't read {}", path.display()))?;
    write_out(&between, &image, &name, to, format).await
}

fn firmware(asked: Option<args::Firmware>, usual: vmpod_image::Firmware) -> vmpod_image::Firmware {
    match asked {
        None => usual,
        Some(args::Firmware::Bios) => vmpod_image::Firmware::Bios,
        Some(args::Firmware::Uefi) => vmpod_image::Firmware::Uefi,
        Some(args::Firmware::Secure) => vmpod_image::Firmware::Secure,
    }
}

/// One image as `-o json` tells it.
#[derive(Serialize)]
struct Told<'a> {
    references: Vec<String>,
    digest: String,
    format: &'a str,
    created: jiff::Timestamp,
    /// Bytes that a registry holds for it.
    #[serde(rename = "transferBytes")]
    transfer: u64,
    /// Bytes that it takes here.
    #[serde(rename = "storedBytes")]
    stored: u64,
    config: Config,
}

impl<'a> From<&'a Image> for Told<'a> {
    fn from(image: &'a Image) -> Self {
        let mut config = image.config.clone();
        // It is in the image for whoever has the image, but results end up in logs.
        if config.guest.password.is_some() {
            config.guest.password = Some("…".into());
        }
        Self {
            references: image.references.iter().map(ToString::to_string).collect(),
            digest: image.digest.to_string(),
            format: &image.format,
            created: image.created,
            transfer: image.transfer_bytes,
            stored: image.stored_bytes,
            config,
        }
    }
}

fn ls(store: &Store, format: Format) -> Result<()> {
    let images = store.list().context("can't list the images")?;
    let images: Vec<Told<'_>> = images.iter().map(Told::from).collect();
    let now = jiff::Timestamp::now();
    output::list(
        format,
        &images,
        &["name", "digest", "os", "arch", "boot", "size", "age"],
        |image| {
            let age = now.duration_since(image.created).try_into().unwrap_or_default();
            vec![
                name_of(image),
                image.digest.chars().take(19).collect(),
                image.config.os.to_string(),
                image.config.architecture.to_string(),
                boot_word(&image.config.boot).into(),
                output::bytes(image.stored),
                output::age(age),
            ]
        },
        name_of,
    )
}

fn name_of(image: &Told<'_>) -> String {
    if image.references.is_empty() { image.digest.clone() } else { image.references.join(", ") }
}

fn boot_word(boot: &Boot) -> &'static str {
    match boot {
        Boot::Kernel { .. } => "kernel",
        Boot::Firmware(vmpod_image::Firmware::Bios) => "bios",
        Boot::Firmware(vmpod_image::Firmware::Uefi) => "uefi",
        Boot::Firmware(vmpod_image::Firmware::Secure) => "secure",
    }
}

fn inspect(store: &Store, args: &args::Inspect) -> Result<()> {
    let image = find(store, &reference(&args.image)?)?;
    match args.output {
        Format::Name => output::data(&format!("{}\n", image.digest)),
        format => output::value(format, &Told::from(&image)),
    }
}

fn rm(store: &Store, args: &args::Rm) -> Result<()> {
    // All names are checked first, so that a typing error removes nothing.
    let names = args.images.iter().map(|name| reference(name)).collect::<Result<Vec<_>>>()?;
    for name in &names {
        find(store, name)?;
    }
    for name in &names {
        store.remove(name).with_context(|| format!("can't remove image {}", short(name)))?;
        talk(&format!("removed {}", short(name)));
    }
    Ok(())
}

async fn verify(store: &Store, args: &args::Verify) -> Result<()> {
    let images = if args.images.is_empty() {
        store.list().context("can't list the images")?
    } else {
        args.images.iter().map(|name| find(store, &reference(name)?)).collect::<Result<_>>()?
    };
    let mut damaged = Vec::new();
    for image in images {
        let name = image.references.first().map_or_else(|| image.digest.to_string(), short);
        let spinner = Progress::spinner(format!("reading {name}"));
        let (its_store, its_image) = (store.clone(), image.clone());
        let damage = tokio::task::spawn_blocking(move || its_store.verify(&its_image)).await;
        spinner.clear();
        let damage =
            damage.context("reading the image panicked")?.with_context(|| format!("can't read image {name}"))?;
        if damage.is_empty() {
            output::data(&format!("{name}: whole\n"))?;
            continue;
        }
        for part in damage {
            output::data(&format!("{name}: damaged: {part}\n"))?;
        }
        damaged.push(name);
    }
    match damaged.as_slice() {
        [] => Ok(()),
        names => Err(Remedy::new(
            format!(
                "{} of the store can't be used: {}",
                if names.len() == 1 { "an image" } else { "images" },
                names.join(", ")
            ),
            "remove them with `vmpod image rm`, then import or pull them again; and look after the disk",
        )
        .into()),
    }
}

fn prune(store: &Store, args: &args::Prune) -> Result<()> {
    let what = vmpod_image::Prune {
        unfinished: true,
        unused: args.unused,
        down_to: args.down_to.as_ref().map(|size| size.bytes),
        ..vmpod_image::Prune::default()
    };
    let pruned = store.prune(what).context("can't prune the store")?;
    for digest in &pruned.images {
        output::data(&format!("{digest}\n"))?;
    }
    talk(&format!("freed {}", output::bytes(pruned.bytes)));
    Ok(())
}

async fn pull(store: &Store, args: &args::Pull) -> Result<()> {
    let name = reference(&args.image)?;
    if name.is_local() {
        return Err(Remedy::new(
            format!("{} names an image of this host, and no registry", short(&name)),
            format!("name the registry: `vmpod image pull HOST/{}`", short(&name)),
        )
        .into());
    }
    let image = fetch(store, &name, &args.registry, &args.sources).await?;
    output::data(&format!("{}\n", image.digest))
}

/// Pulls an image and draws it.
pub(crate) async fn fetch(
    store: &Store,
    name: &Reference,
    registry: &args::Registry,
    sources: &args::Sources,
) -> Result<Image> {
    let (meter, drawn) = draw(format!("pulling {name}"));
    let options = PullOptions {
        credentials: credentials(registry)?,
        plain_http: plain_http(registry, name),
        ca_files: registry.ca.iter().cloned().collect(),
        mirrors: sources.registry_mirror.clone(),
        signatures: signatures(sources)?,
        progress: Some(meter),
        ..PullOptions::default()
    };
    let image = drawn.until(vmpod_image::pull(store, name, options)).await;
    let image = image.with_context(|| format!("can't pull image {name}"))?;
    talk(&format!("pulled {name} ({})", output::bytes(image.transfer_bytes)));
    Ok(image)
}

async fn push(store: &Store, args: &args::Push) -> Result<()> {
    let from = reference(&args.image)?;
    let to = args.to.as_deref().map_or(Ok(from.clone()), reference)?;
    find(store, &from)?;
    if to.is_local() {
        return Err(Remedy::new(
            format!("{} names no registry to push to", short(&to)),
            format!("name it: `vmpod image push {} HOST/{}`", short(&from), short(&to)),
        )
        .into());
    }
    let mut annotations: BTreeMap<String, String> =
        args.annotation.iter().map(|pair| (pair.key.clone(), pair.value.clone())).collect();
    let created = args.created.then(|| jiff::Timestamp::now().to_string());
    let known =
        [(media::OCI_SOURCE, &args.source), (media::OCI_REVISION, &args.revision), (media::OCI_CREATED, &created)];
    annotations.extend(known.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))));
    let (meter, drawn) = draw(format!("pushing {to}"));
    let options = PushOptions {
        format: match args.format {
            args::Pushed::Native => PushFormat::Native,
            args::Pushed::Containerdisk => PushFormat::ContainerDisk,
        },
        annotations,
        mount_from: args.mount_from.clone(),
        credentials: credentials(&args.registry)?,
        plain_http: plain_http(&args.registry, &to),
        ca_files: args.registry.ca.iter().cloned().collect(),
        progress: Some(meter),
        ..PushOptions::default()
    };
    let digest = drawn.until(vmpod_image::push(store, &from, &to, options)).await;
    let digest = digest.with_context(|| format!("can't push image {} as {to}", short(&from)))?;
    talk(&format!("pushed {to}"));
    output::data(&format!("{digest}\n"))
}

/// The policy that a command line names.
pub(crate) fn signatures(sources: &args::Sources) -> Result<Vec<SignaturePolicy>> {
    let policy = |pair: &args::KeyValue| {
        let scope = if pair.key == "*" { String::new() } else { pair.key.clone() };
        Ok(SignaturePolicy { scope, key: PublicKey::read(Path::new(&pair.value))? })
    };
    sources.require_signature.iter().map(policy).collect()
}

fn credentials(registry: &args::Registry) -> Result<Credentials> {
    match &registry.auth_file {
        None => Ok(Credentials::from_environment(|name| std::env::var_os(name))),
        // It alone: the usual files might know the registry under another name.
        Some(path) if Path::exists(path) => Ok(Credentials::default().with_file(path.clone())),
        Some(path) => Err(Remedy::new(
            format!("there is no credentials file {}", path.display()),
            "give --auth-file a docker configuration file (config.json)",
        )
        .into()),
    }
}

fn plain_http(registry: &args::Registry, name: &Reference) -> Vec<String> {
    if registry.plain_http { name.registry().map(str::to_owned).into_iter().collect() } else { Vec::new() }
}

/// A transfer that is being drawn.
pub(crate) struct Drawn {
    progress: Progress,
    transfer: watch::Receiver<Transfer>,
    what: String,
}

/// Draws a transfer on a terminal.
pub(crate) fn draw(what: String) -> (watch::Sender<Transfer>, Drawn) {
    let (sender, transfer) = watch::channel(Transfer::default());
    (sender, Drawn { progress: Progress::spinner(what.clone()), transfer, what })
}

impl Drawn {
    /// Draws until `work` is over; returns its result.
    pub(crate) async fn until<T>(mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => {
                    self.progress.clear();
                    return result;
                }
                Ok(()) = self.transfer.changed() => {
                    let now = self.transfer.borrow_and_update().clone();
                    self.progress.say(format!("{}: {now}", self.what));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        ["tiny", "debian:12", "debian:13", "registry.example.com/ci/ubuntu:24.04"].map(str::to_owned).to_vec()
    }

    #[test]
    fn a_slip_of_the_finger_finds_its_name() {
        assert_eq!(near_names("tny", &names()), ["tiny"]);
        assert_eq!(near_names("debian", &names()), ["debian:12", "debian:13"]);
        assert_eq!(near_names("ubuntu", &names()), ["registry.example.com/ci/ubuntu:24.04"]);
        assert_eq!(near_names("windows", &names()), Vec::<String>::new());
    }

    #[test]
    fn the_file_that_was_named_is_the_only_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let named = |auth_file| args::Registry { plain_http: false, ca: None, auth_file: Some(auth_file) };
        let found = credentials(&named(path.clone())).unwrap();
        assert_eq!(format!("{found:?}"), format!("{:?}", Credentials::default().with_file(path)));
        assert!(credentials(&named("/no/such/file".into())).is_err());
    }

    #[test]
    fn the_distance_is_levenshteins() {
        for (a, b, d) in [("", "", 0), ("a", "", 1), ("kitten", "sitting", 3), ("tiny", "tiny", 0)] {
            assert_eq!((distance(a, b), distance(b, a)), (d, d));
        }
    }
}
