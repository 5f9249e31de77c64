//! Lines of QEMU's machine protocol: what one is, as a function of its bytes.
//!
//! Source: QEMU's `docs/interop/qmp-spec.rst`.

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a line. The longest that QEMU sends is its schema with a quarter of a MiB, and nobody
/// here asks for that.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// A line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first line; the version of QEMU.
    Greeting {
        /// Major, minor and micro version.
        version: [u32; 3],
    },
    /// Something happened.
    Event {
        /// What.
        name: String,
        /// What it says more, or null.
        data: Value,
    },
    /// A command was carried out.
    Return {
        /// Which one.
        id: Option<u64>,
        /// Its answer.
        value: Value,
    },
    /// A command was refused.
    Refusal {
        /// Which one; none if QEMU could not read it.
        id: Option<u64>,
        /// Why: class and description.
        text: String,
    },
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    event: Option<String>,
    data: Option<Value>,
    // Twice optional: `"return": null` is an answer, too.
    #[serde(default, rename = "return", deserialize_with = "present")]
    value: Option<Value>,
    error: Option<Refusal>,
    id: Option<Value>,
}

#[derive(Deserialize)]
struct Greeting {
    version: Versions,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Numbers,
}

#[derive(Deserialize)]
struct Numbers {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

fn present<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

/// Reads a line.
pub fn parse(bytes: &[u8]) -> Result<Message> {
    let bad = |why: &str| {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        Error::new(ErrorKind::Protocol, format!("QEMU said {start:?}: {why}"))
    };
    let line: Line = serde_json::from_slice(bytes).map_err(|error| bad(&error.to_string()))?;
    // Ours are numbers; those of others on the same monitor are not ours to understand.
    let id = line.id.as_ref().and_then(Value::as_u64);
    match line {
        Line { greeting: Some(Greeting { version: Versions { qemu } }), .. } => {
            Ok(Message::Greeting { version: [qemu.major, qemu.minor, qemu.micro] })
        }
        Line { event: Some(name), data, .. } => {
            Ok(Message::Event { name, data: data.unwrap_or_default() })
        }
        Line { error: Some(Refusal { class, desc }), .. } => {
            let text = if class == "GenericError" { desc } else { format!("{class}: {desc}") };
            Ok(Message::Refusal { id, text })
        }
        Line { value: Some(value), .. } => Ok(Message::Return { id, value }),
        _ => Err(bad("expected a greeting, an event, an answer or a refusal")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let greeting = br#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":"Debian"},"capabilities":["oob"]}}"#;
        assert_eq!(parse(greeting).unwrap(), Message::Greeting { version: [7, 2, 22] });
        let event = br#"{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}"#;
        let stop = Message::Event { name: "STOP".to_owned(), data: Value::Null };
        assert_eq!(parse(event).unwrap(), stop);
        let answer = Message::Return { id: Some(7), value: json!({"status": "paused"}) };
        assert_eq!(parse(br#"{"return":{"status":"paused"},"id":7}"#).unwrap(), answer);
        let null = Message::Return { id: None, value: Value::Null };
        assert_eq!(parse(br#"{"return":null}"#).unwrap(), null);
        let refusal = Message::Refusal { id: Some(1), text: "no such".to_owned() };
        let text = br#"{"id":1,"error":{"class":"GenericError","desc":"no such"}}"#;
        assert_eq!(parse(text).unwrap(), refusal);
        let unknown = br#"{"error":{"class":"CommandNotFound","desc":"The command x"}}"#;
        let Message::Refusal { id: None, text } = parse(unknown).unwrap() else { panic!() };
        assert_eq!(text, "CommandNotFound: The command x");
        for bad in [&b"{}"[..], b"[]", b"", b"{\"return\":", b"\xff", b"{\"QMP\":{}}"] {
            assert_eq!(parse(bad).unwrap_err().kind(), ErrorKind::Protocol, "{bad:?}");
        }
    }
}
