//! Tables of a VMM's memory: what is read in pieces is what is read at once, and what passes the
//! check tiles the image.
#![no_main]

use dormouse_serve::uffd::handshake::{Layout, Region, check, firecracker};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (Some(cut), Some(bytes)) = (data.first(), data.get(1..)) else { return };
    let cut = bytes.len() * usize::from(*cut) / 256;
    let at_cut = firecracker::parse(&bytes[..cut]);
    let Ok(Some(table)) = firecracker::parse(bytes) else { return };
    if let Some(sooner) = at_cut.expect("what starts a table is no error") {
        assert_eq!(sooner, table, "only spaces can follow");
    }
    let sum = table.regions.iter().try_fold(0_u64, |sum, region| sum.checked_add(region.size));
    let Some(sum) = sum else {
        let refused = check(&table.regions, u64::MAX, Layout::Scattered);
        assert!(refused.is_err(), "more memory than there are addresses");
        return;
    };
    if check(&table.regions, sum, Layout::Running).is_ok() {
        check(&table.regions, sum, Layout::Scattered).expect("the stricter one passed");
        let mut image: Vec<_> = table.regions.iter().map(Region::image).collect();
        image.sort_by_key(|range| range.start);
        assert!(image.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!((image[0].start, image[image.len() - 1].end), (0, sum));
        let mut addresses: Vec<_> = table.regions.iter().map(Region::addresses).collect();
        addresses.sort_by_key(|range| range.start);
        assert!(addresses.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(table.regions.iter().all(|region| region.size % region.page_bytes == 0));
    }
});
