//! E2B's builds: headers of all versions, data objects of all codecs, and a reader of versions 3 and
//! 5 that makes a device of them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use super::lz4;
use super::random::PAGE;
use super::wrenn::dashed;

/// An id.
pub type Id = [u8; 16];

/// How data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Plain,
    /// Frames of zstd.
    Zstd,
    /// Frames of LZ4.
    Lz4,
}

impl Codec {
    /// What its objects' names end in.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Codec::Plain => "",
            Codec::Zstd => ".zstd",
            Codec::Lz4 => ".lz4",
        }
    }
}

/// A frame: start and length when decoded, start and length in the object.
pub type Frame = (u64, u64, u64, u64);

/// What a header says of a build.
#[derive(Clone, Debug)]
pub struct Build {
    /// Its data's length.
    pub size: u64,
    /// Its codec.
    pub codec: Codec,
    /// Its frames.
    pub frames: Vec<Frame>,
}

/// The first 64 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// 1 to 5.
    pub version: u64,
    /// 4096 or 2 MiB.
    pub block: u64,
    /// Bytes of the device.
    pub size: u64,
    /// Counts up.
    pub generation: u64,
    /// Its own build.
    pub build: Id,
    /// The first one.
    pub base: Id,
}

/// Pages: start, length, build (nil is zero), storage start.
pub type Mapping = (u64, u64, Id, u64);

/// A header.
#[must_use]
pub fn header(head: &Head, builds: &BTreeMap<Id, Build>, mappings: &[Mapping]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [head.version, head.block, head.size, head.generation] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(head.build);
    bytes.extend(head.base);
    if head.version <= 3 {
        records(mappings, &mut bytes);
        return bytes;
    }
    let mut block = builds_section(builds);
    if head.version == 4 {
        block.extend((mappings.len() as u32).to_le_bytes());
        records(mappings, &mut block);
    } else {
        columns(mappings, &mut block);
    }
    bytes.push(0);
    bytes.extend((block.len() as u32).to_le_bytes());
    bytes.extend(lz4::frame(&block, 0x74));
    bytes
}

fn records(mappings: &[Mapping], bytes: &mut Vec<u8>) {
    for (start, length, build, storage) in mappings {
        bytes.extend((start * 4096).to_le_bytes());
        bytes.extend((length * 4096).to_le_bytes());
        bytes.extend(build);
        bytes.extend((storage * 4096).to_le_bytes());
    }
}

/// What versions 4 and 5 say of builds.
#[must_use]
pub fn builds_section(builds: &BTreeMap<Id, Build>) -> Vec<u8> {
    let mut bytes = (builds.len() as u32).to_le_bytes().to_vec();
    for (id, build) in builds {
        bytes.extend(id);
        bytes.extend(build.size.to_le_bytes());
        bytes.extend([0; 32]);
        let codec: u32 = match build.codec {
            Codec::Plain => 0,
            Codec::Zstd => 1,
            Codec::Lz4 => 2,
        };
        bytes.extend(codec.to_le_bytes());
        bytes.extend((build.frames.len() as u32).to_le_bytes());
        for &(decoded, decoded_len, encoded, encoded_len) in &build.frames {
            bytes.extend(decoded.to_le_bytes());
            bytes.extend(encoded.to_le_bytes());
            bytes.extend((decoded_len as u32).to_le_bytes());
            bytes.extend((encoded_len as u32).to_le_bytes());
        }
    }
    bytes
}

/// The mappings of version 5.
pub fn columns(mappings: &[Mapping], bytes: &mut Vec<u8>) {
    let mut table: Vec<Id> = Vec::new();
    let runs: Vec<_> = mappings.iter().filter(|mapping| mapping.2 != [0; 16]).collect();
    for mapping in &runs {
        if !table.contains(&mapping.2) {
            table.push(mapping.2);
        }
    }
    bytes.extend((table.len() as u32).to_le_bytes());
    table.iter().for_each(|id| bytes.extend(id));
    bytes.extend((runs.len() as u32).to_le_bytes());
    let mut last = 0;
    for run in &runs {
        leb128(run.0 - last, bytes);
        last = run.0;
    }
    runs.iter().for_each(|run| leb128(run.1, bytes));
    let mut last = 0;
    for run in &runs {
        let delta = run.3 as i64 - last;
        leb128(if delta < 0 { (-delta as u64) * 2 - 1 } else { delta as u64 * 2 }, bytes);
        last = run.3 as i64;
    }
    for run in &runs {
        leb128(table.iter().position(|id| *id == run.2).unwrap_or(0) as u64, bytes);
    }
}

