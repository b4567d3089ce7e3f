//! An agent that does what its commands say.

use std::{
    io,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
};

use crate::{
    logs::{self, LogFile, LogOptions},
    server::{
        AttachRequest, Duplex, ExecRequest, Exit, FsUsage, MachineStats, NodeStats, PodRef, PodStats, Runtime,
        RuntimeError, Streams, Target, Usage,
    },
};

#[derive(Default)]
pub(super) struct Scripted {
    log: Mutex<Option<LogFile>>,
    broken_stats: Mutex<bool>,
    sleeping: watch::Sender<usize>,
}

/// Counts a command that sleeps until it is dropped.
struct Sleeper<'a>(&'a watch::Sender<usize>);

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Scripted {
    pub(super) fn log(&self, log: LogFile) {
        *self.log.lock().unwrap() = Some(log);
    }

    pub(super) fn break_stats(&self) {
        *self.broken_stats.lock().unwrap() = true;
    }

    /// Waits until so many commands sleep.
    pub(super) async fn sleeping(&self, wanted: usize) {
        let mut count = self.sleeping.subscribe();
        let reached = count.wait_for(|count| *count == wanted);
        tokio::time::timeout(std::time::Duration::from_secs(5), reached).await.unwrap().unwrap();
    }

    fn pod(pod: &PodRef) -> Result<(), RuntimeError> {
        let uid = pod.uid.as_deref().is_none_or(|uid| uid == "uid-1");
        if pod.namespace == "default" && ["vm", "stopped"].contains(&pod.name.as_str()) && uid {
            Ok(())
        } else {
            Err(RuntimeError::NoPod(pod.clone()))
        }
    }

    fn container(target: &Target) -> Result<(), RuntimeError> {
        Self::pod(&target.pod)?;
        if target.container == "main" { Ok(()) } else { Err(RuntimeError::NoContainer(target.clone())) }
    }

    async fn play(&self, words: &[&str], tty: bool, mut streams: Streams) -> io::Result<Exit> {
        let mut none = tokio::io::sink();
        let mut stdout = streams.stdout.take().unwrap_or_else(|| Box::new(tokio::io::sink()));
        match words {
            ["echo", rest @ ..] => stdout.write_all(rest.join(" ").as_bytes()).await?,
            ["both"] => {
                stdout.write_all(b"out").await?;
                streams.stderr.as_mut().unwrap().write_all(b"err").await?;
            }
            ["exit", code] => return Ok(Exit::Code(code.parse().unwrap())),
            ["yes", count] => {
                let count: usize = count.parse().unwrap();
                for chunk in vec![b'y'; count].chunks(10_000) {
                    stdout.write_all(chunk).await?;
                }
            }
            ["cat", code] => {
                let mut stdin = streams.stdin.take().unwrap();
                let mut all = Vec::new();
                let mut buffer = [0; 1000];
                while let read @ 1.. = stdin.read(&mut buffer).await? {
                    let end = buffer[..read].iter().position(|byte| *byte == 4);
                    all.extend_from_slice(&buffer[..end.unwrap_or(read)]);
                    if end.is_some() {
                        break;
                    }
                }
                stdout.write_all(&all).await?;
                let told = format!("read {} bytes", all.len());
                match &mut streams.stderr {
                    Some(stderr) => stderr.write_all(told.as_bytes()).await?,
                    None => none.write_all(told.as_bytes()).await?,
                }
                return Ok(Exit::Code(code.parse().unwrap()));
            }
            ["sizes"] => {
                assert!(tty && streams.stderr.is_none());
                let mut resize = streams.resize.take().unwrap();
                let (first, second) = (resize.recv().await.unwrap(), resize.recv().await.unwrap());
                let told = format!("tty {}x{} {}x{}", first.width, first.height, second.width, second.height);
                stdout.write_all(told.as_bytes()).await?;
            }
            ["sleep"] => {
                self.sleeping.send_modify(|count| *count += 1);
                let _sleeper = Sleeper(&self.sleeping);
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        Ok(Exit::Code(0))
    }
}

fn guest(what: &str, error: io::Error) -> RuntimeError {
    RuntimeError::Guest { what: what.to_owned(), source: Box::new(error) }
}

#[async_trait]
impl Runtime for Scripted {
    fn probes(&self) -> String {
        "# EOF\n".to_owned()
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        let pod = |name: &str, state: serde_json::Value| {
            let status = json!({"containerStatuses": [{
                "name": "main", "ready": true, "restartCount": 0, "image": "i", "imageID": "", "state": state,
            }]});
            let pod = json!({"metadata": {"name": name, "namespace": "default"}, "status": status});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        vec![pod("vm", json!({"running": {}})), pod("stopped", json!({"terminated": {"exitCode": 0}}))]
    }

    async fn check_running(&self, target: &Target) -> Result<(), RuntimeError> {
        Self::container(target)?;
        if target.pod.name == "vm" {
            return Ok(());
        }
        Err(RuntimeError::NotRunning { target: target.clone(), why: "it has ended".to_owned() })
    }

    async fn check_forward(&self, pod: &PodRef) -> Result<(), RuntimeError> {
        Self::pod(pod)
    }

    async fn exec(&self, _: &Target, request: ExecRequest, streams: Streams) -> Result<Exit, RuntimeError> {
        let words: Vec<_> = request.command.iter().map(String::as_str).collect();
        self.play(&words, request.tty, streams).await.map_err(|error| guest("exec", error))
    }

    async fn attach(&self, _: &Target, request: AttachRequest, mut streams: Streams) -> Result<Exit, RuntimeError> {
        if let Some(stdout) = &mut streams.stdout {
            stdout.write_all(b"attached ").await.map_err(|error| guest("attach", error))?;
        }
        self.play(&["sizes"], request.tty, streams).await.map_err(|error| guest("attach", error))
    }

    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> Result<BoxStream<'static, io::Result<bytes::Bytes>>, RuntimeError> {
        Self::container(target)?;
        let previous = options.previous;
        let log = self.log.lock().unwrap().clone().filter(|_| !previous);
        let log = log.ok_or_else(|| RuntimeError::NoLog {
            target: target.clone(),
            previous,
            why: "it was never started".to_owned(),
        })?;
        let lines = logs::open(log, options).await.map_err(|error| guest("logs", io::Error::other(error)))?;
        Ok(lines.map_err(io::Error::other).boxed())
    }

    async fn port_forward(&self, _: &PodRef, port: u16) -> io::Result<Box<dyn Duplex>> {
        if port == 1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(far);
            tokio::io::copy(&mut read, &mut write).await.ok();
            write.shutdown().await.ok();
        });
        Ok(Box::new(near))
    }

    async fn stats(&self) -> Result<NodeStats, RuntimeError> {
        if *self.broken_stats.lock().unwrap() {
            return Err(guest("could not read the host's figures", io::ErrorKind::Other.into()));
        }
        let usage = |cpu| Usage {
            cpu_nanoseconds: cpu,
            cpu_nanocores: Some(250_000_000),
            memory_working_set_bytes: 1 << 30,
            memory_rss_bytes: Some(1 << 29),
            memory_available_bytes: None,
        };
        let time = |second| jiff::Timestamp::from_second(second).unwrap();
        let fs = FsUsage { capacity_bytes: 100, available_bytes: 60, used_bytes: 40, inodes: 10, inodes_free: 4 };
        let container = MachineStats {
            container: "main".to_owned(),
            started: time(1_800_000_100),
            usage: usage(1_234_567_890),
            rootfs: Some(FsUsage { inodes: 0, ..fs }),
            log_bytes: 42,
        };
        let pod = PodStats {
            namespace: "default".to_owned(),
            name: "vm".to_owned(),
            uid: "uid-1".to_owned(),
            started: time(1_800_000_050),
            containers: vec![container.clone(), MachineStats { container: "side".to_owned(), ..container }],
            network: Some((7, 8)),
        };
        Ok(NodeStats {
            taken: time(1_800_000_200),
            booted: time(1_800_000_000),
            node: Usage { memory_available_bytes: Some(3 << 30), ..usage(99_000_000_001) },
            fs: Some(fs),
            image_fs: Some(fs),
            pods: vec![pod],
        })
    }
}
