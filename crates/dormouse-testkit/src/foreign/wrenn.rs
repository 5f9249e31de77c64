//! wrenn's folders: a header of 64 bytes and records of 40, and the data of each generation.

use std::fs;
use std::io;
use std::path::Path;

use super::random::PAGE;

/// One generation of a guest's memory, with the bytes it had then.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its build.
    pub build: [u8; 16],
    /// All of its memory.
    pub memory: Vec<u8>,
}

/// Which page of which build each page is; none is zero.
type Places = Vec<Option<([u8; 16], usize)>>;

/// Writes the folder of the newest of some generations, the first of which is a full dump.
///
/// # Errors
/// When a file cannot be written.
pub fn write(dir: &Path, generations: &[Generation]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut places: Places = Vec::new();
    let mut before: Option<&Generation> = None;
    for generation in generations {
        let mut data = Vec::new();
        let pages = generation.memory.chunks(PAGE);
        places.resize(pages.len(), None);
        for (number, page) in pages.enumerate() {
            let old = before.and_then(|before| before.memory.chunks(PAGE).nth(number));
            if old == Some(page) {
                continue;
            }
            places[number] = if page.iter().all(|&byte| byte == 0) {
                None
            } else {
                data.extend(page);
                data.resize(data.len().next_multiple_of(PAGE), 0);
                Some((generation.build, data.len() / PAGE - 1))
            };
        }
        let name = if generations.len() == 1 {
            "memfile".to_owned()
        } else {
            format!("memfile.{}", dashed(&generation.build))
        };
        fs::write(dir.join(name), data)?;
        before = Some(generation);
    }
    if let (Some(first), Some(last)) = (generations.first(), generations.last()) {
        let head = Head {
            version: 1,
            size: last.memory.len() as u64,
            generation: generations.len() as u64 - 1,
            build: last.build,
            base: first.build,
        };
        fs::write(dir.join("memfile.header"), header(&head, &places))?;
    }
    fs::write(dir.join("snapfile"), b"the VMM's state")
}

/// The first 64 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Always 1.
    pub version: u64,
    /// Bytes of memory.
    pub size: u64,
    /// Counts up from 0.
    pub generation: u64,
    /// Its own build.
    pub build: [u8; 16],
    /// The first build.
    pub base: [u8; 16],
}

/// A header of runs.
#[must_use]
pub fn header(head: &Head, places: &[Option<([u8; 16], usize)>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [head.version, 4096, head.size, head.generation] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(head.build);
    bytes.extend(head.base);
    let mut at = 0;
    while at < places.len() {
        let mut len = 1;
        while at + len < places.len() && follows(places[at], places[at + len], len) {
            len += 1;
        }
        let (build, storage) = places[at].unwrap_or_default();
        bytes.extend(((at * PAGE) as u64).to_le_bytes());
        bytes.extend(((len * PAGE) as u64).to_le_bytes());
        bytes.extend(build);
        bytes.extend(((storage * PAGE) as u64).to_le_bytes());
        at += len;
    }
    bytes
}

fn follows(
    first: Option<([u8; 16], usize)>,
    next: Option<([u8; 16], usize)>,
    distance: usize,
) -> bool {
    match (first, next) {
        (None, None) => true,
        (Some((a, at)), Some((b, next))) => a == b && next == at + distance,
        _ => false,
    }
}

/// The text of an id.
#[must_use]
pub fn dashed(id: &[u8; 16]) -> String {
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}
