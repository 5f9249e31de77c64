//! Cloud Hypervisor's two files of JSON: ranges that pass tile their image, and a rewritten
//! configuration has the disks it was given and can be rewritten again.
#![no_main]

use dormouse_vmm::cloud_hypervisor::{config, state};
use dormouse_vmm::vmm::Drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(ranges) = state::memory_ranges(data) {
        let mut end = 0;
        for region in state::regions(&ranges) {
            assert_eq!(region.image_offset, end);
            end += region.length;
        }
    }
    if let Ok(slots) = state::slots(data) {
        slots
            .iter()
            .try_fold(0_u64, |sum, slot| sum.checked_add(slot.size))
            .expect("it was summed");
    }
    let Ok(disks) = config::disks(data) else { return };
    let Some((id, _)) = disks.first() else { return };
    let drives = [Drive { id: id.clone(), path: "/new".into() }];
    let rewritten = config::rewrite(data, &drives, &[], None).expect("the disk is there");
    config::check(&rewritten).expect("what was rewritten is whole");
    let again = config::disks(&rewritten).expect("what was rewritten is whole");
    assert_eq!(again[0], (id.clone(), Some("/new".to_owned())));
    assert_eq!(again.len(), disks.len());
});
