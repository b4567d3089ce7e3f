//! Machines that go on from a memory snapshot, with a real QEMU and the real tiny guest: nothing that identifies one may be
//! shared, and what is broken is never used.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::host::{Host, console, ready};
use futures::future::try_join_all;
use jiff::Timestamp;
use vmpod_machine::{
    Adopted, Exec, Hypervisor as _, Machine, Machines, Snapshot, Spec, Template, TemplateKey, Templates, qemu::Qemu,
};

async fn key(spec: &Spec) -> Result<TemplateKey> {
    Ok(TemplateKey {
        image: "tiny".to_owned(),
        scope: String::new(),
        cpus: spec.cpus,
        memory: spec.memory,
        arch: spec.arch,
        accel: spec.accel,
        hypervisor: Qemu::default().snapshots(spec.accel).await.context("QEMU takes no snapshots")?,
        disks: Vec::new(),
        networks: 1,
    })
}

async fn template(host: &Host, machines: &Machines, templates: &Templates) -> Result<Template> {
    let mut spec = host.spec(machines, "base")?;
    let key = key(&spec).await?;
    machines.remove(&spec.id, true).await?;
    spec.id = key.machine()?;
    Ok(templates.make(&key, spec).await?)
}

fn copy(host: &Host, machines: &Machines, name: &str, template: &Template) -> Result<Spec> {
    let mut spec = host.spec(machines, name)?;
    spec.snapshot = Some(Snapshot::From(template.path.clone()));
    Ok(spec)
}

async fn says(machine: &Machine, command: &str) -> Result<String> {
    let session = machine.guest().exec(Exec::new(["sh", "-c", command])).await?;
    let (status, stdout, stderr) = session.output().await?;
    ensure!(status == vmpod_machine::ExitStatus::Code(0), "{command} failed: {}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8_lossy(&stdout).trim().to_owned())
}

#[tokio::test]
async fn copies_share_nothing_that_identifies_them() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let templates = Templates::open(host.root().join("../templates"), machines.clone())?;
    let template = template(&host, &machines, &templates).await?;
    ensure!(machines.list().is_empty(), "the template's machine is still there");

    let began = Instant::now();
    let mut specs = Vec::new();
    for index in 0..6 {
        specs.push(copy(&host, &machines, &format!("copy{index}"), &template)?);
    }
    let all = try_join_all(specs.into_iter().map(|spec| async {
        let machine = machines.create(spec).await?;
        machine.start().await?;
        ready(&machine).await?;
        anyhow::Ok(machine)
    }))
    .await?;
    println!("six copies answer after {:.2} s", began.elapsed().as_secs_f64());

    for what in [
        "cat /proc/sys/kernel/hostname",
        "cat /sys/class/net/eth0/address",
        "cat /etc/machine-id",
        "dropbearkey -y -f /etc/dropbear/host_key | grep ssh-",
        "cat /root/.ssh/authorized_keys",
        "head -c 32 /dev/urandom | md5sum",
        "cat /proc/sys/kernel/random/uuid",
    ] {
        let values = try_join_all(all.iter().map(|machine| says(machine, what))).await?;
        let distinct: BTreeSet<&String> = values.iter().collect();
        ensure!(distinct.len() == all.len(), "{what} is shared: {values:?}");
        ensure!(values.iter().all(|value| !value.is_empty()), "{what} says nothing");
    }
    for machine in &all {
        let seconds: i64 = says(machine, "date +%s").await?.parse()?;
        let now = Timestamp::now().as_second();
        ensure!((now - 3..=now + 1).contains(&seconds), "the guest's clock says {seconds}, and it is {now}");
        // What one copy writes no other sees.
        says(machine, "echo mine >/tmp/mine && [ $(ls /tmp/mine* | wc -l) = 1 ]").await?;
        // The way out works with the new identity.
        says(machine, "ip route | grep -q '^default via 10.0.2.2'").await?;
    }
    for machine in all {
        machine.kill().await?;
        machines.remove(machine.id(), true).await?;
    }
    ensure!(host.processes().is_empty(), "processes are left");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_died_while_a_copy_woke_up_goes_on() -> Result<()> {
    let host = Host::new().await?;
    let template = {
        let machines = host.machines()?;
        let templates = Templates::open(host.root().join("../templates"), machines.clone())?;
        template(&host, &machines, &templates).await?
    };
    for (name, patience) in [("early", 20), ("middle", 120), ("late", 450)] {
        let before = host.machines()?;
        let machine = before.create(copy(&host, &before, name, &template)?).await?;
        // Everything that an agent does ends with it, at any point.
        tokio::time::timeout(Duration::from_millis(patience), machine.start()).await.ok();
        let id = machine.id().clone();
        drop((machine, before));
        let after = host.machines()?;
        let found = after.adopt().await?;
        let mine = found.into_iter().find(|(other, _)| *other == id).map(|(_, found)| found);
        match mine.context("the machine is gone")? {
            // Its process hadn't begun.
            Adopted::Prepared => after.get(&id).context("it isn't known")?.start().await?,
            Adopted::Running => {}
            other => bail!("{name}: {other:?}"),
        }
        let machine = after.get(&id).context("it isn't known")?;
        ready(&machine).await.with_context(|| console(&machine))?;
        ensure!(says(&machine, "cat /proc/sys/kernel/hostname").await? == name);
        after.remove(&id, true).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_state_that_is_no_state_fails_clearly_and_leaves_nothing() -> Result<()> {
    let host = Host::new().await?;
    let machines = host.machines()?;
    let templates = Templates::open(host.root().join("../templates"), machines.clone())?;
    let template = template(&host, &machines, &templates).await?;
    let spec = copy(&host, &machines, "copy", &template)?;
    // After the check, as a failing disk would do it.
    std::fs::write(template.path.join("state"), b"rubbish")?;
    let machine = machines.create(spec).await?;
    let error = machine.start().await.err().context("it started from rubbish")?;
    ensure!(error.to_string().contains("memory snapshot"), "{error}");
    ensure!(host.processes().is_empty(), "a process is left");
    let mut other = key(machine.spec()).await?;
    other.hypervisor.push_str("; another version");
    ensure!(templates.find(&other)?.is_none(), "a template of another QEMU was found");
    let error = templates.find(&template.key).err().context("a damaged template was not noticed")?;
    ensure!(error.to_string().contains("state"), "{error}");
    Ok(())
}
