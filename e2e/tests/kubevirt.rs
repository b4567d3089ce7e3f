//! Pools whose machines `KubeVirt` runs. What is written is held against its published API; what happens is played by a stand-in for
//! its controller, which starts the guest's runner on this host.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::gitlab::state::RAN;
use e2e::gitlab::{Gitlab as Scripted, JobStatus, NewJob};
use e2e::{Home, Up, eventually, eventually_within, prerequisites, run};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

fn pool(url: &str, name: &str, fields: &Value) -> Value {
    let mut pool = json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "provider": {"gitlab": {"url": url, "tokenSecretRef": {"name": "gitlab", "key": "token"}, "tags": [name]}},
            "substrate": "kubevirt",
            "image": "registry.example.com/ci/ubuntu:24.04",
            "resources": {"cpu": "500m", "memory": "192Mi", "disk": "20Gi"},
            "userData": "RUNNER_TOKEN=$(VMPOD_RUNNER_TOKEN)\nSYSTEM_ID=$(VMPOD_SYSTEM_ID)\nMAX_JOBS=$(VMPOD_MAX_JOBS)\n",
            "scale": {"max": 2, "scaleDownSeconds": 0},
            "rollout": {"drainSeconds": 60},
            "placements": [{"name": "home", "nodeSelector": {"site": "home"}, "tolerations": [{"key": "ci", "operator": "Exists", "effect": "NoSchedule"}]}],
        },
    });
    if let (Some(spec), Some(fields)) = (pool["spec"].as_object_mut(), fields.as_object()) {
        spec.extend(fields.clone());
    }
    pool
}

/// Every kind of machine that is made for a runner.
fn machines() -> Result<Vec<Value>> {
    let types = json!({"instancetype": {"name": "u1.large"}, "preference": {"name": "windows.2k22"}, "sysprep": true, "readyPort": 5986});
    let own = json!({"instancetype": {"name": "m1", "namespaced": true}, "storageClassName": "fast", "readyPort": 0});
    let all = [
        json!({}),
        json!({"kubevirt": {"sysprep": true}}),
        json!({"image": "pvc://golden/windows-2022", "kubevirt": types}),
        json!({"image": "pvc://ubuntu", "kubevirt": own}),
    ];
    let make = |fields: &Value| {
        let pool = serde_json::from_value(pool("https://gitlab.example.com", "large", fields))?;
        let mut runner = vmpod_fleet::objects::runner(&pool, "home");
        runner.metadata.generate_name = None;
        (runner.metadata.name, runner.metadata.uid) = (Some("large-x2x4".to_owned()), Some("u".to_owned()));
        Ok(vmpod_fleet::kubevirt::machine(&pool, &runner, &vmpod_fleet::provider::Keep::new("token".to_owned())))
    };
    all.iter().map(make).collect()
}

