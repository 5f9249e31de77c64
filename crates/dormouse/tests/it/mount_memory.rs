//! Memory that a VMM maps privately out of a mount: what the guest changed is found in its page
//! tables and committed.

use std::fs;

use dormouse_testkit::vmm::{Backing, Config, SmallVmm};

use crate::fixture::code;
use crate::memory_fixture::{PAGES, SEED, with_snapshot};
use crate::mounted::Mounted;

#[test]
fn what_a_guest_changed_is_committed_out_of_its_page_tables() {
    let home = with_snapshot();
    let mounted = Mounted::start(&home);
    let backing = Backing::PrivateFile(mounted.path("vm/1/memory"));
    let config = Config::small(SEED, PAGES, backing);
    // Once more, with the borders of the VMM's regions.
    let mut at = 0;
    let rows: Vec<_> = config
        .regions
        .iter()
        .map(|region| {
            let length = region.pages * 4096;
            at += length;
            serde_json::json!({ "image_offset": at - length, "length": length })
        })
        .collect();
    home.file("layout", serde_json::to_string(&rows).unwrap().as_bytes());
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state", "--memory-layout", "layout"]);
    home.ok(&["rm", "vm@1"]);
    let config = Config { backing: Backing::PrivateFile(mounted.path("vm/2/memory")), ..config };
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    let pid = vmm.pid().to_string();
    for number in 3..6 {
        vmm.run(3_000).unwrap();
        vmm.pause().unwrap();
        // Always over the snapshot that it maps, whatever was committed since.
        let committed = home.json(&[
            "commit",
            "vm",
            "--parent",
            "vm@2",
            "--memory-of",
            &pid,
            "--state",
            "state",
        ]);
        vmm.write_expected(&home.path("expected")).unwrap();
        vmm.resume().unwrap();
        assert_eq!(committed["snapshot"], format!("vm@{number}"));
        home.ok(&["export", &format!("vm@{number}:memory"), "got", "--force"]);
        assert!(
            fs::read(home.path("got")).unwrap() == fs::read(home.path("expected")).unwrap(),
            "vm@{number}"
        );
    }
    assert!(fs::read(mounted.path("vm/2/memory")).unwrap() == fs::read(home.path("mem")).unwrap());
    let other = home.fails(
        code::NOT_FOUND,
        &["commit", "vm", "--parent", "vm@3", "--memory-of", &pid, "--state", "state"],
    );
    assert!(other.contains("does not map vm/3/memory"), "{other}");
    home.fails(code::USAGE, &["commit", "vm", "--memory-of", &pid]);
    vmm.quit().unwrap();
    mounted.terminate();
}

#[test]
fn a_snapshot_of_another_store_is_not_taken_for_ours() {
    let (ours, theirs) = (with_snapshot(), with_snapshot());
    let mounted = Mounted::start(&theirs);
    let backing = Backing::PrivateFile(mounted.path("vm/1/memory"));
    let vmm = SmallVmm::spawn(&Config::small(SEED, PAGES, backing)).unwrap();
    let pid = vmm.pid().to_string();
    let refused =
        ours.fails(code::REFUSED, &["commit", "vm", "--parent", "vm@1", "--memory-of", &pid]);
    assert!(refused.contains("another snapshot"), "{refused}");
    vmm.quit().unwrap();
    mounted.terminate();
}
