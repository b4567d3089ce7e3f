//! A machine as Windows wants one: Secure Boot, a TPM, common hardware, answers on a disc. What boots in it is Debian's signed chain.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{Home, eventually_within, pods, prerequisites};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_what_windows_asks_for() -> Result<()> {
    let home = Home::new("windows")?;
    home.import(&prerequisites::secure()?, "windows:2022").await?;
    let up = home.up(&[]).await?;
    let answers = "<?xml version=\"1.0\"?>\n<unattend xmlns=\"urn:schemas-microsoft-com:unattend\"/>\n";
    let mut pod = pods::tiny("win", &[]);
    pod["metadata"]["annotations"] = json!({"vmpod.dev/user-data": answers});
    pod["spec"]["terminationGracePeriodSeconds"] = 60.into();
    let machine = &mut pod["spec"]["containers"][0];
    machine["image"] = "windows:2022".into();
    machine["resources"] = json!({"requests": {"cpu": "1", "memory": "512Mi"}});
    up.apply(&pod).await?;
    eventually_within(Duration::from_mins(4), "the guest answers", || async {
        up.kubectl_ok(&["wait", "pod/win", "--for=condition=Ready", "--timeout=100s"]).await.map(drop)
    })
    .await?;
    let exec = async |words: &[&str]| up.kubectl(&[&["exec", "win", "--"], words].concat()).await?.ok();
    let report = exec(&["report"]).await?;
    for fact in [
        "secure boot: 1",
        "tpm: 2",
        "disk: ahci",
        "network: e1000e",
        "seed: ./autounattend.xml",
        "seed: ./unattend.xml",
        "seed: ./openstack/latest/meta_data.json",
        "name: win",
    ] {
        ensure!(report.lines().any(|line| line == fact), "no {fact:?} in:\n{report}");
    }
    ensure!(exec(&["cat", "/run/seed/autounattend.xml"]).await? == answers);

    // A command that is to be the container's main process has no place in such a guest, and that is said. One that boots sooner will do.
    let file = |name: &str| prerequisites::repository().join("target/guest").join(name).to_string_lossy().into_owned();
    let cmdline = std::fs::read_to_string(file("tiny.cmdline"))?;
    let (kernel, initrd) = (file("tiny.vmlinuz"), file("tiny.initrd"));
    let facts = ["--os", "windows", "--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline.trim()];
    home.vmpod(&[&["image", "import", "quick:1", "--ready-marker", "vmpod: ready"], &facts[..]].concat())
        .await?
        .ok()?;
    let mut main = pods::tiny("main", &["cmd", "/c", "ver"]);
    main["spec"]["containers"][0]["image"] = "quick:1".into();
    up.apply(&main).await?;

    // The agent dies; machine and TPM go on, and are the next one's.
    up.kill().await?;
    let up = home.up(&[]).await?;
    up.wait_ready("win").await?;
    let restarts = up.pod("win").await?["status"]["containerStatuses"][0]["restartCount"].clone();
    ensure!(restarts == 0, "it was started anew");
    ensure!(up.kubectl_ok(&["exec", "win", "--", "report"]).await? == report, "it is another machine");

    eventually_within(Duration::from_mins(4), "the command is refused", || async {
        let pod = up.pod("main").await?;
        let state = pods::state(&pod);
        let message = state["terminated"]["message"].as_str().with_context(|| format!("{state:#}"))?.to_owned();
        ensure!(message.contains("in a Windows guest the container's command doesn't run yet"), "{message}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "pod", "win", "main", "--timeout=90s"]).await?;
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}
