//! How many durable creates a second, and how much memory for ten thousand pods:
//! `cargo run --release -p vmpod-apiserver --example load -- DIR`.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::Instant;

use axum::body::Body;
use http::Request;
use serde_json::json;
use tower::ServiceExt as _;
use vmpod_apiserver::{ApiServer, Identity, Options};

fn resident_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

async fn create(
    server: &ApiServer,
    path: &str,
    body: serde_json::Value,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let request =
        Request::post(path).header("content-type", "application/json").body(Body::from(serde_json::to_vec(&body)?))?;
    let response = server.router_as(Identity::admin()).oneshot(request).await?;
    if response.status().as_u16() == 201 { Ok(()) } else { Err(format!("{}", response.status()).into()) }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let dir = std::env::args().nth(1).ok_or("which directory?")?;
    let server = ApiServer::open(Options { dir: dir.into(), listen: None, extra_sans: Vec::new() }).await?;
    println!("resident at the start: {:?} MiB", resident_mib());
    for clients in [1_usize, 16] {
        let each = 3200 / clients / if clients == 1 { 8 } else { 1 };
        let begin = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for client in 0..clients {
            let server = server.clone();
            tasks.spawn(async move {
                for index in 0..each {
                    let map = json!({
                        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": format!("c{clients}-{client}-{index}") },
                        "data": { "k": "x".repeat(512) },
                    });
                    create(&server, "/api/v1/namespaces/default/configmaps", map).await?;
                }
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        let seconds = begin.elapsed().as_secs_f64();
        println!("{clients} clients: {} creates in {seconds:.2} s", clients * each);
    }
    let begin = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..64 {
        let server = server.clone();
        tasks.spawn(async move {
            for index in 0..157 {
                let pod = json!({
                    "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("p{client}-{index}"), "labels": { "app": "a" } },
                    "spec": { "containers": [{ "name": "vm", "image": "registry.example/vm:1", "resources": { "requests": { "cpu": "1", "memory": "1Gi" } } }] },
                });
                create(&server, "/api/v1/namespaces/default/pods", pod).await?;
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    println!("10048 pods by 64 clients in {:.1} s; resident: {:?} MiB", begin.elapsed().as_secs_f64(), resident_mib());
    Ok(())
}
