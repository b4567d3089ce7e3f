//! Pods whose machines go on from a memory snapshot, beside the same pods booted.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;

use super::super::process;
use super::super::samples::Samples;
use super::{Kind, create, delete, exec_true, ready};

const TINY: Kind = Kind { image: "tiny", start: "snapshot", cpus: "1", memory: "256Mi", node: None };
const DEBIAN: Kind = Kind { image: "debian", start: "snapshot", cpus: "2", memory: "512Mi", node: None };
const DEBIAN_COLD: Kind = Kind { start: "boot", ..DEBIAN };
/// Copies that share one memory.
const COPIES: u32 = 6;

/// Seconds and MiB.
#[derive(Default)]
pub(super) struct Warm {
    pub(super) tiny: Samples,
    pub(super) debian: Samples,
    pub(super) debian_cold: Samples,
    /// Of one copy, beside five others.
    pub(super) rss_mib: f64,
    pub(super) pss_mib: f64,
}

pub(super) async fn measure(pods: &Api<Pod>, rounds: u32, machines: &Path) -> Result<Warm> {
    let mut warm = Warm::default();
    // The first of each kind makes the template.
    until_exec(pods, "warm-up", &TINY).await?;
    for _ in 0..rounds {
        warm.tiny.push(until_exec(pods, "warm", &TINY).await?);
    }
    until_exec(pods, "warm-up", &DEBIAN).await?;
    for _ in 0..rounds.div_ceil(3) {
        warm.debian_cold.push(until_exec(pods, "cold", &DEBIAN_COLD).await?);
        warm.debian.push(until_exec(pods, "warm", &DEBIAN).await?);
    }
    let mut uids = Vec::new();
    for number in 0..COPIES {
        let name = format!("copy-{number}");
        uids.push(create(pods, &name, &TINY).await?);
        ready(pods, &name).await?;
    }
    let (mut rss, mut pss) = (0.0, 0.0);
    for uid in &uids {
        let all = std::fs::read_dir(machines)?.flatten().map(|entry| entry.path());
        let dir = all
            .into_iter()
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(uid.as_str())))
            .with_context(|| format!("no machine of pod {uid}"))?;
        let (resident, proportional) = process::memory_in(&std::fs::canonicalize(dir)?, "qemu-system")?;
        rss += resident;
        pss += proportional;
    }
    (warm.rss_mib, warm.pss_mib) = (rss / f64::from(COPIES), pss / f64::from(COPIES));
    for number in 0..COPIES {
        delete(pods, &format!("copy-{number}")).await?;
    }
    Ok(warm)
}

/// Seconds from the pod's creation until a command in it has run.
async fn until_exec(pods: &Api<Pod>, name: &str, kind: &Kind) -> Result<f64> {
    let created = Instant::now();
    create(pods, name, kind).await?;
    ready(pods, name).await?;
    exec_true(pods, name).await?;
    let took = created.elapsed().as_secs_f64();
    delete(pods, name).await?;
    Ok(took)
}
