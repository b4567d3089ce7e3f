//! KEDA's external scaler: pools' figures over gRPC, for those who let KEDA decide how many runners a pool has
//! (<https://keda.sh/docs/latest/concepts/external-scalers/>, `externalscaler.proto`).
//!
//! It reads what the operator writes into a pool's status, so it may run in any process, and in several. What isn't known is
//! never told as zero: KEDA then goes on as its `fallback` says.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{Stream, StreamExt as _};
use jiff::Timestamp;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;
use vmpod_api::pool::{RunnerPool, RunnerPoolStatus};

/// `externalscaler.ScaledObjectRef`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ScaledObjectRef {
    /// The `ScaledObject`'s name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// What its trigger says.
    #[prost(map = "string, string", tag = "3")]
    pub scaler_metadata: HashMap<String, String>,
}

/// `externalscaler.IsActiveResponse`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct IsActiveResponse {
    /// Whether there is anything to run for.
    #[prost(bool, tag = "1")]
    pub result: bool,
}

/// `externalscaler.MetricSpec`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricSpec {
    /// The metric's name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// What it should be, for those who don't know the other.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    /// What it should be.
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

/// `externalscaler.GetMetricSpecResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricSpecResponse {
    /// One.
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

/// `externalscaler.GetMetricsRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct GetMetricsRequest {
    /// Who asks.
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    /// For which metric.
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

/// `externalscaler.MetricValue`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricValue {
    /// The metric's name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// Its value, for those who don't know the other.
    #[prost(int64, tag = "2")]
    pub metric_value: i64,
    /// Its value.
    #[prost(double, tag = "3")]
    pub metric_value_float: f64,
}

/// `externalscaler.GetMetricsResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricsResponse {
    /// One.
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

/// What a trigger asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    /// Jobs that wait and jobs that run: with the target 1, a runner for each.
    Jobs,
    /// Jobs that wait.
    PendingJobs,
    /// Percent of the runners that have a job.
    Utilization,
    /// Seconds that the first of the waiting jobs has waited.
    Wait,
}

/// A trigger, read.
#[derive(Clone, Debug, PartialEq)]
struct Wish {
    pool: String,
    namespace: String,
    figure: Figure,
    target: f64,
}

impl Wish {
    fn of(reference: &ScaledObjectRef) -> Result<Self, Status> {
        let said = |key: &str| reference.scaler_metadata.get(key).map(String::as_str).filter(|text| !text.is_empty());
        let (figure, usual) = match said("metric") {
            None | Some("jobs") => (Figure::Jobs, 1.0),
            Some("pendingJobs") => (Figure::PendingJobs, 1.0),
            Some("utilization") => (Figure::Utilization, 70.0),
            Some("wait") => (Figure::Wait, 30.0),
            Some(other) => {
                let why = format!("metric {other:?} is none of jobs, pendingJobs, utilization and wait");
                return Err(Status::invalid_argument(why));
            }
        };
        let target = match said("target") {
            None => usual,
            Some(text) => {
                text.parse().ok().filter(|target| *target > 0.0 && f64::is_finite(*target)).ok_or_else(|| {
                    Status::invalid_argument(format!("target {text:?} is no number greater than zero"))
                })?
            }
        };
        Ok(Self {
            pool: said("pool").unwrap_or(&reference.name).to_owned(),
            // A ScaledObject scales what is in its own namespace.
            namespace: reference.namespace.clone(),
            figure,
            target,
        })
    }

    /// The metric's name, as the autoscaler sees it.
    fn metric(&self) -> String {
        let figure = match self.figure {
            Figure::Jobs => "jobs",
            Figure::PendingJobs => "pending-jobs",
            Figure::Utilization => "utilization",
            Figure::Wait => "wait",
        };
        format!("vmpod-{}-{figure}", self.pool)
    }

