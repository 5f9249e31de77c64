//! Headers of wrenn and E2B read a second time, for a comparison: record by record as they stand in
//! the file, with nothing joined, looked up or shared with [`page_map`](crate::page_map). A mistake
//! there would otherwise be made twice and be found by nobody.
//!
//! A header was checked before it is read here, so what is wrong with it is said in few words.

use std::io::Read;

use lz4_flex::frame::FrameDecoder;
use uuid::Uuid;

use crate::error::{Error, Result};

/// A record of a header: so many pages from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlainRecord {
    pub(super) page: u64,
    pub(super) pages: u64,
    /// The build and the page in its data; none is zeros.
    pub(super) stored: Option<(Uuid, u64)>,
}

/// The length of a device and its records, in the header's order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlainHeader {
    pub(super) size_bytes: u64,
    pub(super) records: Vec<PlainRecord>,
}

const PAGE: u64 = 4096;

pub(super) fn read(bytes: &[u8]) -> Result<PlainHeader> {
    let mut head = Bytes(bytes);
    let version = head.number()? & 0xffff;
    head.skip(8)?;
    let size_bytes = head.number()?;
    head.skip(8)?;
    let own = head.id()?;
    head.skip(16)?;
    let pages = size_bytes.div_ceil(PAGE);
    let whole = PlainRecord { page: 0, pages, stored: Some((own, 0)) };
    let mut records = Vec::new();
    if version < 4 {
        while !head.0.is_empty() {
            records.push(head.record()?);
        }
    } else {
        head.skip(1)?;
        let len = u64::from(head.short()?);
        let mut block = Vec::new();
        FrameDecoder::new(head.0)
            .take(len)
            .read_to_end(&mut block)
            .map_err(|error| Error::io("cannot decode the header again", error))?;
        let mut block = Bytes(&block);
        for _ in 0..block.short()? {
            block.skip(16 + 8 + 32 + 4)?;
            let frames = u64::from(block.short()?);
            block.skip(frames.saturating_mul(24))?;
        }
        if version == 4 {
            for _ in 0..block.short()? {
                records.push(block.record()?);
            }
        } else {
            return Ok(PlainHeader { size_bytes, records: columns(&mut block, pages)? });
        }
    }
    // A device without pages has no record either.
    if records.is_empty() && pages > 0 {
        records.push(whole);
    }
    Ok(PlainHeader { size_bytes, records })
}

/// The four columns of version 5, and zeros where no run is.
fn columns(block: &mut Bytes<'_>, pages: u64) -> Result<Vec<PlainRecord>> {
    let mut ids = Vec::new();
    for _ in 0..block.short()? {
        ids.push(block.id()?);
    }
    let count = block.short()?;
    let mut column = || (0..count).map(|_| block.variable()).collect::<Result<Vec<u64>>>();
    let (starts, lengths, places, numbers) = (column()?, column()?, column()?, column()?);
    let mut records = Vec::new();
    let (mut page, mut place, mut end) = (0_u64, 0_i64, 0_u64);
    for (((start, length), delta), number) in starts.iter().zip(lengths).zip(places).zip(numbers) {
        page = page.wrapping_add(*start);
        // Zigzag: even numbers go up, odd ones down.
        let half = (delta >> 1) as i64;
        place = place.wrapping_add(if delta % 2 == 0 { half } else { -half - 1 });
        if page > end {
            records.push(PlainRecord { page: end, pages: page - end, stored: None });
        }
        let id = usize::try_from(number).ok().and_then(|number| ids.get(number)).ok_or_else(cut)?;
        let stored = Some((*id, u64::try_from(place).map_err(|_| cut())?));
        records.push(PlainRecord { page, pages: length, stored });
        end = page.wrapping_add(length);
    }
    if pages > end {
        records.push(PlainRecord { page: end, pages: pages - end, stored: None });
    }
    Ok(records)
}

fn cut() -> Error {
    Error::corrupt("the header cannot be read again: did it change?")
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn skip(&mut self, count: u64) -> Result<()> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.0 = self.0.get(count..).ok_or_else(cut)?;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(cut)?;
        self.0 = rest;
        Ok(*head)
    }

    fn number(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn short(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn id(&mut self) -> Result<Uuid> {
        Ok(Uuid::from_bytes(self.array()?))
    }

    fn variable(&mut self) -> Result<u64> {
        let mut value = 0_u64;
        for place in 0..10 {
            let [byte] = self.array()?;
            value |= u64::from(byte % 128) << (7 * place);
            if byte < 128 {
                return Ok(value);
            }
        }
        Err(cut())
    }

    fn record(&mut self) -> Result<PlainRecord> {
        let (offset, length) = (self.number()?, self.number()?);
        let (id, storage) = (self.id()?, self.number()?);
        let stored = (!id.is_nil()).then_some((id, storage / PAGE));
        Ok(PlainRecord { page: offset / PAGE, pages: length / PAGE, stored })
    }
}