fn leb128(mut value: u64, bytes: &mut Vec<u8>) {
    loop {
        let low = (value % 128) as u8;
        value /= 128;
        if value == 0 {
            bytes.push(low);
            return;
        }
        bytes.push(low + 128);
    }
}

/// A data object and its frames.
///
/// # Panics
/// When zstd fails, which it does not.
#[must_use]
pub fn object(data: &[u8], codec: Codec, frame_bytes: usize) -> (Vec<u8>, Vec<Frame>) {
    if codec == Codec::Plain {
        return (data.to_vec(), Vec::new());
    }
    let (mut bytes, mut frames) = (Vec::new(), Vec::new());
    for (number, chunk) in data.chunks(frame_bytes).enumerate() {
        let encoded = match codec {
            Codec::Zstd => zstd_frame(chunk).expect("into memory"),
            _ => lz4::frame(chunk, 0x70),
        };
        frames.push((
            (number * frame_bytes) as u64,
            chunk.len() as u64,
            bytes.len() as u64,
            encoded.len() as u64,
        ));
        bytes.extend(encoded);
    }
    (bytes, frames)
}

/// A frame with a checksum of its content, as E2B writes them.
fn zstd_frame(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1)?;
    encoder.include_checksum(true)?;
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// A device over its generations: each page's place.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Where each page lies.
    pub places: Vec<Option<(Id, usize)>>,
    /// The bytes of the newest generation.
    pub bytes: Vec<u8>,
    /// What is known of the builds so far.
    pub builds: BTreeMap<Id, Build>,
}

/// How a generation is written.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Its header's version.
    pub version: u64,
    /// Its data's codec.
    pub codec: Codec,
    /// Bytes of a frame.
    pub frame_bytes: usize,
    /// Its number.
    pub generation: u64,
    /// The first build.
    pub base: Id,
}

impl Device {
    /// Writes the next generation of a device `name` into the folder of `build`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn next(
        &mut self,
        dir: &Path,
        name: &str,
        build: Id,
        bytes: &[u8],
        style: &Style,
    ) -> io::Result<()> {
        let mut data = Vec::new();
        self.places.resize(bytes.len().div_ceil(PAGE), None);
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            if self.bytes.chunks(PAGE).nth(number) == Some(page) {
                continue;
            }
            self.places[number] = if page.iter().all(|&byte| byte == 0) {
                None
            } else {
                data.extend(page);
                data.resize(data.len().next_multiple_of(PAGE), 0);
                Some((build, data.len() / PAGE - 1))
            };
        }
        self.bytes = bytes.to_vec();
        let (object, frames) = object(&data, style.codec, style.frame_bytes);
        if !data.is_empty() {
            fs::write(dir.join(format!("{name}{}", style.codec.suffix())), object)?;
            let size = data.len() as u64;
            self.builds.insert(build, Build { size, codec: style.codec, frames });
        }
        let head = Head {
            version: style.version,
            block: 4096,
            size: bytes.len() as u64,
            generation: style.generation,
            build,
            base: style.base,
        };
        let bytes = header(&head, &self.trimmed(), &self.mappings());
        fs::write(dir.join(format!("{name}.header")), bytes)
    }

    /// The runs of the device, zeros included.
    #[must_use]
    pub fn mappings(&self) -> Vec<Mapping> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for (page, place) in self.places.iter().enumerate() {
            let (build, storage) = place.unwrap_or_default();
            match mappings.last_mut() {
                Some(last)
                    if last.2 == build
                        && (build == [0; 16] || last.3 + last.1 == storage as u64) =>
                {
                    last.1 += 1;
                }
                _ => mappings.push((page as u64, 1, build, storage as u64)),
            }
        }
        mappings
    }

    /// The builds that the device refers to, each with the frames that it needs.
    #[must_use]
    pub fn trimmed(&self) -> BTreeMap<Id, Build> {
        let mut trimmed = BTreeMap::new();
        for (id, build) in &self.builds {
            let pages: Vec<u64> = self
                .places
                .iter()
                .flatten()
                .filter(|place| place.0 == *id)
                .map(|place| place.1 as u64 * 4096)
                .collect();
            if pages.is_empty() {
                continue;
            }
            let mut build = build.clone();
            build.frames.retain(|frame| {
                pages.iter().any(|&page| page < frame.0 + frame.1 && page + 4096 > frame.0)
            });
            trimmed.insert(*id, build);
        }
        trimmed
    }
}

