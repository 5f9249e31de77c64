//! Extended headers: `LENGTH KEY=VALUE` lines.

use crate::error::{Error, ErrorKind, Result};
use crate::input::tar::header::SparseEntry;
use crate::tree::{Time, Xattr};

/// The prefix of extended attributes, as star, GNU tar and Go write them.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// A sparse file, in one of the three forms that GNU tar has had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PaxSparse {
    pub(crate) major: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) real_bytes: Option<u64>,
    pub(crate) map: Vec<SparseEntry>,
    offset: Option<u64>,
}

impl PaxSparse {
    pub(crate) fn is_there(&self) -> bool {
        self.major.is_some() || self.real_bytes.is_some() || !self.map.is_empty()
    }
}

/// What extended headers say of the next member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_path: Option<Vec<u8>>,
    pub(crate) bytes: Option<u64>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) mtime: Option<Time>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: PaxSparse,
}

impl Pax {
    /// Adds what a header's text says; later lines win, and an empty value takes back.
    pub(crate) fn read(&mut self, mut text: &[u8]) -> Result<()> {
        while !text.is_empty() {
            let space = text.iter().position(|&byte| byte == b' ');
            let len = space.and_then(|space| decimal(&text[..space]));
            let (Some(space), Some(len)) = (space, len) else {
                // Some programs fill up with zeros.
                if text.iter().all(|&byte| byte == 0) {
                    return Ok(());
                }
                return Err(bad("an extended header's line without its length"));
            };
            let line = usize::try_from(len).ok().and_then(|len| text.get(space + 1..len));
            let Some((b'\n', line)) = line.and_then(<[u8]>::split_last) else {
                return Err(bad("an extended header's line of a wrong length"));
            };
            let equals = line.iter().position(|&byte| byte == b'=');
            let equals = equals.ok_or_else(|| bad("an extended header's line without ="))?;
            self.set(&line[..equals], &line[equals + 1..])?;
            text = &text[space + 1 + line.len() + 1..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let wrong = || bad(&format!("an extended header with a wrong {}", key.escape_ascii()));
        let unless_empty = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        let length = |value: &[u8]| match value {
            [] => Ok(None),
            value => decimal(value).map(Some).ok_or_else(wrong),
        };
        let id = |value: &[u8]| match value {
            [] => Ok(None),
            value => {
                let id = decimal(value).and_then(|id| u32::try_from(id).ok());
                id.map(Some).ok_or_else(wrong)
            }
        };
        match key {
            b"path" => self.path = unless_empty(value),
            b"linkpath" => self.link_path = unless_empty(value),
            b"size" => self.bytes = length(value)?,
            b"uid" => self.uid = id(value)?,
            b"gid" => self.gid = id(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or_else(wrong)?),
            b"GNU.sparse.major" => self.sparse.major = length(value)?,
            b"GNU.sparse.name" => self.sparse.name = unless_empty(value),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_bytes = length(value)?,
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> =
                    value.split(|&byte| byte == b',').map(decimal).collect();
                let numbers = numbers.ok_or_else(wrong)?;
                let (pairs, rest) = numbers.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(wrong());
                }
                self.sparse.map = pairs.iter().map(|&[offset, len]| (offset, len)).collect();
            }
            b"GNU.sparse.offset" => self.sparse.offset = length(value)?,
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or_else(wrong)?;
                self.sparse.map.push((offset, length(value)?.ok_or_else(wrong)?));
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.retain(|xattr| xattr.name != name);
                    self.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                }
            }
        }
        Ok(())
    }
}

/// A number in decimal digits.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a fraction of any length, of which nine digits count.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or(b"0");
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, &digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::BadArchive, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_by_their_length() {
        let mut pax = Pax::default();
        // The attribute's value has a line end, an equals sign and a zero byte.
        let text: String = ["path=a\nb=c", "size=345", "mtime=1350244992.0239607"]
            .into_iter()
            .chain(["SCHILY.xattr.user.a=\n=\0"])
            .map(|line| format!("{} {line}\n", line.len() + 4))
            .collect();
        pax.read(text.as_bytes()).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb=c"[..]));
        assert_eq!(pax.bytes, Some(345));
        let mtime = Time { seconds: 1_350_244_992, nanoseconds: 23_960_700 };
        assert_eq!(pax.mtime, Some(mtime));
        assert_eq!(pax.xattrs[0].value, b"\n=\0");
        for wrong in ["5 a=b", "99 a=b\n", "7 ab\n", "6 a=bc\n", "x", "0 a=b\n", "13 size=345xx\n"]
        {
            assert!(Pax::default().read(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn times_before_1970() {
        let cases = [("-1", (-1, 0)), ("-0.25", (-1, 750_000_000)), ("1.5", (1, 500_000_000))];
        for (text, (seconds, nanoseconds)) in cases {
            assert_eq!(time(text.as_bytes()), Some(Time { seconds, nanoseconds }), "{text}");
        }
        assert_eq!(time(b"1.x"), None);
    }
}
