//! Runner pools end to end: the operator inside `vmpod up`, a scripted GitLab, and jobs that run in real machines by an agent that
//! others wrote.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::gitlab::state::RAN;
use e2e::gitlab::{Gitlab as Scripted, JobStatus, NewJob};
use e2e::{Home, Up, eventually, eventually_within};
use serde_json::{Value, json};

fn pool(scripted: &Scripted, name: &str, max: u32) -> Value {
    json!({
        "apiVersion": "vmpod.dev/v1alpha1",
        "kind": "RunnerPool",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "provider": {"gitlab": {
                "url": scripted.url(), "tokenSecretRef": {"name": "gitlab", "key": "token"}, "tags": [name],
            }},
            "image": "tiny",
            "resources": {"cpu": "500m", "memory": "192Mi"},
            "userData": scripted.user_data(),
            "scale": {"min": 0, "max": max, "scaleDownSeconds": 0},
            "rollout": {"drainSeconds": 60},
        },
    })
}

async fn up(home: &Home) -> Result<Up> {
    home.up_with_fleet(&["--metrics-listen", "127.0.0.1:0"]).await
}

fn job(pool: &str) -> NewJob {
    NewJob { tags: vec![pool.into()], script: vec![RAN.into(), "uname -n".into()], ..NewJob::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_make_a_machine_for_each_job_and_nothing_stays() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("fleet").await?;
    let up = up(&home).await?;
    for (name, max) in [("small", 2), ("large", 1)] {
        up.apply(&pool(&scripted, name, max)).await?;
    }
    scripted.with(|state| {
        for name in ["small", "large", "small", "small"] {
            state.add(job(name));
        }
    });
    eventually_within(Duration::from_mins(4), "all jobs have run", || async {
        let left = scripted.with(|state| state.jobs.values().filter(|job| job.status != JobStatus::Success).count());
        let pools = up.kubectl_ok(&["get", "runnerpools,runners,pods", "-o", "wide"]).await?;
        ensure!(left == 0, "{left} jobs are left:\n{pools}");
        Ok(())
    })
    .await?;
    scripted.with(|state| {
        ensure!(state.complaints().is_empty(), "{:?}", state.complaints());
        let machines: BTreeSet<_> = state.jobs.values().map(|job| job.system_id.clone()).collect();
        ensure!(machines.len() == 4, "each job had a machine of its own: {machines:?}");
        // One record for each pool, whatever the number of machines.
        ensure!(state.runners.len() == 2, "{} records", state.runners.len());
        Ok(())
    })?;
    // To zero, on both sides.
    eventually_within(Duration::from_mins(2), "no runner is left", || async {
        let left = up.kubectl_ok(&["get", "runners,pods,secrets", "-o", "name"]).await?;
        let left: Vec<&str> =
            left.lines().filter(|name| !name.contains("gitlab") && !name.contains("vmpod-pool-")).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    let status = up.kubectl_ok(&["get", "runnerpool", "small", "-o", "json"]).await?;
    let status: Value = serde_json::from_str(&status)?;
    ensure!(status["status"]["replicas"] == 0 && status["status"]["pendingJobs"] == 0, "{status:#}");
    // Each job is counted once, with how long it waited, at the next look at the CI system.
    eventually("all jobs are counted", || async {
        let metrics = up.metrics().await?;
        for (pool, jobs) in [("small", 3), ("large", 1)] {
            let of = format!("{{namespace=\"default\",pool=\"{pool}\"");
            for line in [
                format!("vmpod_fleet_jobs_total{of},status=\"success\"}} {jobs}"),
                format!("vmpod_fleet_job_queue_wait_seconds_count{of}}} {jobs}"),
                format!("vmpod_fleet_job_duration_seconds_count{of}}} {jobs}"),
            ] {
                let of_pool = metrics.lines().filter(|line| line.contains(&of) && !line.contains("_bucket"));
                ensure!(metrics.contains(&line), "no {line:?} in {:#?}", of_pool.collect::<Vec<_>>());
            }
        }
        Ok(())
    })
    .await?;
    // A pool that goes takes its record along.
    up.kubectl_ok(&["delete", "runnerpool", "small", "large", "--timeout=60s"]).await?;
    ensure!(scripted.with(|state| state.runners.is_empty()), "records are left at GitLab");
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_its_pool_and_the_operator() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("fleet-drain").await?;
    let first = up(&home).await?;
    first.apply(&pool(&scripted, "small", 2)).await?;
    let long = scripted.with(|state| {
        state.add(NewJob {
            tags: vec!["small".into()],
            script: vec![RAN.into(), "sleep 15".into()],
            ..NewJob::default()
        })
    });
    eventually_within(Duration::from_mins(3), "the job runs", || async {
        let status = scripted.with(|state| state.jobs[&long].status);
        ensure!(status == JobStatus::Running, "{status:?}");
        Ok(())
    })
    .await?;
    // The operator dies in the middle of it, and its successor is told to end the pool.
    first.kill().await?;
    let second = home.up(&["--fleet-poll", "1s"]).await?;
    second.kubectl_ok(&["delete", "runnerpool", "small", "--wait=false"]).await?;
    eventually_within(Duration::from_mins(2), "the pool is gone", || async {
        let pools = second.kubectl_ok(&["get", "runnerpools,runners", "-o", "name"]).await?;
        ensure!(pools.trim().is_empty(), "{pools}");
        Ok(())
    })
    .await?;
    scripted.with(|state| {
        ensure!(state.jobs[&long].status == JobStatus::Success, "the job ended as {:?}", state.jobs[&long].status);
        ensure!(state.complaints().is_empty(), "{:?}", state.complaints());
        ensure!(state.runners.is_empty(), "a record is left at GitLab");
        Ok(())
    })?;
    home.assert_clean().await?;
    second.stop().await
}
