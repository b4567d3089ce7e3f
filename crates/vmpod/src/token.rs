//! `vmpod token`: bootstrap tokens of the home's `vmpod up`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::PostParams;
use rand::RngExt as _;

use crate::args::{TokenCommand, TokenCreate};
use crate::client;
use crate::home::Home;
use crate::output::{self, talk};
use crate::report::{Exit, Remedy};

const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
/// Names that are taken are not likely; a few tries are plenty.
const TRIES: usize = 3;

/// Runs a subcommand.
pub(crate) async fn run(home: &Home, command: TokenCommand) -> Result<Exit> {
    match command {
        TokenCommand::Create(args) => create(home, args).await,
    }
}

fn random(length: usize) -> String {
    let mut random = rand::rng();
    (0..length).map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())])).collect()
}

/// The Secret that is a token.
fn secret(id: &str, secret: &str, description: &str, end: Timestamp) -> Result<Secret> {
    let end = end.round(jiff::Unit::Second).context("the end of the token can't be told")?;
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {
            "token-id": id,
            "token-secret": secret,
            "description": description,
            "expiration": end.to_string(),
            "usage-bootstrap-authentication": "true",
        },
    }))
    .context("can't make the token's Secret")
}

fn end(now: Timestamp, ttl: Duration) -> Result<Timestamp> {
    if ttl.is_zero() {
        return Err(
            Remedy::new("a token that is good for no time is no token", "give --ttl a duration, such as 1h").into()
        );
    }
    let ttl = SignedDuration::try_from(ttl).context("the duration of --ttl is too long")?;
    now.checked_add(ttl).context("the duration of --ttl is too long")
}

async fn create(home: &Home, args: TokenCreate) -> Result<Exit> {
    let client = client::connect(home).await?;
    let secrets: Api<Secret> = Api::namespaced(client, "kube-system");
    let end = end(Timestamp::now(), args.ttl)?;
    let mut tries = 0;
    let token = loop {
        let (id, word) = (random(6), random(16));
        match secrets.create(&PostParams::default(), &secret(&id, &word, &args.description, end)?).await {
            Ok(_) => break format!("{id}.{word}"),
            Err(kube::Error::Api(status)) if status.code == 409 && tries < TRIES => tries += 1,
            Err(error) => return Err(error).context("can't write the token's Secret"),
        }
    };
    if args.kubeconfig {
        // By it another host finds the API and shows the token.
        let user = serde_json::json!({ "token": token });
        output::data(&format!("{}\n", client::kubeconfig_as(&home.kubeconfig(), "bootstrap", &user)?))?;
    } else {
        output::data(&format!("{token}\n"))?;
    }
    talk(&format!("the token is good for {}", output::seconds(args.ttl)));
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_what_the_api_takes() {
        let now: Timestamp = "2030-01-01T00:00:00.5Z".parse().unwrap();
        let made = secret("abcdef", "0123456789abcdef", "d", end(now, Duration::from_hours(1)).unwrap()).unwrap();
        let data = made.string_data.unwrap();
        assert_eq!(data["expiration"], "2030-01-01T01:00:01Z");
        assert_eq!(made.metadata.name.unwrap(), "bootstrap-token-abcdef");
        assert!(end(now, Duration::ZERO).is_err());
        let word = random(16);
        assert!(word.len() == 16 && word.bytes().all(|byte| LETTERS.contains(&byte)), "{word}");
    }
}
