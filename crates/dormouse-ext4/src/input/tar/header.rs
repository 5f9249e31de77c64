//! A header of 512 bytes.

use crate::error::{Error, ErrorKind, Result};
use crate::input::tar::{MemberKind, RECORD_BYTES, shown};

/// The largest numbers of devices that Linux has: 12 and 20 bits.
const MAJOR_MAX: u64 = 0xfff;
const MINOR_MAX: u64 = 0xf_ffff;

/// A run of a sparse file's data: where it begins in the file, and how long it is.
pub(crate) type SparseEntry = (u64, u64);

/// Some entries of a sparse file's map, and whether more follow in the next record.
#[derive(Clone, Debug, Default)]
pub(crate) struct SparsePart {
    pub(crate) entries: Vec<SparseEntry>,
    pub(crate) more: bool,
}

/// A header's fields.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) name: Vec<u8>,
    pub(crate) flag: u8,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) bytes: u64,
    pub(crate) mtime: i64,
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u32, u32),
    /// Of the old GNU form.
    pub(crate) sparse: SparsePart,
    pub(crate) real_bytes: u64,
}

impl Header {
    pub(crate) fn parse(record: &[u8; RECORD_BYTES]) -> Result<Header> {
        let no_tar = || bad("a header with a wrong sum; this is no tar, or it is damaged");
        let sum = number(&record[148..156]).map_err(|_| no_tar())?;
        let sum = u64::try_from(sum).unwrap_or(u64::MAX);
        let outside = record[..148].iter().chain(&record[156..]);
        let unsigned: u64 = outside.clone().map(|&byte| u64::from(byte)).sum::<u64>() + 8 * 32;
        // Some old programs added signed bytes.
        let signed = outside.map(|&byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        if sum != unsigned && i64::try_from(sum) != Ok(signed) {
            return Err(no_tar());
        }
        let name = header_name(record);
        Header::fields(record, name.clone())
            .map_err(|error| error.within(format!("entry {}", shown(&name))))
    }

    /// Reads the fields of a header whose sum is right.
    fn fields(record: &[u8; RECORD_BYTES], name: Vec<u8>) -> Result<Header> {
        let magic = &record[257..263];
        let (is_ustar, is_gnu) = (magic == b"ustar\0", magic == b"ustar ");
        let flag = record[156];
        let mut device = (0, 0);
        if (is_ustar || is_gnu) && matches!(flag, b'3' | b'4') {
            let part = |bytes: &[u8], most: u64| {
                let found = u64::try_from(number(bytes)?).ok().filter(|&found| found <= most);
                found.ok_or_else(|| bad("a device number that Linux does not have"))
            };
            let (major, minor) =
                (part(&record[329..337], MAJOR_MAX)?, part(&record[337..345], MINOR_MAX)?);
            device = (
                u32::try_from(major).unwrap_or(u32::MAX),
                u32::try_from(minor).unwrap_or(u32::MAX),
            );
        }
        let id = |bytes: &[u8]| {
            let number = number(bytes)?;
            let wrong = || bad(&format!("an owner of {number}, which is no id of 32 bits"));
            u32::try_from(number).map_err(|_| wrong())
        };
        let mut header = Header {
            name,
            flag,
            mode: u16::try_from(number(&record[100..108])? & 0o7777).unwrap_or(0),
            uid: id(&record[108..116])?,
            gid: id(&record[116..124])?,
            bytes: length(&record[124..136])?,
            mtime: number(&record[136..148])?,
            link: text(&record[157..257]),
            device,
            sparse: SparsePart::default(),
            real_bytes: 0,
        };
        if flag == b'S' {
            header.sparse = sparse_part(&record[386..483])?;
            header.real_bytes = length(&record[483..495])?;
        }
        Ok(header)
    }
}

/// The name in a header's own fields.
fn header_name(record: &[u8; RECORD_BYTES]) -> Vec<u8> {
    let name = text(&record[..100]);
    if &record[257..263] == b"ustar\0" && record[345] != 0 {
        return [&text(&record[345..500])[..], b"/", &name].concat();
    }
    name
}

/// A record that continues a sparse file's map.
pub(crate) fn sparse_continued(record: &[u8; RECORD_BYTES]) -> Result<SparsePart> {
    sparse_part(&record[..505])
}

/// Entries of 24 bytes, and a byte that says whether more follow.
fn sparse_part(bytes: &[u8]) -> Result<SparsePart> {
    let (entries, more) = bytes.as_chunks::<24>();
    let mut part = SparsePart { entries: Vec::new(), more: more.first().is_some_and(|&m| m != 0) };
    for entry in entries {
        if entry[12] == 0 {
            break;
        }
        part.entries.push((length(&entry[..12])?, length(&entry[12..])?));
    }
    Ok(part)
}

/// What a flag means.
pub(crate) fn kind(flag: u8, name: &[u8]) -> Result<MemberKind> {
    Ok(match flag {
        // Before there was a flag for folders, a slash told.
        b'0' | 0 | b'7' if name.ends_with(b"/") => MemberKind::Folder,
        b'0' | 0 | b'7' | b'S' => MemberKind::File,
        b'1' => MemberKind::HardLink,
        b'2' => MemberKind::Symlink,
        b'3' => MemberKind::CharDevice,
        b'4' => MemberKind::BlockDevice,
        b'5' | b'D' => MemberKind::Folder,
        b'6' => MemberKind::Fifo,
        other => {
            let what = format!("a member of unknown type {:?}", char::from(other));
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
    })
}

fn text(field: &[u8]) -> Vec<u8> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    field[..end].to_vec()
}

fn length(field: &[u8]) -> Result<u64> {
    u64::try_from(number(field)?).map_err(|_| bad("a negative length"))
}

/// A number in octal digits, or in binary if the first bit says so.
fn number(field: &[u8]) -> Result<i64> {
    if let [first, rest @ ..] = field
        && first & 0x80 != 0
    {
        let begin: i128 = if first & 0x40 != 0 { -1 } else { 0 };
        let head = begin << 7 | i128::from(first & 0x7f);
        let mut value = head;
        for &byte in rest {
            value = value.checked_mul(256).ok_or_else(|| bad("a number out of bounds"))?;
            value |= i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| bad("a number out of bounds"));
    }
    let digits = field.iter().skip_while(|&&byte| byte == b' ');
    let mut value: i64 = 0;
    for &byte in digits {
        match byte {
            b'0'..=b'7' => {
                let next = value.checked_mul(8).map(|value| value + i64::from(byte - b'0'));
                value = next.ok_or_else(|| bad("a number out of bounds"))?;
            }
            b' ' | 0 => break,
            _ => return Err(bad("a number that is none")),
        }
    }
    Ok(value)
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::BadArchive, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        let cases: [(&[u8], i64); 8] = [
            (b"0000644\0", 0o644),
            (b"   644 \0", 0o644),
            (b"\0\0\0\0", 0),
            (b"77777777777\0", 0o777_7777_7777),
            (b"\x80\0\0\0\0\0\0\x07", 7),
            (b"\x80\0\0\0\x02\0\0\0\0\0\0\0", 2 << 56),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfb", -5),
        ];
        for (field, expected) in cases {
            assert_eq!(number(field).unwrap(), expected, "{field:?}");
        }
        for wrong in [&b"8"[..], b"12x", b"\x80\x01\0\0\0\0\0\0\0\0\0\0", b"-1"] {
            assert!(number(wrong).is_err(), "{wrong:?}");
        }
    }
}
