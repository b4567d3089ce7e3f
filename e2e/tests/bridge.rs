//! Machines on a bridge that somebody else keeps: their addresses come from a real DHCP server, or from the guests themselves.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::namespace::{Lan, in_namespace, sh};
use e2e::{Home, Up, eventually, pods};
use serde_json::{Value, json};

/// How soon a change of a guest's address must show.
const SOON: Duration = Duration::from_secs(5);

fn pod(name: &str) -> Value {
    let web = "mkdir -p /www && echo from the machine >/www/index.html && exec httpd -f -p 80 -h /www";
    let mut pod = pods::tiny(name, &["sh", "-c", web]);
    pod["metadata"]["annotations"] = json!({"vmpod.dev/network": "bridge:br0"});
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"port": 80}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 100});
    pod
}

async fn address(up: &Up, pod: &str) -> Result<String> {
    up.kubectl_ok(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"]).await
}

/// What the pod's status says of its address: value, reason and message of the condition.
async fn learnt(up: &Up, pod: &str) -> Result<(String, String, String)> {
    let pod = up.pod(pod).await?;
    let all = pod["status"]["conditions"].as_array().context("no conditions")?;
    let found = all.iter().find(|condition| condition["type"] == "vmpod.dev/AddressLearnt").context("not told")?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("reason"), text("message")))
}

async fn until_at(up: &Up, pod: &str, wanted: &str, since: Instant) -> Result<()> {
    eventually("the pod shows its new address", || async {
        let shown = address(up, pod).await?;
        ensure!(shown == wanted, "{shown} is shown, {wanted} is wanted");
        Ok(())
    })
    .await?;
    ensure!(since.elapsed() < SOON + Duration::from_secs(3), "it took {:?}", since.elapsed());
    up.wait_ready(pod).await
}

#[test]
fn addresses_are_learnt_from_the_network_and_kept_true() -> Result<()> {
    in_namespace("addresses_are_learnt_from_the_network_and_kept_true", async {
        let home = Home::with_tiny("bridge").await?;
        sh("ip link add br0 type bridge; ip addr add 10.50.0.2/24 dev br0; ip link set br0 up").await?;
        let lan = Lan::join("br0", "10.50.0.1/24").await?;
        let range = ["--dhcp-range=10.50.0.100,10.50.0.150,255.255.255.0,1h"];
        let mut server = lan.dhcp(home.path(), &range)?;
        let up = home.up(&[]).await?;
        up.apply(&pod("leased")).await?;
        up.wait_ready("leased").await?;

        // The lease is the server's word, and the LAN reaches the machine there.
        let first = address(&up, "leased").await?;
        let mac = up.kubectl_ok(&["exec", "leased", "--", "cat", "/sys/class/net/eth0/address"]).await?;
        let leases = std::fs::read_to_string(home.path().join("leases"))?;
        let line = leases.lines().find(|line| line.contains(mac.trim())).context("the server has no lease of it")?;
        ensure!(line.contains(&first), "{first} is shown, the server has {line}");
        let (status, reason, message) = learnt(&up, "leased").await?;
        ensure!(status == "True" && reason == "DHCP", "{status} {reason}");
        ensure!(message.starts_with(&format!("{first}, leased by 10.50.0.1, at 20")), "{message}");
        ensure!(lan.sh(&format!("busybox wget -qO- http://{first}/")).await? == "from the machine\n");

        // Another lease: the server forgets the first one and has another address for this machine.
        server.kill().await?;
        std::fs::remove_file(home.path().join("leases"))?;
        let host = format!("--dhcp-host={},10.50.0.77", mac.trim());
        let mut server = lan.dhcp(home.path(), &[range[0], &host])?;
        let asks = "udhcpc -q -n -t 10 -T 1 -i eth0 -s /etc/udhcpc >/dev/null 2>&1 &";
        up.kubectl(&["exec", "leased", "--", "sh", "-c", &format!("ip address flush dev eth0; {asks}")]).await?;
        until_at(&up, "leased", "10.50.0.77", Instant::now()).await?;
        ensure!(lan.sh("busybox wget -qO- http://10.50.0.77/").await? == "from the machine\n");

        // An address that somebody gave it by hand, in the guest.
        let by_hand = "(sleep 1; ip address flush dev eth0; ip address add 10.50.0.200/24 dev eth0; ping -c 3 10.50.0.1) >/dev/null 2>&1 &";
        up.kubectl(&["exec", "leased", "--", "sh", "-c", by_hand]).await?;
        until_at(&up, "leased", "10.50.0.200", Instant::now()).await?;
        let (_, reason, message) = learnt(&up, "leased").await?;
        ensure!(reason == "ARP" && message.contains("by the guest's word"), "{reason} {message}");

        // An agent that is killed knows it at once when it is back, without a word from the guest.
        up.kill().await?;
        let up = home.up(&[]).await?;
        up.wait_ready("leased").await?;
        ensure!(address(&up, "leased").await? == "10.50.0.200");
        ensure!(up.pod("leased").await?["status"]["containerStatuses"][0]["restartCount"] == 0);

        // A server that says nothing, and then does: the guest boots without an address, and the pod says what it waits for.
        server.kill().await?;
        up.apply(&pod("late")).await?;
        eventually("what is missing is told", || async {
            let (status, reason, _) = learnt(&up, "late").await?;
            ensure!(status == "False" && reason == "NothingHeard", "{status} {reason}");
            Ok(())
        })
        .await?;
        ensure!(address(&up, "late").await?.is_empty());
        tokio::time::sleep(Duration::from_secs(4)).await;
        let _server = lan.dhcp(home.path(), &range)?;
        up.wait_ready("late").await?;
        ensure!(address(&up, "late").await?.starts_with("10.50.0.1"), "no address of the range");

        // A bridge that isn't there is told of by name.
        let mut nowhere = pod("nowhere");
        nowhere["metadata"]["annotations"]["vmpod.dev/network"] = "bridge:br7".into();
        up.apply(&nowhere).await?;
        eventually("the missing bridge is named", || async {
            let message =
                pods::state(&up.pod("nowhere").await?)["waiting"]["message"].as_str().unwrap_or_default().to_owned();
            ensure!(message.contains("there is no bridge br7 on this node"), "{message}");
            Ok(())
        })
        .await?;

        up.kubectl_ok(&["delete", "pod", "--all", "--timeout=120s"]).await?;
        let links = sh("ip -o link").await?;
        ensure!(!links.contains("vmp") && links.contains("br0"), "{links}");
        up.stop().await?;
        home.assert_clean().await
    })
}
