//! Tars, read front to back: ustar, PAX, GNU long names, and sparse files in all four forms.
//!
//! Nothing is believed: sums of headers are checked, numbers have bounds, and an announced length
//! that does not come is an error. Source: `pax(1)` of POSIX, and the format chapters of the GNU
//! tar manual.

pub(crate) mod header;
pub(crate) mod pax;
pub(crate) mod sparse;

use crate::error::{Error, ErrorKind, Result};
use crate::input::decode::ReadAhead;
use crate::input::tar::header::Header;
use crate::input::tar::pax::Pax;
use crate::input::tar::sparse::SparseMap;
use crate::tree::{Attributes, Time, Xattr};

/// A header, and what every content is padded to.
pub(crate) const RECORD_BYTES: usize = 512;

/// The longest extended header or long name: many attributes of 64 KiB.
const META_BYTES_MAX: u64 = 4 << 20;

/// What a member of an archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Folder,
    Fifo,
}

/// A member of an archive, without its content.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: MemberKind,
    pub(crate) link: Vec<u8>,
    pub(crate) attributes: Attributes,
    pub(crate) device: (u32, u32),
    /// The file's length when it is unpacked.
    pub(crate) bytes: u64,
    /// What holds data, if not all does.
    pub(crate) sparse: Option<SparseMap>,
    pub(crate) xattrs: Vec<Xattr>,
}

/// Reads an archive.
#[derive(Debug)]
pub(crate) struct Tar {
    input: ReadAhead,
    /// Of the current member.
    content_left: u64,
    padding_left: u64,
    /// Bytes that the whole stream may still have.
    allowed: u64,
    limit: u64,
    globals: Pax,
    /// The last member's name, for what is wrong with what is left of its content.
    name: Vec<u8>,
}

impl Tar {
    pub(crate) fn new(input: ReadAhead, limit: u64) -> Tar {
        let globals = Pax::default();
        let name = Vec::new();
        Tar { input, content_left: 0, padding_left: 0, allowed: limit, limit, globals, name }
    }

