//! What a double does to a call instead of answering it.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What happens to some calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The calls, by method and the start of the path: `PUT /snapshot/create`.
    pub call: String,
    /// How many of them are let pass first.
    #[serde(default)]
    pub skip: u32,
    /// To how many it happens then; without, to all.
    #[serde(default)]
    pub times: Option<u32>,
    /// What.
    pub action: Action,
}

/// What happens to a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is not carried out, and never answered.
    Hang,
    /// It is carried out, and never answered.
    HangAfter,
    /// The process ends at once.
    Die,
    /// It is carried out, and the process ends before the answer.
    DieAfter,
    /// The connection is closed without an answer.
    Close,
    /// So many milliseconds pass first.
    Slow(u64),
    /// It is refused with a status and a body.
    Refuse(u16, String),
    /// The answer is no HTTP.
    Garbage,
    /// The answer's body is cut short.
    CutAnswer,
    /// The answer is sent in chunks.
    Chunked,
    /// It is carried out, and a file of that name in the folder of the state is cut in half: a
    /// write whose count nobody looked at.
    CutFile(String),
}

/// The rules of a double, and how often each was looked at.
#[derive(Debug, Default)]
pub(super) struct Behaviour {
    rules: Vec<(Rule, u32)>,
}

impl Behaviour {
    pub(super) fn new(rules: Vec<Rule>) -> Behaviour {
        Behaviour { rules: rules.into_iter().map(|rule| (rule, 0)).collect() }
    }

    /// What happens to this call.
    pub(super) fn of(&mut self, call: &str) -> Option<Action> {
        for (rule, seen) in &mut self.rules {
            if !call.starts_with(&rule.call) {
                continue;
            }
            *seen += 1;
            let number = *seen - 1;
            let is_meant =
                number >= rule.skip && rule.times.is_none_or(|times| number - rule.skip < times);
            if is_meant {
                return Some(rule.action.clone());
            }
        }
        None
    }
}

/// Cuts a file in half.
pub(super) fn cut(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    let length = file.metadata()?.len();
    file.set_len(length / 2)
}

/// Never returns.
pub(super) fn hang() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_count_their_calls() {
        let rule = |call: &str, skip, times| Rule {
            call: call.to_owned(),
            skip,
            times,
            action: Action::Hang,
        };
        let mut behaviour =
            Behaviour::new(vec![rule("PUT /a", 1, Some(1)), rule("GET /", 0, None)]);
        let mut happens = |call| behaviour.of(call).is_some();
        assert!(!happens("PUT /a") && happens("PUT /a/b") && !happens("PUT /a"));
        assert!(happens("GET /x") && happens("GET /x") && !happens("PATCH /a"));
        let text = r#"{"call":"PUT /a","action":{"refuse":[400,"no"]}}"#;
        let parsed: Rule = serde_json::from_str(text).unwrap();
        assert_eq!(parsed.action, Action::Refuse(400, "no".to_owned()));
    }
}
