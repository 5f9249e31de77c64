//! Whether a table of regions can be served from an image, before a page of it is.

use std::error::Error as StdError;
use std::fmt;
use std::ops::Range;

use super::Region;
use crate::error::{Error, ErrorKind};

/// Page sizes that VMMs use for guests: 4 KiB, and 2 MiB of `hugetlbfs`.
const PAGE_BYTES: [u64; 2] = [4096, 2 << 20];

/// The end of addresses that a process can have: 56 bits with page tables of five levels.
const ADDRESS_END: u64 = 1 << 56;

/// How the regions of a table lie in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Each starts where the one before it ends, and the last ends with the image: Firecracker's
    /// memory files are so, and a table that is not belongs to another snapshot.
    Running,

    /// Anywhere inside the image, as long as no byte belongs to two.
    Scattered,
}

/// What a region must not break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RegionRule {
    /// There is one.
    Count,
    /// Pages of 4 KiB or 2 MiB.
    PageSize,
    /// Whole pages, one at least.
    Size,
    /// It starts at a page.
    AddressAlignment,
    /// Addresses that a process can have.
    AddressRange,
    /// No address in two regions.
    AddressOverlap,
    /// Its part of the image starts at a multiple of the page size.
    OffsetAlignment,
    /// Its part lies inside the image.
    InsideImage,
    /// No byte of the image in two regions.
    ImageOverlap,
    /// Its part starts where that of the region before it ends.
    Order,
    /// The last one ends with the image.
    Coverage,
}

/// A region that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRegion {
    /// Its place in the table, from 0.
    pub region: usize,

    /// What it breaks.
    pub rule: RegionRule,

    got: String,
    expected: String,
}

impl fmt::Display for BadRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadRegion { region, got, expected, .. } = self;
        write!(f, "region {region} of the VMM's memory: got {got}, expected {expected}")
    }
}

impl StdError for BadRegion {}

impl From<BadRegion> for Error {
    fn from(bad: BadRegion) -> Error {
        let context = "the VMM's memory does not fit the image; was it the right snapshot?";
        Error::with_source(ErrorKind::Protocol, context, bad)
    }
}

/// Checks that `regions` can be served from an image of `image_bytes`.
///
/// The first rule that is broken is told, with the first region that breaks it.
pub fn check(
    regions: &[Region],
    image_bytes: u64,
    layout: Layout,
) -> std::result::Result<(), BadRegion> {
    if regions.is_empty() {
        return Err(bad(0, RegionRule::Count, "no regions", "one at least"));
    }
    for (number, region) in regions.iter().enumerate() {
        check_alone(number, region, image_bytes)?;
    }
    no_overlap(regions, RegionRule::AddressOverlap, Region::addresses)?;
    match layout {
        Layout::Scattered => no_overlap(regions, RegionRule::ImageOverlap, Region::image),
        Layout::Running => check_running(regions, image_bytes),
    }
}

fn check_alone(
    number: usize,
    region: &Region,
    image_bytes: u64,
) -> std::result::Result<(), BadRegion> {
    let Region { address, size, offset, page_bytes } = *region;
    let bad = |rule, got: String, expected: String| Err(bad(number, rule, got, expected));
    let pages = format!("a multiple of {page_bytes}");
    if !PAGE_BYTES.contains(&page_bytes) {
        let got = format!("pages of {page_bytes} bytes");
        return bad(RegionRule::PageSize, got, "4096 or 2097152".to_owned());
    }
    if size == 0 || size % page_bytes != 0 {
        return bad(RegionRule::Size, format!("{size} bytes"), pages);
    }
    if address % page_bytes != 0 {
        return bad(RegionRule::AddressAlignment, format!("address {address:#x}"), pages);
    }
    if address == 0 || address.checked_add(size).is_none_or(|end| end > ADDRESS_END) {
        let got = format!("{size} bytes at {address:#x}");
        return bad(RegionRule::AddressRange, got, format!("addresses up to {ADDRESS_END:#x}"));
    }
    if offset % page_bytes != 0 {
        return bad(RegionRule::OffsetAlignment, format!("offset {offset}"), pages);
    }
    if offset.checked_add(size).is_none_or(|end| end > image_bytes) {
        let got = format!("{size} bytes at offset {offset}");
        return bad(RegionRule::InsideImage, got, format!("an end at {image_bytes} at most"));
    }
    Ok(())
}

fn no_overlap(
    regions: &[Region],
    rule: RegionRule,
    range_of: fn(&Region) -> Range<u64>,
) -> std::result::Result<(), BadRegion> {
    let mut ranges: Vec<_> = regions.iter().map(range_of).zip(0..).collect();
    ranges.sort_unstable_by_key(|(range, number)| (range.start, *number));
    for pair in ranges.windows(2) {
        let [(one, one_number), (two, number)] = pair else { continue };
        if two.start < one.end {
            let got = format!("a start at {:#x}", two.start);
            let expected = format!("{:#x}, the end of region {one_number}, or more", one.end);
            return Err(bad(*number, rule, got, expected));
        }
    }
    Ok(())
}

