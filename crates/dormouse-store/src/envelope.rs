//! The JSON files of a store: an object that says what it is, around a body with a checksum.
//!
//! ```text
//! {"format":"…","version":1,"length":N,"checksum":"xxh3:HEX","BODY":{…}}
//! ```
//!
//! `length` and `checksum` are those of the body's bytes, as they stand in the file.

use std::collections::BTreeMap;

use dormouse_image::digest::checksum;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};

/// One kind of file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Envelope {
    /// What `format` says.
    pub(crate) format: &'static str,

    /// The only version that this build reads and writes.
    pub(crate) version: u32,

    /// The key of the body.
    pub(crate) body: &'static str,
}

impl Envelope {
    /// The bytes of a file.
    pub(crate) fn seal(&self, body: &impl Serialize) -> Result<Vec<u8>> {
        let body = serde_json::to_string(body).map_err(|error| {
            let what = format!("cannot write {} as JSON", self.body);
            Error::with_source(ErrorKind::InvalidInput, what, error)
        })?;
        let Envelope { format, version, body: key } = self;
        let (length, sum) = (body.len(), sum(&body));
        let file = format!(
            r#"{{"format":"{format}","version":{version},"length":{length},"checksum":"{sum}","{key}":{body}}}"#
        );
        Ok((file + "\n").into_bytes())
    }

    /// The body of a file, once its bytes are known to be those that were written.
    pub(crate) fn open<'a>(&self, file: &'a [u8]) -> Result<&'a str> {
        match self.open_as_sealed(file) {
            Some(body) => Ok(body),
            None => self.open_any(file),
        }
    }

    /// The body of a file just as [`Envelope::seal`] writes it, found without parsing: a listing of
    /// thousands of snapshots goes through its JSON once instead of twice.
    fn open_as_sealed<'a>(&self, file: &'a [u8]) -> Option<&'a str> {
        let file = std::str::from_utf8(file).ok()?;
        let rest = file.strip_prefix("{\"format\":\"")?.strip_prefix(self.format)?;
        let (version, rest) = rest.strip_prefix("\",\"version\":")?.split_once(',')?;
        let (length, rest) = rest.strip_prefix("\"length\":")?.split_once(',')?;
        let (expected, rest) = rest.strip_prefix("\"checksum\":\"")?.split_once('"')?;
        let body = rest.strip_prefix(",\"")?.strip_prefix(self.body)?.strip_prefix("\":")?;
        let body = body.strip_suffix("}\n")?;
        let as_written = version == self.version.to_string()
            && length == body.len().to_string()
            && expected == sum(body);
        as_written.then_some(body)
    }

    /// The body of a file that is written otherwise, or what is wrong with it.
    fn open_any<'a>(&self, file: &'a [u8]) -> Result<&'a str> {
        let fields: BTreeMap<&str, &RawValue> =
            serde_json::from_slice(file).map_err(|error| self.not_json(error))?;
        let format: &str = self.field(&fields, "format")?;
        if format != self.format {
            return Err(self.damaged(format!("format {format:?}, expected {:?}", self.format)));
        }
        let version: u64 = self.field(&fields, "version")?;
        if version != u64::from(self.version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{} version {version}, this build knows {}; use a later dormouse",
                    self.body, self.version
                ),
            ));
        }
        let length: u64 = self.field(&fields, "length")?;
        let expected: &str = self.field(&fields, "checksum")?;
        let body = fields.get(self.body).map_or("", |body| body.get());
        let sum = sum(body);
        if length != body.len() as u64 || expected != sum {
            return Err(self.damaged(format!("checksum {sum}, expected {expected}")));
        }
        if fields.len() != 5 {
            return Err(self.damaged("more fields than there are".to_owned()));
        }
        Ok(body)
    }

    /// The body, parsed.
    pub(crate) fn parse<T: for<'a> Deserialize<'a>>(&self, file: &[u8]) -> Result<T> {
        serde_json::from_str(self.open(file)?).map_err(|error| self.not_json(error))
    }

    fn field<'a, T: Deserialize<'a>>(
        &self,
        fields: &BTreeMap<&str, &'a RawValue>,
        key: &str,
    ) -> Result<T> {
        let value = fields.get(key).map_or("null", |value| value.get());
        serde_json::from_str(value).map_err(|error| self.not_json(error))
    }

    fn not_json(&self, error: serde_json::Error) -> Error {
        Error::with_source(ErrorKind::Corrupt, format!("{} is not valid", self.body), error)
    }

    fn damaged(&self, why: String) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{} is damaged: {why}", self.body))
    }
}

fn sum(body: &str) -> String {
    format!("xxh3:{:016x}", checksum(&[body.as_bytes()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENVELOPE: Envelope = Envelope { format: "dormouse-test", version: 1, body: "test" };

    fn sealed() -> String {
        String::from_utf8(ENVELOPE.seal(&BTreeMap::from([("a", 1)])).unwrap()).unwrap()
    }

    #[test]
    fn bodies_round_trip() {
        assert_eq!(
            sealed(),
            "{\"format\":\"dormouse-test\",\"version\":1,\"length\":7,\
             \"checksum\":\"xxh3:c5e3762ffc8453c6\",\"test\":{\"a\":1}}\n"
        );
        assert_eq!(ENVELOPE.open(sealed().as_bytes()).unwrap(), "{\"a\":1}");
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        use ErrorKind::{Corrupt, Unsupported};
        let cases = [
            ("another format", "dormouse-test", "dormouse-text", Corrupt),
            ("a later version", "\"version\":1", "\"version\":2", Unsupported),
            ("a version that is no number", "\"version\":1", "\"version\":\"1\"", Corrupt),
            ("another length", "\"length\":7", "\"length\":8", Corrupt),
            ("another checksum", "xxh3:c", "xxh3:d", Corrupt),
            ("another body", "{\"a\":1}", "{\"a\":2}", Corrupt),
            ("the same body, written otherwise", "{\"a\":1}", "{\"a\": 1}", Corrupt),
            ("no body", "\"test\"", "\"tests\"", Corrupt),
            ("one field more", "{\"format\"", "{\"more\":1,\"format\"", Corrupt),
            ("text behind it", "}}\n", "}}\n{", Corrupt),
        ];
        for (what, from, to, kind) in cases {
            let text = sealed().replacen(from, to, 1);
            assert_ne!(text, sealed(), "{what}");
            assert_eq!(ENVELOPE.open(text.as_bytes()).expect_err(what).kind(), kind, "{what}");
        }
        // What a later version adds is its own affair: it is named, not called damage.
        let later = r#"{"format":"dormouse-test","version":2,"other":null}"#;
        assert_eq!(ENVELOPE.open(later.as_bytes()).unwrap_err().kind(), Unsupported);
    }
}