    /// The next member, or `None` after the end.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        let skipped = self.skip_content();
        skipped.map_err(|error| error.within(format!("entry {}", shown(&self.name))))?;
        let mut pax = self.globals.clone();
        let (mut long_name, mut long_link) = (None, None);
        // What is wrong with an extended header is told with the member that it is of.
        let mut wrong: Option<Error> = None;
        loop {
            let at = self.limit - self.allowed;
            let record = self.record().map_err(|error| wrong.take().unwrap_or(error))?;
            let Some(record) = record else { return Ok(None) };
            if record.iter().all(|&byte| byte == 0) {
                if let Some(error) = wrong {
                    return Err(error);
                }
                self.drain()?;
                return Ok(None);
            }
            let header = Header::parse(&record);
            let header = header.map_err(|error| error.within(format!("at byte {at}")))?;
            match header.flag {
                b'x' | b'X' => {
                    let text = self.meta(&header)?;
                    wrong = wrong.or(pax.read(&text).err());
                }
                b'g' => {
                    let text = self.meta(&header)?;
                    wrong = wrong.or(self.globals.read(&text).err());
                    wrong = wrong.or(pax.read(&text).err());
                }
                b'L' => long_name = Some(without_zero(self.meta(&header)?)),
                b'K' => long_link = Some(without_zero(self.meta(&header)?)),
                // A volume's label.
                b'V' => {
                    self.begin_content(header.bytes)?;
                    self.skip_content()?;
                }
                _ => return self.member(header, pax, long_name, long_link, wrong).map(Some),
            }
        }
    }

    /// The next member and how many bytes lie before its content, for who reads contents
    /// elsewhere.
    pub(crate) fn next_header(&mut self) -> Result<Option<(Member, u64)>> {
        let member = self.next()?;
        let read = self.limit - self.allowed;
        Ok(member.map(|member| (member, read)))
    }

    fn member(
        &mut self,
        header: Header,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        wrong: Option<Error>,
    ) -> Result<Member> {
        let stored = pax.bytes.unwrap_or(header.bytes);
        let plain_name = long_name.unwrap_or(header.name);
        let name = pax.sparse.name.clone().or(pax.path).unwrap_or(plain_name);
        let told = |error: Error| error.within(format!("entry {}", shown(&name)));
        if let Some(error) = wrong {
            return Err(told(error));
        }
        let kind = header::kind(header.flag, &name).map_err(told)?;
        let has_content = kind == MemberKind::File || header.flag == b'D';
        // Links repeat the length of what they lead to, and have no content.
        self.begin_content(if has_content { stored } else { 0 }).map_err(told)?;
        let mut member = Member {
            kind,
            link: pax.link_path.or(long_link).unwrap_or(header.link),
            attributes: Attributes {
                mode: header.mode,
                uid: pax.uid.unwrap_or(header.uid),
                gid: pax.gid.unwrap_or(header.gid),
                mtime: pax.mtime.unwrap_or(Time { seconds: header.mtime, nanoseconds: 0 }),
            },
            device: header.device,
            bytes: stored,
            sparse: None,
            xattrs: pax.xattrs,
            name: Vec::new(),
        };
        if header.flag == b'S' {
            let sparse = self.old_sparse(header.sparse);
            member.sparse = Some(sparse.map_err(told)?);
            member.bytes = header.real_bytes;
        } else if kind == MemberKind::File && pax.sparse.is_there() {
            let sparse = self.pax_sparse(&pax.sparse);
            member.sparse = Some(sparse.map_err(told)?);
            member.bytes = pax.sparse.real_bytes.unwrap_or(stored);
        }
        if let Some(sparse) = &member.sparse {
            sparse.check(member.bytes, self.content_left).map_err(told)?;
        }
        if kind == MemberKind::Folder {
            self.skip_content().map_err(told)?;
        }
        self.name.clone_from(&name);
        member.name = name;
        Ok(member)
    }

    /// The entries of a sparse file's header, and of the records that follow it.
    fn old_sparse(&mut self, first: header::SparsePart) -> Result<SparseMap> {
        let mut map = SparseMap::default();
        map.extend(&first.entries)?;
        let mut more = first.more;
        while more {
            // These records lie before the content and do not count as such.
            let record = self.record()?.ok_or_else(|| truncated("a sparse file's map"))?;
            let part = header::sparse_continued(&record)?;
            map.extend(&part.entries)?;
            more = part.more;
        }
        Ok(map)
    }

    fn pax_sparse(&mut self, sparse: &pax::PaxSparse) -> Result<SparseMap> {
        let mut map = SparseMap::default();
        if sparse.major != Some(1) {
            map.extend(&sparse.map)?;
            return Ok(map);
        }
        // The map is text at the front of the content, filled up to whole records.
        let mut text = sparse::TextMap::default();
        let mut record = [0; RECORD_BYTES];
        while !text.is_complete() {
            if self.content_left < RECORD_BYTES as u64 {
                return Err(truncated("a sparse file's map"));
            }
            self.read_content(&mut record)?;
            text.read(&record)?;
        }
        map.extend(text.entries())?;
        Ok(map)
    }

    fn begin_content(&mut self, bytes: u64) -> Result<()> {
        let record = RECORD_BYTES as u64;
        let padded = bytes.checked_next_multiple_of(record).filter(|&all| all <= self.allowed);
        let Some(padded) = padded else {
            let what = format!("{bytes} bytes, and the stream may have {} at most", self.limit);
            return Err(Error::new(ErrorKind::Limit, what));
        };
        self.content_left = bytes;
        self.padding_left = padded - bytes;
        Ok(())
    }

    /// An extended header's text.
    fn meta(&mut self, header: &Header) -> Result<Vec<u8>> {
        if header.bytes > META_BYTES_MAX {
            let what = format!("an extended header of {} bytes", header.bytes);
            return Err(Error::new(ErrorKind::BadArchive, what));
        }
        self.begin_content(header.bytes)?;
        let mut text = vec![0; usize::try_from(header.bytes).unwrap_or(0)];
        self.read_content(&mut text)?;
        self.skip_content()?;
        Ok(text)
    }

    /// Calls `take` with the next bytes of the content, `bytes` in all.
    pub(crate) fn content(
        &mut self,
        bytes: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            let piece = self.fill(left.min(self.content_left))?;
            let len = piece.len();
            take(piece)?;
            self.consume(len);
            self.content_left -= len as u64;
            left -= len as u64;
        }
        Ok(())
    }

    fn read_content(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut at = 0;
        self.content(buf.len() as u64, &mut |piece| {
            buf[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
            Ok(())
        })
    }

    fn skip_content(&mut self) -> Result<()> {
        let left = self.content_left;
        self.content(left, &mut |_| Ok(()))?;
        self.content_left = std::mem::take(&mut self.padding_left);
        let left = self.content_left;
        self.content(left, &mut |_| Ok(()))
    }

    fn record(&mut self) -> Result<Option<[u8; RECORD_BYTES]>> {
        let mut record = [0; RECORD_BYTES];
        let mut at = 0;
        while at < RECORD_BYTES {
            let piece = self.peek()?;
            if piece.is_empty() {
                return match at {
                    0 => Err(truncated("the archive: its end is missing")),
                    _ => Err(truncated("a header")),
                };
            }
            let len = piece.len().min(RECORD_BYTES - at);
            record[at..at + len].copy_from_slice(&piece[..len]);
            at += len;
            self.consume(len);
        }
        if self.allowed == 0 {
            let what = format!("a stream of more than {} bytes", self.limit);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(Some(record))
    }

    /// Reads to the end of the stream, so that its sums are checked.
    fn drain(&mut self) -> Result<()> {
        loop {
            let len = self.peek()?.len();
            if len == 0 {
                return Ok(());
            }
            self.consume(len);
            if self.allowed == 0 {
                let what = format!("a stream of more than {} bytes", self.limit);
                return Err(Error::new(ErrorKind::Limit, what));
            }
        }
    }

    fn peek(&mut self) -> Result<&[u8]> {
        self.input.fill().map_err(|error| Error::io("cannot read the archive", error))
    }

    /// At least one of the next bytes, at most `most`.
    fn fill(&mut self, most: u64) -> Result<&[u8]> {
        let piece = self.peek()?;
        if piece.is_empty() || most == 0 {
            return Err(truncated("a file's content"));
        }
        let len = usize::try_from(most).unwrap_or(usize::MAX).min(piece.len());
        Ok(&piece[..len])
    }

    fn consume(&mut self, bytes: usize) {
        self.input.consume(bytes);
        self.allowed = self.allowed.saturating_sub(bytes as u64);
    }
}

/// A name as messages have it.
pub(crate) fn shown(name: &[u8]) -> String {
    let text = format!("{:?}", String::from_utf8_lossy(name));
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn without_zero(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(end) = name.iter().position(|&byte| byte == 0) {
        name.truncate(end);
    }
    name
}

fn truncated(what: &str) -> Error {
    Error::new(ErrorKind::BadArchive, format!("the stream ends within {what}"))
}
