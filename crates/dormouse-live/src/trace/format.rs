//! A trace as bytes. `docs/format.md` draws them.

use std::ops::Range;

use dormouse_image::digest::checksum;

use super::{
    BLOCKS_END, TRACE_BLOCKS_MAX, TRACE_BYTES_MAX, Trace, WAKE_BLOCKS_MAX, WAKES_MAX, Wake,
    WakeKind,
};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 8] = *b"\x89DMtrac\n";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 32;

const KIND_WHOLE: u64 = 1;
const KIND_MISSES: u64 = 2;

impl Trace {
    /// The trace as bytes, at most [`TRACE_BYTES_MAX`].
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u16::try_from(self.wakes.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.subject);
        for wake in &self.wakes {
            put(
                &mut bytes,
                match wake.kind {
                    WakeKind::Whole => KIND_WHOLE,
                    WakeKind::Misses => KIND_MISSES,
                },
            );
            put(&mut bytes, wake.runs.len() as u64);
            let mut end = 0;
            for run in &wake.runs {
                put(&mut bytes, zigzag(run.start, end));
                put(&mut bytes, run.end - run.start - 1);
                end = run.end;
            }
        }
        bytes.extend(checksum(&[&bytes]).to_le_bytes());
        debug_assert!(bytes.len() <= TRACE_BYTES_MAX, "bounded by the blocks of its wakes");
        bytes
    }

    /// Parses the trace of `subject`.
    pub fn parse(bytes: &[u8], subject: [u8; 16]) -> Result<Trace> {
        if !bytes.starts_with(&MAGIC) {
            return Err(corrupt("another magic", "a trace"));
        }
        if bytes.len() < HEADER_BYTES + 8 || bytes.len() > TRACE_BYTES_MAX {
            return Err(corrupt(bytes.len(), format!("40 to {TRACE_BYTES_MAX} bytes")));
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let version = u16_at(8);
        if version != VERSION {
            let message = format!("a trace of version {version}; this build reads {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (body, sum) = bytes.split_at(bytes.len() - 8);
        let expected = checksum(&[body]);
        if sum != expected.to_le_bytes() {
            return Err(corrupt("another checksum", format!("{expected:016x}")));
        }
        if body[12..16] != [0; 4] {
            return Err(corrupt("reserved fields in use", "zeros"));
        }
        if body[16..32] != subject {
            return Err(corrupt("the trace of another snapshot", "that of this one"));
        }
        let wakes = usize::from(u16_at(10));
        if wakes > WAKES_MAX {
            return Err(corrupt(format!("{wakes} wakes"), format!("{WAKES_MAX} at most")));
        }
        let mut reader = Reader { rest: &body[HEADER_BYTES..] };
        let mut trace = Trace { subject, wakes: Vec::with_capacity(wakes) };
        for _ in 0..wakes {
            trace.wakes.push(reader.wake()?);
        }
        if !reader.rest.is_empty() {
            return Err(corrupt(format!("{} bytes more", reader.rest.len()), "the end"));
        }
        if trace.blocks() > TRACE_BLOCKS_MAX {
            return Err(corrupt(trace.blocks(), format!("{TRACE_BLOCKS_MAX} blocks at most")));
        }
        Ok(trace)
    }
}

fn corrupt(got: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::corrupt("trace", got, expected)
}

/// Appends a number, seven bits a byte, lowest first.
fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// How far `start` lies from `end`: twice that, less one if it lies before.
fn zigzag(start: u64, end: u64) -> u64 {
    match start.checked_sub(end) {
        Some(ahead) => ahead * 2,
        None => (end - start) * 2 - 1,
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn wake(&mut self) -> Result<Wake> {
        let kind = match self.take()? {
            KIND_WHOLE => WakeKind::Whole,
            KIND_MISSES => WakeKind::Misses,
            other => return Err(corrupt(format!("a wake of kind {other}"), "1 or 2")),
        };
        let count = self.take()?;
        // A run takes two bytes at least, so the file bounds what is allocated.
        if count == 0 || count > (self.rest.len() / 2) as u64 {
            return Err(corrupt(format!("{count} runs"), "1, or as many as there are bytes for"));
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        let (mut end, mut blocks) = (0_u64, 0_u64);
        for _ in 0..count {
            let distance = self.take()?;
            let start = match distance % 2 {
                0 => end.checked_add(distance / 2),
                _ => end.checked_sub(distance / 2 + 1),
            };
            let run = start.zip(self.take()?.checked_add(1)).and_then(|(start, length)| {
                let run = start..start.checked_add(length)?;
                (run.end <= BLOCKS_END && (runs.is_empty() || distance != 0)).then_some(run)
            });
            let run = run.ok_or_else(|| corrupt("a run of no image", "blocks below 2^32"))?;
            blocks += run.end - run.start;
            if blocks > WAKE_BLOCKS_MAX {
                return Err(corrupt("a longer wake", format!("{WAKE_BLOCKS_MAX} blocks at most")));
            }
            end = run.end;
            runs.push(run);
        }
        Ok(Wake { kind, runs })
    }

    /// A number in its shortest form.
    fn take(&mut self) -> Result<u64> {
        let mut value = 0;
        for (index, &byte) in self.rest.iter().enumerate().take(9) {
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    return Err(corrupt("a padded number", "its shortest form"));
                }
                self.rest = &self.rest[index + 1..];
                return Ok(value);
            }
        }
        Err(corrupt("no whole number", "one of at most nine bytes"))
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs, here of one")]
mod tests {
    use super::*;

    const SUBJECT: [u8; 16] = *b"snapshot's uuid.";

    fn sample() -> Trace {
        let mut trace = Trace::new(SUBJECT);
        trace.push(Wake::new(WakeKind::Whole, [700..702, 12..14, 4_294_967_295..4_294_967_296]));
        trace.push(Wake::new(WakeKind::Misses, [14..15, 5..9]));
        trace
    }

    fn sign(body: &[u8]) -> Vec<u8> {
        [body, &checksum(&[body]).to_le_bytes()].concat()
    }

    /// Holds `docs/format.md`; `DORMOUSE_BLESS=1` writes the file anew.
    #[test]
    fn the_golden_file_is_read_and_written() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/two.trace");
        if std::env::var_os("DORMOUSE_BLESS").is_some() {
            std::fs::write(path, sample().encode()).unwrap();
        }
        let golden = std::fs::read(path).unwrap();
        assert_eq!(sample().encode(), golden);
        assert_eq!(Trace::parse(&golden, SUBJECT).unwrap(), sample());
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/format.md");
        let page = std::fs::read_to_string(page).unwrap();
        let (_, example) = page.split_once("two.trace` is the trace").unwrap();
        // Up to the next chapter of the page.
        let example = example.split("\n## ").next().unwrap();
        let dump = example.lines().filter_map(|line| line.strip_prefix("    ")?.get(4..));
        let shown: Vec<u8> = dump
            .flat_map(str::split_whitespace)
            .map(|hex| u8::from_str_radix(hex, 16).unwrap())
            .collect();
        assert_eq!(shown, golden, "docs/format.md shows another file");
    }

    #[test]
    fn every_flip_and_cut_is_noticed() {
        let bytes = sample().encode();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Trace::parse(&bad, SUBJECT).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Trace::parse(&bytes[..len], SUBJECT).is_err(), "{len} bytes");
        }
        assert!(Trace::parse(&bytes, [0; 16]).is_err(), "of another snapshot");
    }

    /// Checksums do not stop who makes them up.
    #[test]
    fn signed_nonsense_is_refused() {
        let sound = sample().encode();
        let header = |wakes: u8| [&sound[..10], &[wakes, 0, 0, 0, 0, 0], &SUBJECT].concat();
        let longest = u64::from(u32::MAX);
        let mut too_long = Vec::new();
        put(&mut too_long, WAKE_BLOCKS_MAX);
        let mut beyond = Vec::new();
        put(&mut beyond, longest * 2);
        let cases: &[(&str, u8, &[u8])] = &[
            ("nine wakes", 9, &[1, 1, 0, 0].repeat(9)),
            ("a wake missing", 2, &[1, 1, 0, 0]),
            ("bytes behind", 1, &[1, 1, 0, 0, 0]),
            ("another kind", 1, &[3, 1, 0, 0]),
            ("no runs", 1, &[1, 0]),
            ("more runs than bytes", 1, &[1, 100, 0, 0]),
            ("a padded number", 1, &[1, 1, 0x80, 0, 0]),
            ("an endless number", 1, &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            ("before the first block", 1, &[1, 1, 1, 0]),
            ("two runs that are one", 1, &[1, 2, 0, 0, 0, 0]),
            ("a run too long", 1, &[&[1, 1, 0][..], &too_long].concat()),
            ("past the last block", 1, &[&[1, 1][..], &beyond, &[1]].concat()),
        ];
        for (what, wakes, payload) in cases {
            let bytes = sign(&[&header(*wakes)[..], payload].concat());
            let error = Trace::parse(&bytes, SUBJECT).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        }
        let sound = sign(&[&header(1)[..], &[1, 1], &beyond, &[0]].concat());
        assert_eq!(Trace::parse(&sound, SUBJECT).unwrap().order(), [longest..longest + 1]);
        let mut later = sample().encode();
        later[8] = 2;
        assert_eq!(Trace::parse(&later, SUBJECT).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn the_longest_trace_is_within_its_bound() {
        let mut trace = Trace::new(SUBJECT);
        for _ in 0..4 {
            let far = |n: u64| (n.wrapping_mul(0x9e37_79b9) & 0xffff_fffe)..;
            let runs = (0..WAKE_BLOCKS_MAX).map(|n| far(n).start..far(n).start + 1);
            trace.push(Wake::new(WakeKind::Whole, runs));
        }
        let bytes = trace.encode();
        assert!(bytes.len() <= TRACE_BYTES_MAX, "{} bytes", bytes.len());
        assert_eq!(Trace::parse(&bytes, SUBJECT).unwrap(), trace);
    }
}
