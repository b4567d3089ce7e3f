//! One operator at a time: a Lease that its holder renews.
//!
//! As in client-go: whoever finds no Lease, its own, or one that wasn't renewed for its duration, takes it, and the API's
//! resource version makes sure that only one does.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};

/// How long a lease holds without being renewed.
const HOLDS: i32 = 15;
/// How often it is renewed, or tried.
pub(crate) const EVERY: Duration = Duration::from_secs(4);

/// What to do about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Take,
    Renew,
    Wait,
}

fn decide(lease: Option<&LeaseSpec>, me: &str, now: Timestamp) -> Step {
    let Some(lease) = lease else { return Step::Create };
    match lease.holder_identity.as_deref() {
        Some(holder) if holder == me => Step::Renew,
        None | Some("") => Step::Take,
        Some(_) => {
            let holds = SignedDuration::from_secs(i64::from(lease.lease_duration_seconds.unwrap_or(HOLDS)));
            let over = lease.renew_time.as_ref().is_none_or(|at| now.duration_since(at.0) > holds);
            if over { Step::Take } else { Step::Wait }
        }
    }
}

/// Takes or renews the lease; whether this operator may act until the next call.
pub(crate) async fn lead(leases: &Api<Lease>, name: &str, me: &str, now: Timestamp) -> Result<bool, kube::Error> {
    let found = leases.get_opt(name).await?;
    let step = decide(found.as_ref().and_then(|lease| lease.spec.as_ref()), me, now);
    let mine = |transitions: i32, acquired: Option<MicroTime>| LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(HOLDS),
        acquire_time: acquired.or(Some(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    };
    let old = found.as_ref().and_then(|lease| lease.spec.clone()).unwrap_or_default();
    let transitions = old.lease_transitions.unwrap_or(0);
    let written = match step {
        Step::Wait => return Ok(false),
        Step::Create => {
            let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
            leases.create(&PostParams::default(), &Lease { metadata, spec: Some(mine(0, None)) }).await
        }
        Step::Take | Step::Renew => {
            let spec =
                if step == Step::Renew { mine(transitions, old.acquire_time) } else { mine(transitions + 1, None) };
            // With the version that was read: whoever wrote meanwhile has it.
            let metadata = found.map(|lease| lease.metadata).unwrap_or_default();
            leases.replace(name, &PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
        }
    };
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_its_holders_until_it_is_over() {
        let now = Timestamp::from_second(1000).unwrap();
        let held = |by: &str, ago: i64| LeaseSpec {
            holder_identity: Some(by.to_owned()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(Timestamp::from_second(1000 - ago).unwrap())),
            ..LeaseSpec::default()
        };
        assert_eq!(decide(None, "me", now), Step::Create);
        assert_eq!(decide(Some(&held("me", 100)), "me", now), Step::Renew);
        assert_eq!(decide(Some(&held("other", 3)), "me", now), Step::Wait);
        assert_eq!(decide(Some(&held("other", 16)), "me", now), Step::Take);
        assert_eq!(decide(Some(&held("", 1)), "me", now), Step::Take);
    }
}
