//! What an agent and a machine's helper say to each other: one JSON object a line, over a socket in the machine's directory.
//!
//! The two may be of different versions of this program, because a machine outlives the agent that started it. So nothing is ever
//! taken away here, and what a helper doesn't know it refuses.

use serde::{Deserialize, Serialize};

use crate::spec::Spec;

/// The socket, in the machine's directory. It is there from the moment at which the guest runs.
pub(super) const SOCKET: &str = "vz.sock";
/// How the machine ended, written by its helper as the last thing.
pub(super) const ENDED: &str = "ended.json";
/// The exit code of a helper that was refused because too many guests run.
pub(super) const BUSY: u8 = 75;

/// Something that a helper is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Command {
    /// Say whose it is.
    Describe,
    /// Press the power button.
    PowerDown,
    /// End the guest at once.
    Stop,
    /// Stop its processors.
    Pause,
    /// Let them run again.
    Resume,
}

/// A command, with the number by which its answer is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    #[serde(rename = "do")]
    pub(super) command: Command,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) id: u64,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// To `describe`: the machine's UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uuid: Option<String>,
    /// To `describe`: the helper's version of this program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) version: Option<String>,
}

impl Answer {
    pub(super) fn describe(id: u64, spec: &Spec) -> Self {
        let version = Some(env!("CARGO_PKG_VERSION").to_owned());
        Self { id, uuid: Some(spec.id.uuid().to_string()), version, error: None }
    }

    pub(super) fn of(id: u64, result: Result<(), String>) -> Self {
        Self { id, error: result.err(), ..Self::default() }
    }
}

/// A value as a line.
pub(super) fn line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that was started by this version must be understood by every later one.
    #[test]
    fn the_words_stay_what_they_are() {
        let all = [Command::Describe, Command::PowerDown, Command::Stop, Command::Pause, Command::Resume];
        let lines: Vec<_> =
            all.into_iter().enumerate().map(|(id, command)| Request { id: id as u64, command }).collect();
        let text: Vec<_> = lines.iter().map(|request| serde_json::to_string(request).unwrap()).collect();
        insta::assert_snapshot!(text.join("\n"), @r#"
        {"id":0,"do":"describe"}
        {"id":1,"do":"power-down"}
        {"id":2,"do":"stop"}
        {"id":3,"do":"pause"}
        {"id":4,"do":"resume"}
        "#);
        let answer: Answer = serde_json::from_str(r#"{"id":7,"error":"no","added later":true}"#).unwrap();
        assert_eq!(answer, Answer { id: 7, error: Some("no".to_owned()), ..Answer::default() });
    }
}
