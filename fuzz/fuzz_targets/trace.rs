//! A trace: as it comes, and with its checksum made to match.
#![no_main]

use std::collections::HashSet;

use dormouse_image::digest::checksum;
use dormouse_live::trace::{Trace, WAKE_BLOCKS_MAX};
use libfuzzer_sys::fuzz_target;

/// Longer ones take long to compare and show nothing new.
const COMPARED_BLOCKS_MAX: u64 = 1 << 12;

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(body) = data.len().checked_sub(8) {
        let sum = checksum(&[&data[..body]]);
        read(&[&data[..body], &sum.to_le_bytes()].concat());
    }
});

fn read(data: &[u8]) {
    let subject = data.get(16..).and_then(|rest| rest.first_chunk::<16>());
    let Ok(trace) = Trace::parse(data, subject.copied().unwrap_or_default()) else { return };
    assert_eq!(trace.encode(), data, "there is one way to write a trace");
    assert!(trace.wakes().iter().all(|wake| wake.blocks() <= WAKE_BLOCKS_MAX));
    if trace.wakes().iter().map(|wake| wake.blocks()).sum::<u64>() > COMPARED_BLOCKS_MAX {
        return;
    }
    let touched: HashSet<u64> =
        trace.wakes().iter().flat_map(|wake| wake.runs().iter().cloned().flatten()).collect();
    let order: Vec<u64> = trace.order().into_iter().flatten().collect();
    assert_eq!(order.len(), touched.len(), "each block once");
    assert!(order.iter().all(|block| touched.contains(block)));
    let runs = trace.runs(16);
    assert!(runs.iter().all(|run| run.start / 16 == (run.end - 1) / 16));
    let mut in_windows: Vec<u64> = runs.into_iter().flatten().collect();
    in_windows.sort_unstable();
    in_windows.dedup();
    assert_eq!(in_windows.len(), touched.len());
    assert!(trace.within(1000).order().iter().all(|run| run.end <= 1000));
}