    /// The figure; an error when it isn't known.
    fn value(&self, status: &RunnerPoolStatus, now: Timestamp) -> Result<f64, Status> {
        let pending = || {
            let known = status.pending_jobs.map(f64::from);
            known.ok_or_else(|| {
                Status::unavailable(format!("how many jobs wait for pool {} isn't known now", self.pool))
            })
        };
        match self.figure {
            Figure::Jobs => Ok(pending()? + f64::from(status.busy)),
            Figure::PendingJobs => pending(),
            Figure::Utilization if status.replicas == 0 => Ok(0.0),
            Figure::Utilization => Ok(100.0 * f64::from(status.busy) / f64::from(status.replicas)),
            Figure::Wait if status.pending_jobs == Some(0) => Ok(0.0),
            Figure::Wait => {
                let since = status.pending_since.as_ref().and_then(|since| since.parse::<Timestamp>().ok());
                let waited = since.map(|since| now.duration_since(since).as_secs_f64().max(0.0));
                let unknown = || format!("how long jobs have waited for pool {} isn't known now", self.pool);
                waited.ok_or_else(|| Status::unavailable(unknown()))
            }
        }
    }
}

/// Whether there is anything to run for: as long as nobody can say, what there is stays.
fn is_active(status: &RunnerPoolStatus) -> bool {
    status.busy > 0 || status.pending_jobs.is_none_or(|jobs| jobs > 0)
}

/// A number for those who take whole ones only.
#[expect(clippy::cast_possible_truncation, reason = "up to the next whole number, of what counts jobs")]
fn whole(value: f64) -> i64 {
    value.ceil() as i64
}

/// The scaler, a gRPC service for a server of `tonic`.
#[derive(Clone)]
pub struct Scaler {
    client: Client,
}

impl std::fmt::Debug for Scaler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scaler")
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Actives = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

impl Scaler {
    /// With an API in which it may read `RunnerPool`s.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    fn pools(&self, wish: &Wish) -> Api<RunnerPool> {
        Api::namespaced(self.client.clone(), &wish.namespace)
    }

    async fn status(&self, wish: &Wish) -> Result<RunnerPoolStatus, Status> {
        match self.pools(wish).get_opt(&wish.pool).await {
            Ok(Some(pool)) => pool.status.ok_or_else(|| Status::unavailable("no operator has looked at the pool yet")),
            Ok(None) => {
                let why = format!("there is no RunnerPool {:?} in namespace {:?}", wish.pool, wish.namespace);
                Err(Status::not_found(why))
            }
            Err(error) => Err(Status::unavailable(format!("the pool can't be read: {}", crate::chain(&error)))),
        }
    }

    async fn activity(self, request: Request<ScaledObjectRef>) -> Answer<IsActiveResponse> {
        let status = self.status(&Wish::of(request.get_ref())?).await?;
        Ok(Response::new(IsActiveResponse { result: is_active(&status) }))
    }

    /// Tells each change at once.
    async fn follow_activity(self, request: Request<ScaledObjectRef>) -> Answer<Actives> {
        let wish = Wish::of(request.get_ref())?;
        self.status(&wish).await?;
        let only = watcher::Config::default().fields(&format!("metadata.name={}", wish.pool));
        let seen = watcher(self.pools(&wish), only).default_backoff().applied_objects();
        let mut last = None;
        let news = seen.filter_map(move |pool| {
            // A watch that broke is made anew by itself.
            let now = pool.ok().filter(|pool| pool.name_any() == wish.pool).and_then(|pool| pool.status);
            let now = now.as_ref().map(is_active).filter(|now| last != Some(*now));
            last = now.or(last);
            std::future::ready(now.map(|result| Ok(IsActiveResponse { result })))
        });
        Ok(Response::new(Box::pin(news)))
    }

    fn metric_spec(request: &Request<ScaledObjectRef>) -> Answer<GetMetricSpecResponse> {
        let wish = Wish::of(request.get_ref())?;
        let spec =
            MetricSpec { metric_name: wish.metric(), target_size: whole(wish.target), target_size_float: wish.target };
        Ok(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
    }

    async fn metrics(self, request: Request<GetMetricsRequest>) -> Answer<GetMetricsResponse> {
        let reference = request.get_ref().scaled_object_ref.as_ref();
        let wish = Wish::of(reference.ok_or_else(|| Status::invalid_argument("no scaledObjectRef"))?)?;
        let value = wish.value(&self.status(&wish).await?, Timestamp::now())?;
        let value = MetricValue { metric_name: wish.metric(), metric_value: whole(value), metric_value_float: value };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }
}