fn check_running(regions: &[Region], image_bytes: u64) -> std::result::Result<(), BadRegion> {
    let mut end = 0;
    for (number, region) in regions.iter().enumerate() {
        if region.offset != end {
            let got = format!("offset {}", region.offset);
            return Err(bad(number, RegionRule::Order, got, end.to_string()));
        }
        end = region.image().end;
    }
    if end != image_bytes {
        let got = format!("an end at {end}");
        let expected = format!("{image_bytes}, the end of the image");
        return Err(bad(regions.len() - 1, RegionRule::Coverage, got, expected));
    }
    Ok(())
}

fn bad(
    region: usize,
    rule: RegionRule,
    got: impl Into<String>,
    expected: impl Into<String>,
) -> BadRegion {
    BadRegion { region, rule, got: got.into(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BASE: u64 = 0x7f00_0000_0000;

    fn region(address: u64, size: u64, offset: u64) -> Region {
        Region { address, size, offset, page_bytes: 4096 }
    }

    #[test]
    fn tables_of_firecracker_pass() {
        let low = region(BASE, 3072 * MIB, 0);
        // The later region may lie below.
        let high = region(BASE - 4096 * MIB, 1024 * MIB, 3072 * MIB);
        check(&[low, high], 4096 * MIB, Layout::Running).unwrap();
        let touching = [region(BASE, MIB, 0), region(BASE + MIB, MIB, MIB)];
        check(&touching, 2 * MIB, Layout::Running).unwrap();
        let huge = Region { page_bytes: 2 * MIB, ..region(BASE, 64 * MIB, 0) };
        check(&[huge], 64 * MIB, Layout::Running).unwrap();
        let many: Vec<_> =
            (0..4096).map(|n| region(BASE + (4095 - n) * MIB, MIB, n * MIB)).collect();
        check(&many, 4096 * MIB, Layout::Running).unwrap();
    }

    #[test]
    fn scattered_regions_may_leave_out_some_and_come_in_any_order() {
        let regions = [region(BASE, MIB, 4 * MIB), region(BASE + 8 * MIB, MIB, 0)];
        check(&regions, 6 * MIB, Layout::Scattered).unwrap();
        let refused = check(&regions, 6 * MIB, Layout::Running).unwrap_err();
        assert_eq!((refused.region, refused.rule), (0, RegionRule::Order));
    }

    #[test]
    fn each_rule_is_told_with_the_region_that_breaks_it() {
        let sound = [region(BASE, MIB, 0), region(BASE + 4 * MIB, MIB, MIB)];
        let huge = 2 * MIB;
        let second = |region: Region| [sound[0], region];
        let cases = [
            (second(Region { page_bytes: 0, ..sound[1] }), RegionRule::PageSize),
            (second(Region { page_bytes: 4, ..sound[1] }), RegionRule::PageSize),
            (second(Region { page_bytes: 1 << 30, ..sound[1] }), RegionRule::PageSize),
            (second(Region { size: 0, ..sound[1] }), RegionRule::Size),
            (second(Region { size: MIB + 1, ..sound[1] }), RegionRule::Size),
            (second(Region { page_bytes: huge, ..sound[1] }), RegionRule::Size),
            (second(Region { address: BASE + 1, ..sound[1] }), RegionRule::AddressAlignment),
            (second(Region { address: 0, ..sound[1] }), RegionRule::AddressRange),
            (second(Region { address: u64::MAX - 4095, ..sound[1] }), RegionRule::AddressRange),
            (second(Region { address: 1 << 56, ..sound[1] }), RegionRule::AddressRange),
            (second(Region { offset: MIB + 512, ..sound[1] }), RegionRule::OffsetAlignment),
            (second(Region { offset: 2 * MIB, ..sound[1] }), RegionRule::InsideImage),
            (second(Region { offset: u64::MAX - 4095, ..sound[1] }), RegionRule::InsideImage),
            (second(Region { size: 1 << 40, ..sound[1] }), RegionRule::InsideImage),
            (second(Region { address: BASE + MIB - 4096, ..sound[1] }), RegionRule::AddressOverlap),
            (second(Region { address: BASE, ..sound[1] }), RegionRule::AddressOverlap),
            (second(Region { offset: MIB - 4096, ..sound[1] }), RegionRule::Order),
            (second(Region { offset: 0, ..sound[1] }), RegionRule::Order),
            (second(Region { size: MIB - 4096, ..sound[1] }), RegionRule::Coverage),
        ];
        check(&sound, 2 * MIB, Layout::Running).unwrap();
        for (regions, rule) in cases {
            let refused = check(&regions, 2 * MIB, Layout::Running).expect_err("a broken rule");
            assert_eq!((refused.region, refused.rule), (1, rule), "{refused}");
        }
        let overlapping = second(Region { offset: MIB - 4096, ..sound[1] });
        let refused = check(&overlapping, 2 * MIB, Layout::Scattered).unwrap_err();
        assert_eq!((refused.region, refused.rule), (1, RegionRule::ImageOverlap));
        let refused = check(&[], 0, Layout::Running).unwrap_err();
        assert_eq!(refused.rule, RegionRule::Count);
        // Another snapshot: its image is longer.
        let refused = check(&sound, 3 * MIB, Layout::Running).unwrap_err();
        assert_eq!(refused.rule, RegionRule::Coverage);
        let error = Error::from(refused);
        assert_eq!(error.kind(), ErrorKind::Protocol);
        let source = StdError::source(&error).unwrap().to_string();
        assert!(source.contains("2097152") && source.contains("3145728"), "{source}");
    }
}
