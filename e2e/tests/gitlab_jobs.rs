//! GitLab's jobs in real machines: a runner's record, its token in a Secret, an agent in the guest that others wrote.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use e2e::gitlab::state::RAN;
use e2e::gitlab::{Gitlab as Scripted, JobStatus, NewJob};
use e2e::{Home, Up, eventually, pods};
use jiff::Timestamp;
use serde_json::json;
use vmpod_fleet::gitlab::{Gitlab, Gitlabs, Held, Scope, Settings, Token, Wanted};
use vmpod_fleet::user_data::{Values, fill, system_id};

fn pool(name: &str) -> Wanted {
    let settings = Settings { tags: BTreeSet::from([name.to_owned()]), ..Settings::default() };
    Wanted { uid: format!("uid-{name}"), name: format!("ci/{name}"), scope: Scope::Instance, settings }
}

fn job(pool: &str) -> NewJob {
    let script = vec![RAN.into(), "uname -n".into()];
    NewJob { tags: vec![pool.into()], script, ..NewJob::default() }
}

/// A machine of a pool, as the operator makes one.
async fn machine(up: &Up, scripted: &Scripted, gitlab: &Gitlab, held: &Held, name: &str) -> Result<String> {
    let id = system_id(&format!("{name}0000000000"));
    let (url, template) = (gitlab.url(), scripted.user_data());
    let machine = Values { url: &url, token: held.token.expose(), system_id: &id, name, jobs: 1 };
    let data = fill(&template, &machine)?;
    up.apply(&json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"},
        "stringData": {"userdata": data},
    }))
    .await?;
    let mut pod = pods::tiny(name, &[]);
    pod["metadata"]["annotations"] = json!({"vmpod.dev/user-data-secret": name});
    up.apply(&pod).await?;
    Ok(id)
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_two_pools_run_once_each_in_a_machine_of_their_own() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("gitlab-jobs").await?;
    let up = home.up(&[]).await?;
    let gitlab = Gitlabs::default().get(&scripted.url(), None, Token::new("glpat-scripted".into()))?;
    let now = Timestamp::now();
    let (small, large) = (pool("small"), pool("large"));
    let small_held = gitlab.ensure(&small, None, now).await?.held;
    let large_held = gitlab.ensure(&large, None, now).await?.held;
    scripted.with(|state| {
        for name in ["small", "large", "small", "large"] {
            state.add(job(name));
        }
    });
    ensure!(gitlab.waiting(&small, small_held.record, &[], now).await?.count == 2);

    let mut ids = Vec::new();
    for (name, held) in [("s1x", &small_held), ("s2x", &small_held), ("l1x", &large_held), ("l2x", &large_held)] {
        ids.push((machine(&up, &scripted, &gitlab, held, name).await?, held, name));
    }
    for (_, _, name) in &ids {
        // Its machine has switched itself off: there is nothing for it to do any more.
        up.wait_for(name, "jsonpath={.status.phase}=Succeeded").await.with_context(|| {
            format!(
                "{:?}",
                scripted.with(|state| state.jobs.values().map(|job| (job.status, job.text())).collect::<Vec<_>>())
            )
        })?;
    }
    scripted.with(|state| {
        ensure!(state.complaints().is_empty(), "{:?}", state.complaints());
        let machines: BTreeSet<_> = state.jobs.values().map(|job| job.system_id.clone()).collect();
        ensure!(machines.len() == 4, "each job had a machine of its own: {machines:?}");
        for job in state.jobs.values() {
            let name = job.text().lines().last().unwrap_or_default().to_owned();
            ensure!(["s1x", "s2x", "l1x", "l2x"].contains(&name.as_str()), "it ran in a guest: {}", job.text());
        }
        Ok(())
    })?;
    // Both sides are cleared.
    for (id, held, name) in &ids {
        let seen = gitlab.machines(held.record, now).await?;
        ensure!(seen.get(id).is_some_and(|seen| !seen.busy), "{seen:?}");
        gitlab.forget(held, id, now).await?;
        up.kubectl_ok(&["delete", "pod,secret", name]).await?;
    }
    for held in [&small_held, &large_held] {
        ensure!(gitlab.machines(held.record, now).await?.is_empty());
        gitlab.remove(held.record, now).await?;
    }
    ensure!(scripted.with(|state| state.runners.is_empty()));
    home.assert_clean().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_a_job_is_busy_and_its_token_is_in_no_pod() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("gitlab-busy").await?;
    let up = home.up(&[]).await?;
    let gitlab = Gitlabs::default().get(&scripted.url(), None, Token::new("glpat-scripted".into()))?;
    let (wanted, now) = (pool("small"), Timestamp::now());
    let held = gitlab.ensure(&wanted, None, now).await?.held;
    let id = machine(&up, &scripted, &gitlab, &held, "b1x").await?;
    eventually("it asks for a job", || async {
        let seen = gitlab.machines(held.record, Timestamp::now()).await?;
        ensure!(seen.get(&id).is_some_and(|seen| !seen.busy), "{seen:?}");
        Ok(())
    })
    .await?;
    let long = scripted.with(|state| {
        state.add(NewJob {
            tags: vec!["small".into()],
            script: vec![RAN.into(), "sleep 3".into()],
            ..NewJob::default()
        })
    });
    eventually("it has the job", || async {
        ensure!(gitlab.is_busy(held.record, &id, Timestamp::now()).await?, "it has none");
        Ok(())
    })
    .await?;
    // Nothing that a reader of pods or of the log sees has the token in it.
    let token = held.token.expose();
    for shown in [up.kubectl_ok(&["get", "pods,events", "-A", "-o", "yaml"]).await?, up.log()] {
        ensure!(!shown.contains(token), "the token shows");
    }
    up.wait_for("b1x", "jsonpath={.status.phase}=Succeeded").await?;
    let status = scripted.with(|state| state.jobs[&long].status);
    ensure!(status == JobStatus::Success && scripted.with(|state| state.complaints().is_empty()), "{status:?}");
    up.kubectl_ok(&["delete", "pod,secret", "b1x"]).await?;
    home.assert_clean().await?;
    up.stop().await
}
