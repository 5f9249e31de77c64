//! Firecracker's vmstate, and the memory manager's state of Cloud Hypervisor.
#![no_main]

use dormouse_formats::cloud_hypervisor::MemoryState;
use dormouse_formats::firecracker::vmstate::VmState;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = VmState::parse(data);
    check(data);
    // The input as the text within the text.
    if let Ok(text) = std::str::from_utf8(data) {
        let quoted = format!("{text:?}").replace("\\u{", "\\u0000{").replace("\\'", "'");
        let whole = format!(
            r#"{{"snapshots":{{"memory-manager":{{"snapshot_data":{{"state":{quoted}}}}}}}}}"#
        );
        check(whole.as_bytes());
    }
});

fn check(data: &[u8]) {
    let Ok(state) = MemoryState::parse(data) else { return };
    let mut ranges = state.ranges.clone();
    ranges.sort_by_key(|range| range.gpa);
    assert!(ranges.windows(2).all(|pair| pair[0].gpa + pair[0].length <= pair[1].gpa));
    assert!(state.ranges.iter().all(|range| range.length > 0));
}