/// Reads a device of version 3 or 5 out of the folder with builds.
///
/// # Errors
/// When a file cannot be read or decoded.
pub fn read(builds: &Path, build: Id, name: &str) -> io::Result<Vec<u8>> {
    let header = fs::read(builds.join(dashed(&build)).join(format!("{name}.header")))?;
    let number =
        |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
    let (version, size) = (number(&header[..8]), number(&header[16..24]) as usize);
    let mut mappings: Vec<(usize, usize, Id, usize)> = Vec::new();
    let mut codecs: BTreeMap<Id, u64> = BTreeMap::new();
    if version == 3 {
        for record in header[64..].chunks(40) {
            let id: Id = record[16..32].try_into().map_err(io::Error::other)?;
            let [start, len, storage] =
                [&record[..8], &record[8..16], &record[32..]].map(|part| number(part) as usize);
            mappings.push((start, len, id, storage));
        }
    } else {
        let mut block = Vec::new();
        lz4_decode(&header[69..], &mut block)?;
        if block.len() as u64 != number(&header[65..69]) {
            return Err(io::Error::other("the block has another length"));
        }
        let mut rest = &block[..];
        let mut take = |len: usize| {
            let (head, tail) = rest.split_at(len);
            rest = tail;
            head
        };
        for _ in 0..number(take(4)) {
            let id: Id = take(16).try_into().map_err(io::Error::other)?;
            take(40);
            codecs.insert(id, number(take(4)));
            let frames = number(take(4)) as usize;
            take(frames * 24);
        }
        let table: Vec<Id> = (0..number(take(4)))
            .map(|_| take(16).try_into().map_err(io::Error::other))
            .collect::<io::Result<_>>()?;
        let runs = number(take(4)) as usize;
        let mut uvarint = || {
            let (mut value, mut shift) = (0_u64, 0);
            loop {
                let byte = take(1)[0];
                value |= u64::from(byte % 128) << shift;
                shift += 7;
                if byte < 128 {
                    return value;
                }
            }
        };
        let mut at = 0;
        for _ in 0..runs {
            at += uvarint() as usize;
            mappings.push((at * PAGE, 0, [0; 16], 0));
        }
        mappings.iter_mut().for_each(|mapping| mapping.1 = uvarint() as usize * PAGE);
        let mut storage = 0_i64;
        for mapping in &mut mappings {
            let raw = uvarint();
            let half = (raw / 2) as i64;
            storage += if raw % 2 == 0 { half } else { -half - 1 };
            mapping.3 = storage as usize * PAGE;
        }
        mappings.iter_mut().for_each(|mapping| mapping.2 = table[uvarint() as usize]);
    }
    let mut data: BTreeMap<Id, Vec<u8>> = BTreeMap::new();
    let mut bytes = vec![0; size.next_multiple_of(PAGE)];
    for (start, len, id, storage) in mappings {
        if id == [0; 16] {
            continue;
        }
        if let Entry::Vacant(vacant) = data.entry(id) {
            let dir = builds.join(dashed(&id));
            let mut decoded = Vec::new();
            match codecs.get(&id).copied().unwrap_or(0) {
                0 => decoded = fs::read(dir.join(name))?,
                1 => {
                    let object = fs::read(dir.join(format!("{name}.zstd")))?;
                    zstd::Decoder::new(&object[..])?.read_to_end(&mut decoded)?;
                }
                _ => lz4_decode(&fs::read(dir.join(format!("{name}.lz4")))?, &mut decoded)?,
            }
            vacant.insert(decoded);
        }
        bytes[start..start + len].copy_from_slice(&data[&id][storage..storage + len]);
    }
    bytes.truncate(size);
    Ok(bytes)
}

fn lz4_decode(frames: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    lz4::split(frames).into_iter().try_for_each(|frame| lz4_program(frame, out))
}

/// Decodes a frame with the `lz4` program: a decoder that is not ours.
fn lz4_program(frame: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("lz4")
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::other(format!("the Debian package lz4 is missing: {error}")))?;
    let mut stdin = child.stdin.take().ok_or_else(|| io::Error::other("no pipe"))?;
    let input = frame.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    if let Some(stdout) = &mut child.stdout {
        stdout.read_to_end(out)?;
    }
    // When it refuses its input it reads no further: its word counts.
    let fed = feeder.join().map_err(|_| io::Error::other("the feeder ended early"))?;
    let status = child.wait()?;
    if status.success() { fed } else { Err(io::Error::other(format!("lz4 ended with {status}"))) }
}