/// Compiles text against the published types; what the compiler says.
async fn compile(text: &str) -> Result<e2e::Ran> {
    let scratch = prerequisites::scratch()?.join("kubevirt-contract");
    std::fs::create_dir_all(&scratch)?;
    let packages = prerequisites::node()?;
    let link = scratch.join("node_modules");
    std::fs::remove_file(&link).ok();
    std::os::unix::fs::symlink(&packages, &link)?;
    let file = scratch.join(format!("contract-{}.ts", std::process::id()));
    std::fs::write(&file, text)?;
    let mut command = Command::new("node");
    command.arg(packages.join("typescript/bin/tsc"));
    command.args(["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]);
    command.args(["--module", "nodenext", "--moduleResolution", "nodenext"]).arg(&file);
    let ran = run(command, None, Duration::from_mins(2)).await;
    std::fs::remove_file(&file)?;
    ran
}

/// What the package's generator lost or made stricter than the API is, of Kubernetes' own types: fields that hold a number or a text are
/// missing, and words are members of an `enum`, which no text is.
const MENDED: &str = "
declare module \"@kubevirt-ui/kubevirt-api/kubevirt/models/K8sIoApiCoreV1TCPSocketAction\" {
  interface K8sIoApiCoreV1TCPSocketAction { port?: number | string }
}
";
const WORDS: [(&str, &str); 2] = [
    ("\"operator\": \"Exists\"", "\"operator\": K8sIoApiCoreV1TolerationOperatorEnum.Exists"),
    ("\"effect\": \"NoSchedule\"", "\"effect\": K8sIoApiCoreV1TolerationEffectEnum.NoSchedule"),
];

fn typed(machines: &[Value]) -> Result<String> {
    let types = "V1VirtualMachine, V1VirtualMachineInstance, K8sIoApiCoreV1TolerationOperatorEnum, K8sIoApiCoreV1TolerationEffectEnum";
    let mut text = format!("import {{ {types} }} from \"@kubevirt-ui/kubevirt-api/kubevirt\";\n");
    text.push_str(
        "import { V1beta1DataVolumeSpec } from \"@kubevirt-ui/kubevirt-api/containerized-data-importer/models\";\n",
    );
    text.push_str(MENDED);
    for (index, machine) in machines.iter().enumerate() {
        let kind = machine["kind"].as_str().context("no kind")?;
        writeln!(text, "export const machine{index}: V1{kind} = {machine:#};")?;
        if let Some(volume) = machine["spec"]["dataVolumeTemplates"].get(0) {
            // KubeVirt has its own copy of this type; the importer's is the one that counts.
            writeln!(text, "export const volume{index}: V1beta1DataVolumeSpec = {:#};", volume["spec"])?;
        }
    }
    Ok(WORDS.iter().fold(text, |text, (from, to)| text.replace(from, to)))
}

#[tokio::test]
async fn what_is_made_is_of_kubevirts_published_types() -> Result<()> {
    let mut machines = machines()?;
    compile(&typed(&machines)?).await?.ok()?;
    // A field that isn't there, and one of another type, are seen.
    machines[0]["spec"]["domain"]["devices"]["disk"] = json!([]);
    let said = compile(&typed(&machines)?).await?;
    ensure!(said.code != Some(0) && said.stdout.contains("'\"disk\"' does not exist in type"), "{said}");
    machines.remove(0);
    machines[0]["spec"]["terminationGracePeriodSeconds"] = "60".into();
    let said = compile(&typed(&machines)?).await?;
    ensure!(said.code != Some(0) && said.stdout.contains("'string' is not assignable to type 'number"), "{said}");
    Ok(())
}

/// The chart's `ScaledObject`s, and the one of docs/fleet.md, by a validator that others wrote.
#[tokio::test]
async fn scaled_objects_are_of_kedas_published_schema() -> Result<()> {
    let text = std::fs::read_to_string(prerequisites::repository().join("docs/fleet.md"))?;
    let from = text.find("apiVersion: keda.sh/v1alpha1").context("no example in docs/fleet.md")?;
    let example = text[from..].split("```").next().unwrap_or_default().to_owned();
    let chart = prerequisites::repository().join("charts/vmpod");
    let objects = "scaledObjects=[{\"pool\":\"large\",\"namespace\":\"ci\",\"min\":2,\"max\":9,\"cooldownSeconds\":300,\
                   \"triggers\":[{\"type\":\"prometheus\",\"metadata\":{\"serverAddress\":\"http://p:9090\",\"query\":\"x\",\"threshold\":\"0.3\"}}]}]";
    let mut helm = Command::new(prerequisites::helm()?);
    helm.args(["template", "v"]).arg(&chart).args([
        "--set=image=x",
        "--show-only=templates/scaled-objects.yaml",
        "--set-json",
    ]);
    helm.arg(objects).env("HOME", prerequisites::scratch()?);
    let rendered = run(helm, None, Duration::from_mins(1)).await?.ok()?;
    let mut parsed = vec![yaml(&example).await?, yaml(&rendered).await?];
    let program = "import { ScaledObject } from '@kubernetes-models/keda/keda.sh/v1alpha1'; import fs from 'fs';
for (const object of JSON.parse(fs.readFileSync(0))) { const { apiVersion, kind, ...rest } = object; if (kind !== 'ScaledObject') throw new Error(kind); new ScaledObject(rest).validate(); }";
    let scratch = tempfile::tempdir()?;
    std::os::unix::fs::symlink(prerequisites::node()?, scratch.path().join("node_modules"))?;
    std::fs::write(scratch.path().join("validate.mjs"), program)?;
    let validate = async |objects: &[Value]| {
        let mut command = Command::new("node");
        command.arg("validate.mjs").current_dir(scratch.path());
        run(command, Some(serde_json::to_string(objects)?.as_bytes()), Duration::from_mins(1)).await
    };
    validate(&parsed).await?.ok()?;
    parsed[1]["spec"]["triggers"][0]["metadata"]["threshold"] = 1.into();
    validate(&parsed).await?.expect_failure("threshold must be string")?;
    Ok(())
}

/// YAML as JSON.
async fn yaml(text: &str) -> Result<Value> {
    let mut command = Command::new(prerequisites::program("python3", "python3")?);
    command.args(["-c", "import sys, json, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))"]);
    command.env("PYTHONPATH", prerequisites::python()?);
    Ok(serde_json::from_str(&run(command, Some(text.as_bytes()), Duration::from_mins(1)).await?.ok()?)?)
}

/// Plays `KubeVirt`'s controller: it takes up instances, places them, runs the runner of their user data on this host, and keeps them in
/// being, by a finalizer, until that has ended.
struct Controller {
    client: Client,
    gitlab: String,
    running: BTreeMap<String, Child>,
}

const FINALIZER: &str = "foregroundDeleteVirtualMachine";

impl Controller {
    fn api(&self, kind: &str) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", kind));
        Api::default_namespaced_with(self.client.clone(), &resource)
    }

    async fn work(mut self) -> Result<()> {
        loop {
            self.machines().await.context("machines")?;
            self.instances().await.context("instances")?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Each machine that is to run once has an instance of its name, with its template's labels.
    async fn machines(&self) -> Result<()> {
        let instances = self.api("VirtualMachineInstance");
        for machine in self.api("VirtualMachine").list(&ListParams::default()).await? {
            let (name, spec) = (machine.name_any(), &machine.data["spec"]);
            ensure!(spec["runStrategy"] == "Once", "{spec:#}");
            ensure!(spec["dataVolumeTemplates"][0]["spec"]["source"]["pvc"]["name"] == "ubuntu", "{spec:#}");
            if machine.metadata.deletion_timestamp.is_some() || instances.get_opt(&name).await?.is_some() {
                continue;
            }
            let mut metadata = spec["template"]["metadata"].clone();
            metadata["name"] = name.as_str().into();
            metadata["ownerReferences"] = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": name,
                "uid": machine.uid(), "controller": true, "blockOwnerDeletion": true}]);
            let instance = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": metadata, "spec": spec["template"]["spec"]});
            instances.create(&PostParams::default(), &serde_json::from_value(instance)?).await?;
        }
        Ok(())
    }

    async fn instances(&mut self) -> Result<()> {
        let api = self.api("VirtualMachineInstance");
        for instance in api.list(&ListParams::default()).await? {
            let name = instance.name_any();
            let phase = instance.data["status"]["phase"].as_str().unwrap_or_default().to_owned();
            let leaves = instance.metadata.deletion_timestamp.is_some();
            let show = async |status: Value| {
                api.patch_status(&name, &PatchParams::default(), &Patch::Merge(json!({"status": status})))
                    .await
                    .map(drop)
            };
            match phase.as_str() {
                "" if leaves => self.release(&name).await?,
                "" => {
                    let patch = json!({"metadata": {"finalizers": [FINALIZER]}});
                    api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                    show(json!({"phase": "Scheduling"})).await?;
                }
                "Scheduling" => {
                    let child = self.boot(&instance).await?;
                    self.running.insert(name.clone(), child);
                    let ready = json!([{"type": "Ready", "status": "True"}]);
                    show(json!({"phase": "Running", "nodeName": "metal-1", "conditions": ready})).await?;
                }
                "Running" => {
                    let child = self.running.get_mut(&name).context("an instance that nobody started")?;
                    if leaves && let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
                        // The power button: the guest lets its runner finish.
                        kill_process(pid, Signal::TERM)?;
                    }
                    if let Some(status) = child.try_wait()? {
                        self.running.remove(&name);
                        show(json!({"phase": if status.success() { "Succeeded" } else { "Failed" }, "conditions": []}))
                            .await?;
                    }
                }
                _ if leaves => self.release(&name).await?,
                _ => {}
            }
        }
        Ok(())
    }

    async fn release(&self, name: &str) -> Result<()> {
        let patch = json!({"metadata": {"finalizers": null}});
        let done = self.api("VirtualMachineInstance").patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        match done {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            done => Ok(done.map(drop)?),
        }
    }

    /// What cloud-init would do: the runner that the user data tell of.
    async fn boot(&self, instance: &DynamicObject) -> Result<Child> {
        let volumes = instance.data["spec"]["volumes"].as_array().cloned().unwrap_or_default();
        let seed = volumes.iter().find(|volume| volume["name"] == "seed").context("no seed")?;
        let secret = seed["cloudInitNoCloud"]["secretRef"]["name"].as_str().context("no Secret")?;
        let secrets: Api<Secret> = Api::default_namespaced(self.client.clone());
        let data = secrets.get(secret).await?.data.unwrap_or_default();
        let text = String::from_utf8(data.get("userdata").context("no user data")?.0.clone())?;
        let mut command = Command::new(prerequisites::job_agent()?);
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            command.env(name, value);
        }
        command.env("GITLAB_URL", &self.gitlab).env("POLL_MS", "200").stdin(Stdio::null()).kill_on_drop(true);
        Ok(command.spawn()?)
    }
}