impl NamedService for Scaler {
    const NAME: &'static str = "externalscaler.ExternalScaler";
}

impl tower::Service<http::Request<Body>> for Scaler {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let method = request.uri().path().strip_prefix("/externalscaler.ExternalScaler/").map(ToOwned::to_owned);
            Ok(match method.as_deref() {
                Some("IsActive") => {
                    let answer = service_fn(move |request| this.clone().activity(request));
                    Grpc::new(ProstCodec::default()).unary(answer, request).await
                }
                Some("StreamIsActive") => {
                    let answer = service_fn(move |request| this.clone().follow_activity(request));
                    Grpc::new(ProstCodec::default()).server_streaming(answer, request).await
                }
                Some("GetMetricSpec") => {
                    let answer = service_fn(|request| std::future::ready(Self::metric_spec(&request)));
                    Grpc::new(ProstCodec::default()).unary(answer, request).await
                }
                Some("GetMetrics") => {
                    let answer = service_fn(move |request| this.clone().metrics(request));
                    Grpc::new(ProstCodec::default()).unary(answer, request).await
                }
                _ => Status::unimplemented("externalscaler.ExternalScaler has no such method").into_http(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(metadata: &[(&str, &str)]) -> Result<Wish, Status> {
        let scaler_metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Wish::of(&ScaledObjectRef { name: "large".to_owned(), namespace: "ci".to_owned(), scaler_metadata })
    }

    fn status(pending_jobs: Option<u32>, busy: u32, replicas: u32) -> RunnerPoolStatus {
        RunnerPoolStatus { pending_jobs, busy, replicas, ..RunnerPoolStatus::default() }
    }

    #[test]
    fn a_trigger_names_a_pool_a_figure_and_a_target() {
        let usual = wish(&[]).unwrap();
        assert_eq!(
            (usual.pool.as_str(), usual.metric().as_str(), whole(usual.target)),
            ("large", "vmpod-large-jobs", 1)
        );
        let other = wish(&[("pool", "small"), ("metric", "utilization"), ("target", "30")]).unwrap();
        assert_eq!((other.metric().as_str(), whole(other.target)), ("vmpod-small-utilization", 30));
        for (key, value) in [("metric", "load"), ("target", "0"), ("target", "-1"), ("target", "x"), ("target", "NaN")]
        {
            let refused = wish(&[(key, value)]).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{key}={value}");
            assert!(refused.message().contains(value), "{}", refused.message());
        }
    }

    #[test]
    fn what_is_not_known_is_never_zero() {
        let value = |metric: &str, status: &RunnerPoolStatus| {
            wish(&[("metric", metric)]).unwrap().value(status, Timestamp::UNIX_EPOCH).map(|value| value.to_string())
        };
        let known = status(Some(3), 2, 8);
        assert_eq!(value("jobs", &known).unwrap(), "5");
        assert_eq!(value("pendingJobs", &known).unwrap(), "3");
        assert_eq!(value("utilization", &known).unwrap(), "25");
        assert_eq!(value("utilization", &status(Some(0), 0, 0)).unwrap(), "0");
        let unknown = status(None, 0, 0);
        assert_eq!(value("jobs", &unknown).unwrap_err().code(), tonic::Code::Unavailable);
        assert_eq!(value("pendingJobs", &unknown).unwrap_err().code(), tonic::Code::Unavailable);
        assert_eq!(
            value("wait", &known).unwrap_err().code(),
            tonic::Code::Unavailable,
            "it waits, and nobody knows since when"
        );
        let since = Some("1969-12-31T23:59:20Z".to_owned());
        assert_eq!(value("wait", &RunnerPoolStatus { pending_since: since, ..known }).unwrap(), "40");
        assert_eq!(value("wait", &status(Some(0), 1, 1)).unwrap(), "0");
        assert!(is_active(&unknown), "nobody can say that nothing waits");
        assert!(!is_active(&status(Some(0), 0, 4)));
        assert!(is_active(&status(Some(0), 1, 4)) && is_active(&status(Some(1), 0, 0)));
        assert_eq!(whole(0.3), 1);
    }
}
