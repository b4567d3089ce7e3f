//! The GitLab provider against the scripted GitLab, over HTTP.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail like tests")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use e2e::gitlab::{Config, Fault, Gitlab as Scripted, NewJob};
use jiff::Timestamp;
use serde_json::json;
use vmpod_fleet::gitlab::{Ensured, Error, Gitlab, Gitlabs, Held, Scope, Settings, Token, Waiting, Wanted};

async fn scripted(config: Config) -> Scripted {
    drop(rustls::crypto::ring::default_provider().install_default());
    Scripted::start(config).await.unwrap()
}

fn at(gitlabs: &Gitlabs, scripted: &Scripted) -> Gitlab {
    gitlabs.get(&scripted.url(), None, Token::new("glpat-scripted".into())).unwrap()
}

fn wanted(uid: &str, scope: Scope) -> Wanted {
    Wanted {
        uid: uid.into(),
        name: format!("ci/{uid}"),
        scope,
        settings: Settings {
            tags: BTreeSet::from(["large".to_owned()]),
            maximum_timeout: Some(3600),
            ..Settings::default()
        },
    }
}

fn later(now: Timestamp, seconds: u64) -> Timestamp {
    now.checked_add(Duration::from_secs(seconds)).unwrap()
}

fn job(tags: &[&str]) -> NewJob {
    NewJob { tags: tags.iter().map(|&tag| tag.to_owned()).collect(), script: vec!["true".into()], ..NewJob::default() }
}

