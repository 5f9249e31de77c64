//! Putting a live VM's places into a template's words.
//!
//! `{{` is a brace. A name that is not known is an error, so that no VMM starts with a path that
//! nobody meant. Paths are quoted as the VMM's options want them.

use serde_json::Value;

use super::{DiskPlace, Places, text};
use crate::error::{Error, ErrorKind, Result};

/// How a VMM's options quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Not at all.
    Plain,
    /// `path=a,b` needs `path="a,b"`.
    CloudHypervisor,
    /// `file=a,b` needs `file=a,,b`.
    Qemu,
}

#[derive(Debug)]
pub(super) struct Filler<'a> {
    places: &'a Places,
    syntax: Syntax,
}

impl<'a> Filler<'a> {
    pub(super) fn new(places: &'a Places, syntax: Syntax) -> Filler<'a> {
        Filler { places, syntax }
    }

    /// A value inside an option.
    pub(super) fn quoted(&self, value: &str) -> String {
        match self.syntax {
            Syntax::Plain => value.to_owned(),
            Syntax::Qemu => value.replace(',', ",,"),
            Syntax::CloudHypervisor if value.contains(',') => format!("\"{value}\""),
            Syntax::CloudHypervisor => value.to_owned(),
        }
    }

    /// Fills all texts of a value.
    pub(super) fn fill_json(&self, value: &Value) -> Result<Value> {
        Ok(match value {
            Value::String(text) => Value::String(self.fill(text)?),
            Value::Array(items) => {
                Value::Array(items.iter().map(|item| self.fill_json(item)).collect::<Result<_>>()?)
            }
            Value::Object(fields) => {
                let fill = |(name, field): (&String, &Value)| -> Result<(String, Value)> {
                    Ok((name.clone(), self.fill_json(field)?))
                };
                Value::Object(fields.iter().map(fill).collect::<Result<_>>()?)
            }
            other => other.clone(),
        })
    }

    /// Fills one text.
    pub(super) fn fill(&self, template: &str) -> Result<String> {
        let bad = |why: &str| {
            Error::new(ErrorKind::InvalidInput, format!("{template:?} in a template: {why}"))
        };
        let mut filled = String::new();
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            filled += &rest[..at];
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                filled += brace;
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(bad("a closing brace alone; write }} for one"));
            }
            let (name, after) =
                rest.split_once('}').ok_or_else(|| bad("an open brace; write {{ for one"))?;
            filled += &self.value(name).ok_or_else(|| {
                bad(&format!("nothing is known as {name:?}; there are {}", self.names().join(", ")))
            })??;
            rest = after;
        }
        filled += rest;
        Ok(filled)
    }

    /// The names that are known.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = ["name", "folder", "api"].map(str::to_owned).to_vec();
        names.extend(self.places.memory.is_some().then(|| "memory".to_owned()));
        names.extend(self.places.vsock.is_some().then(|| "vsock".to_owned()));
        names.extend(self.places.disks.keys().map(|id| format!("disk:{id}")));
        names
    }

    fn value(&self, name: &str) -> Option<Result<String>> {
        let path = |path| text(path).map(|text| self.quoted(text));
        Some(match name {
            "name" => Ok(self.quoted(&self.places.name)),
            "api" => path(&self.places.api),
            "folder" => path(&self.places.folder),
            "memory" => path(&self.places.memory.as_ref()?.path),
            "vsock" => path(self.places.vsock.as_ref()?),
            _ => self.disk(self.places.disks.get(name.strip_prefix("disk:")?)?),
        })
    }

    fn disk(&self, place: &DiskPlace) -> Result<String> {
        match place {
            DiskPlace::File(path) => Ok(self.quoted(text(path)?)),
            DiskPlace::Nbd { socket, export } if self.syntax == Syntax::Qemu => {
                // Both are parts of a URI, and the whole is a value of an option.
                let uri =
                    format!("nbd+unix:///{}?socket={}", escaped(export), escaped(text(socket)?));
                Ok(self.quoted(&uri))
            }
            DiskPlace::Nbd { .. } => {
                let context = "only QEMU reads disks over NBD; give it a file of a mount";
                Err(Error::new(ErrorKind::InvalidInput, context))
            }
        }
    }
}

/// Percent-encodes what a URI has no room for.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::Memory;
    use super::super::Sharing;
    use super::*;

    fn places() -> Places {
        let nbd = DiskPlace::Nbd { socket: "/run/a b,c".into(), export: "vm/disk".to_owned() };
        Places {
            name: "box".to_owned(),
            folder: "/live/box".into(),
            api: "/live/box/api".into(),
            memory: Some(Memory { path: "/m,n".into(), sharing: Sharing::Private }),
            disks: BTreeMap::from([
                ("root".to_owned(), DiskPlace::File("/d,e".into())),
                ("data".to_owned(), nbd),
            ]),
            vsock: None,
        }
    }

    #[test]
    fn names_become_places_in_the_syntax_of_the_vmm() {
        let places = places();
        let qemu = Filler::new(&places, Syntax::Qemu);
        assert_eq!(qemu.fill("file={disk:root},format=raw").unwrap(), "file=/d,,e,format=raw");
        assert_eq!(
            qemu.fill("file={disk:data}").unwrap(),
            "file=nbd+unix:///vm/disk?socket=/run/a%20b%2Cc"
        );
        assert_eq!(qemu.fill("{{{name}}} {api}").unwrap(), "{box} /live/box/api");
        let ch = Filler::new(&places, Syntax::CloudHypervisor);
        assert_eq!(ch.fill("path={disk:root}").unwrap(), "path=\"/d,e\"");
        assert_eq!(ch.fill("path={folder}/x").unwrap(), "path=/live/box/x");
        assert!(ch.fill("path={disk:data}").is_err());
        let plain = Filler::new(&places, Syntax::Plain);
        let config = serde_json::json!({"drives": [{"path": "{disk:root}", "ro": false}], "n": 1});
        let filled = serde_json::json!({"drives": [{"path": "/d,e", "ro": false}], "n": 1});
        assert_eq!(plain.fill_json(&config).unwrap(), filled);
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        let places = places();
        let filler = Filler::new(&places, Syntax::Plain);
        for bad in ["{", "{api", "}", "{disk:none}", "{}", "{vsock}", "{API}"] {
            let error = filler.fill(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