/// `KubeVirt`'s definitions, as far as the API must know them. Status is a subresource there too.
async fn install(up: &Up) -> Result<()> {
    for (kind, plural) in [("VirtualMachineInstance", "virtualmachineinstances"), ("VirtualMachine", "virtualmachines")]
    {
        let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        up.apply(&json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": format!("{plural}.kubevirt.io")},
            "spec": {"group": "kubevirt.io", "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
                "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": open, "status": open}}}}]}}))
        .await?;
    }
    eventually("the kinds are there", || async {
        up.kubectl_ok(&["get", "virtualmachineinstances,virtualmachines"]).await.map(drop)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn runners_are_instances_of_kubevirt() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("kubevirt").await?;
    let up = home.up_with_fleet(&[]).await?;
    let url = scripted.url();
    let job = |pool: &str, script: &[&str]| {
        let script = script.iter().map(|line| (*line).to_owned()).collect();
        scripted.with(|state| state.add(NewJob { tags: vec![pool.into()], script, ..NewJob::default() }))
    };
    // Without KubeVirt nothing is done, and the pool tells why.
    up.apply(&pool(&url, "plain", &json!({}))).await?;
    let first = job("plain", &[RAN]);
    eventually("the pool tells what is missing", || async {
        let why = up
            .kubectl_ok(&[
                "get",
                "runnerpool",
                "plain",
                "-o",
                "jsonpath={.status.conditions[?(@.type=='Scaling')].message}",
            ])
            .await?;
        ensure!(why.contains("install KubeVirt"), "{why}");
        Ok(())
    })
    .await?;
    ensure!(up.kubectl_ok(&["get", "runners", "-o", "name"]).await?.is_empty(), "a runner without a machine");
    // Nor does it hold up who thinks better of it.
    up.apply(&pool(&url, "mistake", &json!({}))).await?;
    up.kubectl_ok(&["delete", "runnerpool", "mistake", "--timeout=30s"]).await?;

    install(&up).await?;
    let controller = Controller { client: up.client().await?, gitlab: url.clone(), running: BTreeMap::new() };
    let controller = tokio::spawn(controller.work());
    up.apply(&pool(&url, "cloned", &json!({"image": "pvc://ubuntu", "kubevirt": {"readyPort": 0}}))).await?;
    let second = job("cloned", &[RAN]);
    for id in [first, second] {
        eventually_within(Duration::from_mins(2), "the job has run", || async {
            if controller.is_finished() {
                bail!("the stand-in for KubeVirt has ended");
            }
            let status = scripted.with(|state| state.jobs[&id].status);
            let shown = up
                .kubectl_ok(&["get", "runnerpools,runners,virtualmachineinstances,virtualmachines", "-o", "wide"])
                .await
                .unwrap_or_default();
            ensure!(status == JobStatus::Success, "{status:?}\n{shown}");
            Ok(())
        })
        .await?;
    }

    // A pool that goes lets its job finish.
    let long = job("plain", &[RAN, "sleep 8"]);
    eventually_within(Duration::from_mins(1), "the job runs", || async {
        ensure!(scripted.with(|state| state.jobs[&long].status) == JobStatus::Running, "it doesn't");
        Ok(())
    })
    .await?;
    eventually("it is known", || async {
        let shown = up.kubectl_ok(&["get", "runners", "-o", "jsonpath={.items[*].status.phase}"]).await?;
        ensure!(shown.contains("Busy"), "{shown}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "runnerpool", "plain", "cloned", "--timeout=60s"]).await?;
    ensure!(scripted.with(|state| state.jobs[&long].status) == JobStatus::Success, "the job was ended");
    eventually("nothing is left", || async {
        let left = up.kubectl_ok(&["get", "runners,virtualmachineinstances,virtualmachines", "-o", "name"]).await?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
    .await?;
    scripted.with(|state| {
        ensure!(state.complaints().is_empty() && state.runners.is_empty(), "{:?}", state.complaints());
        Ok(())
    })?;
    controller.abort();
    up.stop().await
}