/// What an agent in a machine does: it asks for a job.
async fn ask(scripted: &Scripted, held: &Held, system_id: &str) -> u16 {
    let body = json!({ "token": held.token.expose(), "system_id": system_id, "info": {} });
    let request = reqwest::Client::new().post(format!("{}/api/v4/jobs/request", scripted.url())).json(&body);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn wherever_it_breaks_off_there_is_one_record_and_its_token_works() {
    // Each call in turn fails before or after it had its effect, once with what was kept so far and once without.
    for after in [false, true] {
        for failing in 0..6 {
            for keeps in [false, true] {
                let scripted = scripted(Config::default()).await;
                let gitlab = at(&Gitlabs::default(), &scripted);
                let wanted = wanted("u1", Scope::Group(7));
                let mut now = Timestamp::now();
                let (mut held, mut calls) = (None::<Held>, 0);
                loop {
                    let before = scripted.with(|state| {
                        state.faults.clear();
                        if calls == failing {
                            state.faults.push(Fault { status: 502, times: 1, after, ..Fault::default() });
                        }
                        state.calls.len()
                    });
                    calls += 1;
                    now = later(now, 700);
                    match gitlab.ensure(&wanted, held.as_ref(), now).await {
                        // A crash right here loses it, once.
                        Ok(ensured) if keeps || calls > 2 => held = Some(ensured.held),
                        Ok(_) => {}
                        Err(error) => assert!(error.retry_at().is_some(), "{error}"),
                    }
                    assert!(scripted.with(|state| state.calls.len()) > before, "nothing was asked");
                    if calls > 8 {
                        break;
                    }
                }
                let held = held.unwrap();
                let records: Vec<u64> = scripted.with(|state| state.runners.keys().copied().collect());
                assert_eq!(records, [held.record], "after {after}, failing {failing}, keeps {keeps}");
                assert_eq!(ask(&scripted, &held, "r_000000000001").await, 204, "the token that is kept works");
            }
        }
    }
}

#[tokio::test]
async fn a_record_that_a_race_doubled_goes_unless_it_is_used() {
    let scripted = scripted(Config::default()).await;
    let gitlab = at(&Gitlabs::default(), &scripted);
    let (wanted, other) = (wanted("u1", Scope::Group(7)), wanted("u2", Scope::Group(7)));
    let now = Timestamp::now();
    // Two who look at the same time both see nothing: here the list of the second is an old one.
    let first = gitlab.ensure(&wanted, None, now).await.unwrap().held;
    scripted.with(|state| {
        state.faults.push(Fault {
            path: "/groups/7/runners".into(),
            status: 200,
            body: Some(json!([])),
            times: 1,
            ..Fault::default()
        });
    });
    let second = gitlab.ensure(&wanted, None, now).await.unwrap().held;
    let stranger = gitlab.ensure(&other, None, now).await.unwrap().held;
    assert_ne!(first.record, second.record);
    assert_eq!(ask(&scripted, &second, "r_000000000001").await, 204);
    // Whoever has lost what it kept finds both; the one with a machine stays.
    let found = gitlab.ensure(&wanted, None, now).await.unwrap();
    assert_eq!(found.held.record, first.record);
    let ids = || scripted.with(|state| state.runners.keys().copied().collect::<BTreeSet<_>>());
    assert_eq!(ids(), BTreeSet::from([first.record, second.record, stranger.record]));
    scripted.with(|state| state.runners.get_mut(&second.record).unwrap().managers.clear());
    gitlab.ensure(&wanted, None, now).await.unwrap();
    assert_eq!(ids(), BTreeSet::from([first.record, stranger.record]));
}

#[tokio::test]
async fn a_record_is_what_the_pool_says_and_its_token_is_renewed_in_time() {
    let scripted = scripted(Config { token_lifetime: Some(Duration::from_hours(4)), ..Config::default() }).await;
    let gitlab = at(&Gitlabs::default(), &scripted);
    let mut wanted = wanted("u1", Scope::Project(3));
    let now = Timestamp::now();
    let Ensured { held, .. } = gitlab.ensure(&wanted, None, now).await.unwrap();
    let record = held.record;
    scripted.with(|state| {
        let runner = &state.runners[&record];
        assert_eq!(
            (runner.tags.clone(), runner.run_untagged, runner.maximum_timeout),
            (vec!["large".into()], false, Some(3600))
        );
        assert!(runner.description.contains("ci/u1"));
    });
    // Somebody edits it; the pool changes; a note of people stays, and so does a pause.
    scripted.with(|state| {
        let runner = state.runners.get_mut(&record).unwrap();
        (runner.maintenance_note, runner.paused) = ("ask Ann before you remove this".into(), true);
    });
    wanted.settings.tags.insert("linux".into());
    wanted.settings.run_untagged = true;
    let ensured = gitlab.ensure(&wanted, Some(&held), now).await.unwrap();
    assert!(ensured.trouble.is_none() && ensured.renewed.is_none() && ensured.paused);
    scripted.with(|state| {
        let runner = &state.runners[&record];
        assert_eq!(runner.tags, ["large", "linux"]);
        assert!(runner.run_untagged && runner.paused);
        assert_eq!(runner.maintenance_note, "ask Ann before you remove this\nvmpod-pool=u1");
    });
    // Not before its time, and then once.
    let early = gitlab.ensure(&wanted, Some(&held), later(now, 2 * 3600)).await.unwrap();
    assert_eq!(early.held, held);
    let renewed = gitlab.ensure(&wanted, Some(&held), later(now, 3 * 3600 + 1)).await.unwrap();
    assert!(renewed.renewed.is_some() && renewed.held.token != held.token && renewed.held.record == record);
    assert_eq!(ask(&scripted, &held, "r_000000000001").await, 403);
    assert_eq!(ask(&scripted, &renewed.held, "r_000000000001").await, 204);
    // The record was removed by hand: there will be another.
    scripted.with(|state| state.runners.clear());
    let again = gitlab.ensure(&wanted, Some(&renewed.held), now).await.unwrap();
    assert_ne!(again.held.record, record);
}

#[tokio::test]
async fn busy_is_known_for_each_machine_and_a_failed_look_is_no_empty_list() {
    let scripted = scripted(Config::default()).await;
    let gitlab = at(&Gitlabs::default(), &scripted);
    let now = Timestamp::now();
    let held = gitlab.ensure(&wanted("u1", Scope::Instance), None, now).await.unwrap().held;
    scripted.with(|state| state.add(job(&["large"])));
    assert_eq!(ask(&scripted, &held, "r_00000000busy").await, 201);
    assert_eq!(ask(&scripted, &held, "r_00000000idle").await, 204);
    let machines = gitlab.machines(held.record, now).await.unwrap();
    let busy: Vec<(&str, bool)> = machines.iter().map(|(id, seen)| (id.as_str(), seen.busy)).collect();
    assert_eq!(busy, [("r_00000000busy", true), ("r_00000000idle", false)]);
    assert!(gitlab.is_busy(held.record, "r_00000000busy", now).await.unwrap());
    assert!(!gitlab.is_busy(held.record, "r_00000000idle", now).await.unwrap());
    // What is gone is forgotten; once more is no error.
    for _ in 0..2 {
        gitlab.forget(&held, "r_00000000idle", now).await.unwrap();
    }
    assert_eq!(gitlab.machines(held.record, now).await.unwrap().len(), 1);
    let mut now = now;
    for (status, body) in [(500, json!({})), (200, json!({"message": "surprise"})), (404, json!({})), (429, json!({}))]
    {
        scripted.with(|state| {
            state.faults.push(Fault {
                path: "/managers".into(),
                status,
                body: Some(body.clone()),
                times: 1,
                ..Fault::default()
            });
        });
        now = later(now, 1200);
        assert!(gitlab.machines(held.record, now).await.is_err(), "{status}");
    }
    // A job that runs is nobody's to forget by removing the pool's record: that is for the operator to wait for.
    assert!(gitlab.remove(held.record, later(now, 1200)).await.is_ok());
    assert!(gitlab.remove(held.record, later(now, 1200)).await.is_ok(), "removed is removed");
    assert!(matches!(gitlab.machines(held.record, later(now, 1200)).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_new_gitlab_counts_for_the_record_and_an_old_one_for_the_projects() {
    for version in [(18, 6), (17, 11)] {
        let scripted = scripted(Config { version, ..Config::default() }).await;
        let gitlab = at(&Gitlabs::default(), &scripted);
        let (wanted, now) = (wanted("u1", Scope::Project(1)), Timestamp::now());
        let held = gitlab.ensure(&wanted, None, now).await.unwrap().held;
        let none = gitlab.waiting(&wanted, held.record, &[], now).await.unwrap();
        assert_eq!(none, Waiting { count: 0, oldest: None });
        scripted.with(|state| {
            state.add(job(&["large"]));
            state.add(job(&["gpu"]));
            state.add(job(&[]));
            // More than a page.
            for _ in 0..130 {
                state.add(job(&["large"]));
            }
            state.add(NewJob { project: 2, ..job(&["large"]) });
        });
        let waiting = gitlab.waiting(&wanted, held.record, &[], Timestamp::now()).await.unwrap();
        assert_eq!(waiting.count, 131, "{version:?}");
        let age = Timestamp::now().duration_since(waiting.oldest.unwrap());
        assert!(age.as_secs().abs() < 10, "{age}");
        let asked = scripted.with(|state| state.calls.iter().filter(|call| call.path == "/api/graphql").count());
        assert_eq!(asked, if version > (18, 1) { 2 } else { 1 }, "an old one is not asked again and again");
    }
}

#[tokio::test]
async fn who_can_not_count_says_so() {
    let scripted = scripted(Config { version: (17, 0), ..Config::default() }).await;
    let gitlabs = Gitlabs::default();
    let (wanted, now) = (wanted("u1", Scope::Instance), Timestamp::now());
    let gitlab = at(&gitlabs, &scripted);
    let held = gitlab.ensure(&wanted, None, now).await.unwrap().held;
    let error = gitlab.waiting(&wanted, held.record, &[], now).await.unwrap_err();
    assert!(error.to_string().contains("name its projects"), "{error}");
    scripted.with(|state| state.add(job(&["large"])));
    assert_eq!(gitlab.waiting(&wanted, held.record, &[1, 2], now).await.unwrap().count, 1);
    // A token that may not look sees nothing: that is no zero.
    let stranger = gitlabs.get(&scripted.url(), None, Token::new("wrong".into())).unwrap();
    scripted.with(|state| state.config.version = (18, 6));
    let error = stranger.waiting(&wanted, held.record, &[], later(now, 4000)).await.unwrap_err();
    assert!(matches!(error, Error::NoDemand { .. }), "{error}");
    let error = stranger.ensure(&wanted, None, now).await.unwrap_err();
    assert!(error.needs_a_person() && error.to_string().contains("create_runner"), "{error}");
    assert!(!error.to_string().contains("wrong"), "the token is not shown");
}

#[tokio::test]
async fn one_limit_holds_for_all_pools_of_a_gitlab_and_for_no_other() {
    let limited = scripted(Config { api_per_minute: 6, ..Config::default() }).await;
    let free = scripted(Config::default()).await;
    let gitlabs = Gitlabs::default();
    let now = Timestamp::now();
    let mut refused = 0;
    for n in 0..20 {
        match at(&gitlabs, &limited).ensure(&wanted(&format!("u{n}"), Scope::Instance), None, now).await {
            Ok(_) => {}
            Err(error) => {
                refused += 1;
                let until = error.retry_at().unwrap();
                assert!(until > now && until <= later(now, 61), "{error}");
            }
        }
    }
    assert!(refused > 10, "{refused}");
    // It was told when the limit begins anew, and made not one call that would be refused.
    let statuses: Vec<u16> = limited.with(|state| state.calls.iter().map(|call| call.status).collect());
    assert!(statuses.len() <= 12 && !statuses.contains(&429), "{statuses:?}");
    assert!(gitlabs.calls()[&limited.url()].paused > 0);
    at(&gitlabs, &free).ensure(&wanted("u1", Scope::Instance), None, now).await.unwrap();
    // Its minute is over, and so is the pause here.
    limited.with(|state| state.config.api_per_minute = 0);
    at(&gitlabs, &limited).ensure(&wanted("u99", Scope::Instance), None, later(now, 120)).await.unwrap();
}

#[tokio::test]
async fn maintenance_is_waited_for() {
    let scripted = scripted(Config::default()).await;
    let gitlab = at(&Gitlabs::default(), &scripted);
    let (wanted, now) = (wanted("u1", Scope::Instance), Timestamp::now());
    scripted.with(|state| state.maintenance = true);
    let error = gitlab.ensure(&wanted, None, now).await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }) && error.to_string().contains("maintenance"), "{error}");
    let calls = scripted.with(|state| state.calls.len());
    assert!(matches!(gitlab.ensure(&wanted, None, later(now, 1)).await, Err(Error::Paused { .. })));
    assert_eq!(scripted.with(|state| state.calls.len()), calls, "it is left alone");
    // An older one has another way to say so.
    scripted.with(|state| {
        state.maintenance = false;
        let body = json!({"message": "You cannot perform write operations on a read-only instance"});
        state.faults.push(Fault {
            method: Some("POST".into()),
            path: String::new(),
            status: 403,
            body: Some(body),
            times: 1,
            ..Fault::default()
        });
    });
    let error = gitlab.ensure(&wanted, None, later(now, 10)).await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    gitlab.ensure(&wanted, None, later(now, 100)).await.unwrap();
}

#[tokio::test]
async fn a_certificate_of_ones_own_authority_is_trusted_when_it_is_named() {
    let scripted = scripted(Config::default()).await;
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let pem = key.cert.pem();
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(
        vec![key.cert.der().clone()],
        rustls_pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap(),
    );
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config.unwrap()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, target) = (listener.local_addr().unwrap().port(), scripted.address());
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(connection).await else { return };
                let mut plain = tokio::net::TcpStream::connect(target).await.unwrap();
                drop(tokio::io::copy_bidirectional(&mut tls, &mut plain).await);
            });
        }
    });
    let (url, gitlabs) = (format!("https://localhost:{port}"), Gitlabs::default());
    let with = |ca: Option<&[u8]>| gitlabs.get(&url, ca, Token::new("glpat-scripted".into()));
    let (wanted, now) = (wanted("u1", Scope::Instance), Timestamp::now());
    let error = with(None).unwrap().ensure(&wanted, None, now).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    with(Some(pem.as_bytes())).unwrap().ensure(&wanted, None, now).await.unwrap();
    let error = with(Some(b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")).unwrap_err();
    assert!(matches!(error, Error::Ca { .. }), "{error}");
}
