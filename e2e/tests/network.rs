//! Machines with addresses of their own, with real guests on a real bridge.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::namespace::{in_namespace, leftovers, name_server, sh};
use e2e::prerequisites::repository;
use e2e::{Home, Up, eventually, pods};
use serde_json::{Value, json};

const WEB: &str = "mkdir -p /www && echo from the machine >/www/index.html && exec httpd -f -p 80 -h /www";

fn pod(name: &str, annotations: &Value) -> Value {
    let mut pod = pods::tiny(name, &["sh", "-c", WEB]);
    pod["metadata"]["annotations"] = annotations.clone();
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"port": 80}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 100});
    pod
}

async fn in_guest(up: &Up, pod: &str, script: &str) -> Result<String> {
    up.kubectl(&["exec", pod, "--", "sh", "-c", script]).await?.ok()
}

async fn address(up: &Up, pod: &str) -> Result<String> {
    up.kubectl_ok(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"]).await
}

#[test]
fn machines_have_addresses_of_their_own() -> Result<()> {
    in_namespace("machines_have_addresses_of_their_own", async {
        let home = Home::with_tiny("nat").await?;
        let mut names = name_server(home.path(), "ci.test", "192.0.2.9").await?;
        let args = ["--network", "nat", "--snapshots", "2Gi"];
        let up = home.up(&args).await?;

        // The first boots; the others go on from its image's memory snapshot and are told their own addresses.
        let mut first = pod("m0", &json!({"vmpod.dev/start": "boot"}));
        first["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 8080}]);
        up.apply(&first).await?;
        up.wait_ready("m0").await?;
        let all = ["m0", "m1", "m2", "m3", "m4", "m5"];
        for name in &all[1..] {
            let isolated = if *name == "m5" { "true" } else { "false" };
            let annotations = json!({"vmpod.dev/start": "snapshot", "vmpod.dev/network-isolated": isolated});
            up.apply(&pod(name, &annotations)).await?;
        }
        let (mut addresses, mut macs) = (Vec::new(), BTreeSet::new());
        for name in all {
            up.wait_ready(name).await?;
            let address = address(&up, name).await?;
            ensure!(address.starts_with("10.201."), "{name} has {address}");
            let seen = in_guest(&up, name, "ip -4 -o addr show eth0; cat /sys/class/net/eth0/address").await?;
            ensure!(seen.contains(&format!("inet {address}/16")), "{name} is {address}: {seen}");
            macs.insert(seen.lines().last().unwrap_or_default().to_owned());
            addresses.push(address);
        }
        ensure!(addresses.iter().collect::<BTreeSet<_>>().len() == 6 && macs.len() == 6, "{addresses:?} {macs:?}");

        let example = repository().join("examples/network.yaml");
        up.kubectl_ok(&["apply", "--dry-run=server", "-f", &example.to_string_lossy()]).await?;

        // This host, each other, names, the host's port.
        let page = "from the machine\n";
        for address in &addresses {
            ensure!(sh(&format!("busybox wget -qO- http://{address}/")).await? == page);
        }
        let (m0, m1, m5) = (&addresses[0], &addresses[1], &addresses[5]);
        ensure!(in_guest(&up, "m1", &format!("wget -qO- http://{m0}/")).await? == page, "a neighbour");
        let isolated = up.kubectl(&["exec", "m1", "--", "wget", "-T", "2", "-qO-", &format!("http://{m5}/")]).await?;
        ensure!(isolated.code != Some(0), "an isolated machine was reached: {isolated}");
        let name = in_guest(&up, "m1", "nslookup ci.test || true").await?;
        ensure!(name.contains("192.0.2.9"), "{name}");
        sh("ip link add out0 type bridge; ip addr add 192.0.2.1/24 dev out0; ip link set out0 up").await?;
        ensure!(sh("busybox wget -qO- http://192.0.2.1:8080/").await? == page, "the host's port");

        // The lease is there for whoever asks, under the machine's own hardware address.
        let asks = "udhcpc -f -q -n -t 5 -T 1 -i eth0 -s /bin/true 2>&1";
        let leased = in_guest(&up, "m2", asks).await?;
        ensure!(leased.contains(&format!("lease of {}", addresses[2])), "{leased}");

        // An agent that is killed: its machines stay on the network, and the next one serves it.
        let machines = home.hypervisors();
        up.kill().await?;
        ensure!(sh(&format!("busybox wget -qO- http://{m1}/")).await? == page, "without an agent");
        let up = home.up(&args).await?;
        for (name, before) in all.iter().zip(&addresses) {
            up.wait_ready(name).await?;
            ensure!(address(&up, name).await? == *before, "{name} has another address");
            let restarts = up.pod(name).await?["status"]["containerStatuses"][0]["restartCount"].clone();
            ensure!(restarts == 0, "{name} was restarted");
        }
        ensure!(home.hypervisors() == machines, "machines were lost or made");
        let leased = in_guest(&up, "m3", asks).await?;
        ensure!(leased.contains(&format!("lease of {}", addresses[3])), "{leased}");
        up.apply(&pod("m6", &json!({"vmpod.dev/start": "snapshot"}))).await?;
        up.wait_ready("m6").await?;
        ensure!(!addresses.contains(&address(&up, "m6").await?), "a seventh shares an address");

        up.kubectl_ok(&["delete", "pod", "--all", "--timeout=120s"]).await?;
        eventually("nothing is left of the network", || async {
            let left = leftovers().await?;
            ensure!(left.is_empty(), "{left}");
            Ok(())
        })
        .await?;
        names.kill().await?;
        up.stop().await?;
        home.assert_clean().await
    })
}

#[test]
fn a_port_that_is_taken_is_told_of() -> Result<()> {
    in_namespace("a_port_that_is_taken_is_told_of", async {
        let home = Home::with_tiny("hostport").await?;
        let up = home.up(&[]).await?;
        // On the network user, the host's port is the hypervisor's.
        let mut web = pod("web", &json!({}));
        web["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 8080, "hostIP": "127.0.0.1"}]);
        up.apply(&web).await?;
        up.wait_ready("web").await?;
        ensure!(sh("busybox wget -qO- http://127.0.0.1:8080/").await? == "from the machine\n");

        // Who asks for a bridge that is somebody else's is told why nothing comes of it.
        sh("ip link add vmpod0 type bridge").await?;
        up.apply(&pod("late", &json!({"vmpod.dev/network": "nat"}))).await?;
        eventually("the reason is shown", || async {
            let pod = up.pod("late").await?;
            let message = pods::state(&pod)["waiting"]["message"].as_str().context("no message")?.to_owned();
            ensure!(message.contains("vmpod0 exists and vmpod didn't make it"), "{message}");
            Ok(())
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let tried = up.log().matches("failed; trying again").count();
        ensure!((2..=4).contains(&tried), "tried {tried} times in some three seconds");
        sh("ip link del vmpod0").await?;
        up.wait_ready("late").await?;
        up.kubectl_ok(&["delete", "pod", "--all", "--timeout=60s"]).await?;
        let left = leftovers().await?;
        ensure!(left.is_empty(), "{left}");
        up.stop().await?;
        home.assert_clean().await
    })
}
