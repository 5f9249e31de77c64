//! Traces from outside: what was put beside a snapshot is drawn, and what is damaged is not.

use std::fs;

use dormouse_live::trace::{Trace, Wake, WakeKind};
use dormouse_store::store::{Config, Snapshot, Store};
use serde_json::json;

use crate::fixture::{Home, code, noise};

/// A store with `vm@1`, whose memory has 64 blocks.
fn home() -> (Home, Snapshot) {
    let home = Home::with_store();
    home.file("memory", &noise(1, 64));
    home.file("state", b"state");
    home.ok(&["commit", "vm", "--memory", "memory", "--state", "state"]);
    let store = Store::open(&home.store(), Config::STANDARD).unwrap();
    let snapshot = store.snapshot(&"vm@1".parse().unwrap()).unwrap();
    (home, snapshot)
}

fn trace(snapshot: &Snapshot) -> Trace {
    let mut trace = Trace::new(*snapshot.manifest().uuid.as_bytes());
    trace.push(Wake::new(WakeKind::Whole, [40..44, 0..2, 5000..5001]));
    trace.push(Wake::new(WakeKind::Misses, [63..65, 65..70]));
    trace
}

#[test]
fn a_trace_is_shown_as_far_as_the_memory_goes() {
    let (home, snapshot) = home();
    let told = home.fails(code::NOT_FOUND, &["trace", "show", "vm"]);
    assert!(told.contains("vm@1 has no trace"), "{told}");
    snapshot.put_trace(&trace(&snapshot).encode()).unwrap();

    let shown = home.json(&["trace", "show", "vm"]);
    let expected = json!({
        "version": 1,
        "snapshot": "vm@1",
        "size_bytes": 64 * 4096,
        "touched_bytes": 7 * 4096,
        "wakes": [
            {"kind": "misses", "touched_bytes": 4096},
            {"kind": "whole", "touched_bytes": 6 * 4096},
        ],
        "runs": [
            {"offset": 40 * 4096, "length": 4 * 4096},
            {"offset": 0, "length": 2 * 4096},
            {"offset": 63 * 4096, "length": 4096},
        ],
    });
    assert_eq!(shown, expected);

    let text = home.ok(&["trace", "show", "vm@1"]);
    assert!(text.starts_with("vm@1  28.0 KiB of 256.0 KiB touched (10.9 %), in 3 runs"), "{text}");
    assert_eq!(text.lines().count(), 2 + 24 + 1, "{text}");

    home.ok(&["trace", "show", "vm", "--svg", "trace.svg"]);
    let picture = fs::read_to_string(home.path("trace.svg")).unwrap();
    assert_eq!(picture.matches("1 blocks</title>").count(), 7);
    assert_eq!(home.json(&["trace", "show", "vm", "--svg", "again.svg"])["svg"], "again.svg");
}

/// A trace is advice: damage to it is told and costs nothing else.
#[test]
fn a_damaged_trace_is_a_warning_and_no_trace() {
    let (home, snapshot) = home();
    let sound = trace(&snapshot).encode();
    let mut flipped = sound.clone();
    flipped[40] ^= 1;
    let mut later = sound.clone();
    later[8] = 2;
    let other = Trace::new([9; 16]).encode();
    let cases = [
        (&flipped[..], "checksum"),
        (&sound[..20], "expected 40"),
        (&later, "version 2"),
        (&other, "another snapshot"),
    ];
    for (bytes, expected) in cases {
        snapshot.put_trace(bytes).unwrap();
        let told = home.fails(code::NOT_FOUND, &["trace", "show", "vm"]);
        assert!(told.contains("WARN") && told.contains(expected), "{told}");
        assert!(told.contains("vm@1 has no trace"), "{told}");
    }
    home.ok(&["verify", "--deep"]);
}

#[test]
fn without_memory_there_is_nothing_to_trace() {
    let (home, _) = home();
    home.file("disk", &noise(2, 4));
    home.ok(&["commit", "disk", "--disk", "disk"]);
    let told = home.fails(code::NOT_FOUND, &["trace", "show", "disk"]);
    assert!(told.contains("has no image memory"), "{told}");
}
