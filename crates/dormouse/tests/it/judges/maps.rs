//! nbdinfo and `qemu-img map`: what they are told about exports and runs.

use std::ops::Range;

use serde_json::Value;

use super::{BASE_BYTES, DISK_BYTES, MIB, Trial};

/// Rows of `nbdinfo --map`, which must be one behind the other, with neighbours that differ.
fn map(trial: &Trial, export: &str, context: &str) -> Vec<(Range<usize>, u64)> {
    let option = format!("--map={context}");
    let text = trial.run("nbdinfo", &["--json", &option, &trial.uri_of(export)]);
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let number = |row: &Value, key: &str| usize::try_from(row[key].as_u64().unwrap()).unwrap();
    let mut at = 0;
    let mut map: Vec<(Range<usize>, u64)> = Vec::new();
    for row in &rows {
        assert_eq!(number(row, "offset"), at, "{text}");
        at += number(row, "length");
        let kind = row["type"].as_u64().unwrap();
        assert!(map.last().is_none_or(|(_, last)| *last != kind), "two runs that are one: {text}");
        map.push((number(row, "offset")..at, kind));
    }
    map
}

fn describe(trial: &Trial, export: &str) -> Value {
    let text = trial.run("nbdinfo", &["--json", "--list", &trial.uri_of(export)]);
    let about: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(about["protocol"], "newstyle-fixed");
    assert_eq!(about["structured"], true);
    let exports = about["exports"].as_array().unwrap();
    let names: Vec<_> = exports.iter().map(|it| it["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["box", "vm@1:root"]);
    exports.iter().find(|it| it["export-name"] == export).unwrap().clone()
}

#[test]
fn nbdinfo_lists_a_live_disk_and_a_snapshot() {
    let trial = Trial::over_an_image();
    let disk = describe(&trial, "box");
    assert_eq!(disk["export-size"], DISK_BYTES);
    assert_eq!(disk["is_read_only"], false);
    for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(disk[format!("can_{can}")], true, "{can}");
    }
    let image = describe(&trial, "vm@1:root");
    assert_eq!(image["export-size"], BASE_BYTES);
    assert_eq!(image["is_read_only"], true);
    for can in ["trim", "zero"] {
        assert_eq!(image[format!("can_{can}")], false, "{can}");
    }
    for (export, has_dirty) in [(&disk, true), (&image, false)] {
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 * MIB);
        let contexts = export["contexts"].as_array().unwrap();
        assert!(contexts.contains(&"base:allocation".into()), "{contexts:?}");
        assert_eq!(contexts.contains(&"dormouse:dirty".into()), has_dirty, "{contexts:?}");
    }
    for (question, export, answer) in [
        (["--is", "read-only"], "vm@1:root", true),
        (["--is", "read-only"], "box", false),
        (["--can", "multi-conn"], "box", true),
    ] {
        let [how, what] = question;
        let uri = trial.uri_of(export);
        let command = format!("nbdinfo {how} {what} '{uri}'; echo $?");
        let code = trial.run("sh", &["-c", &command]);
        assert_eq!(code.trim(), if answer { "0" } else { "2" }, "{question:?} of {export}");
    }
    assert_eq!(trial.run("nbdinfo", &["--size", &trial.uri()]).trim(), DISK_BYTES.to_string());
}

#[test]
fn maps_are_exact_and_move_with_a_commit() {
    let mut trial = Trial::over_an_image();
    let blocks = |range: Range<usize>| range.start * 4096..range.end * 4096;
    let allocation = |rows: &[(Range<usize>, u64)]| rows.to_vec();
    let hole = 8 * MIB..16 * MIB;
    let tail = BASE_BYTES..DISK_BYTES;
    let before = allocation(&[
        (0..4096, 0),
        (4096..8192, 3),
        (8192..MIB, 0),
        (MIB..MIB + 65536, 3),
        (MIB + 65536..hole.start, 0),
        (hole.clone(), 3),
        (hole.end..BASE_BYTES, 0),
    ]);
    assert_eq!(map(&trial, "vm@1:root", "base:allocation"), before);
    let whole = [&before[..], &[(tail.clone(), 3)]].concat();
    assert_eq!(map(&trial, "box", "base:allocation"), whole);
    assert_eq!(map(&trial, "box", "dormouse:dirty"), [(0..DISK_BYTES, 0)]);

    // Data into the hole, zeros into data, a part of a block, zeros over zeros, and the last bytes.
    let script = [
        "write -P 7 9M 64k".to_owned(),
        "discard 2M 1M".to_owned(),
        "write -P 8 5000 100".to_owned(),
        "write -z -u 12M 4k".to_owned(),
        "write -z 13M 8k".to_owned(),
        format!("write -P 9 {} 512", DISK_BYTES - 512),
    ];
    trial.qemu_io_both(&script);
    let last = (DISK_BYTES / 4096) * 4096..DISK_BYTES;
    let dirty = [
        (blocks(0..1), 0),
        (blocks(1..2), 1),
        (blocks(2..512), 0),
        (2 * MIB..3 * MIB, 2),
        (3 * MIB..9 * MIB, 0),
        (9 * MIB..9 * MIB + 65536, 1),
        (9 * MIB + 65536..12 * MIB, 0),
        (12 * MIB..12 * MIB + 4096, 2),
        (12 * MIB + 4096..13 * MIB, 0),
        // Without leave to punch, zeros stay allocated.
        (13 * MIB..13 * MIB + 8192, 1),
        (13 * MIB + 8192..last.start, 0),
        (last.clone(), 1),
    ];
    assert_eq!(map(&trial, "box", "dormouse:dirty"), dirty);
    let after = allocation(&[
        (0..MIB, 0),
        (MIB..MIB + 65536, 3),
        (MIB + 65536..2 * MIB, 0),
        (2 * MIB..3 * MIB, 3),
        (3 * MIB..8 * MIB, 0),
        (8 * MIB..9 * MIB, 3),
        (9 * MIB..9 * MIB + 65536, 0),
        (9 * MIB + 65536..13 * MIB, 3),
        (13 * MIB..13 * MIB + 8192, 0),
        (13 * MIB + 8192..16 * MIB, 3),
        (16 * MIB..20 * MIB, 0),
        (20 * MIB..last.start, 3),
        (last.clone(), 0),
    ]);
    assert_eq!(map(&trial, "box", "base:allocation"), after);
    assert_eq!(qemu_map(&trial), after);
    trial.agree();
    assert_eq!(map(&trial, "box", "dormouse:dirty"), [(0..DISK_BYTES, 0)]);
    // What was allocated and zero is a hole of the image that was committed.
    let mut committed = after;
    committed.splice(7..10, [(9 * MIB + 65536..16 * MIB, 3)]);
    assert_eq!(map(&trial, "box", "base:allocation"), committed);
    assert_eq!(qemu_map(&trial), committed);
    assert_eq!(map(&trial, "vm@1:root", "base:allocation"), before, "a snapshot changed");
}

/// `qemu-img map` in the terms of `base:allocation`. It asks with REQ_ONE, run by run.
fn qemu_map(trial: &Trial) -> Vec<(Range<usize>, u64)> {
    let text = trial.run("qemu-img", &["map", "--output=json", "-f", "raw", &trial.uri()]);
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let number = |row: &Value, key: &str| usize::try_from(row[key].as_u64().unwrap()).unwrap();
    rows.iter()
        .map(|row| {
            let start = number(row, "start");
            let kind = match (row["data"].as_bool().unwrap(), row["zero"].as_bool().unwrap()) {
                (true, false) => 0,
                (false, true) => 3,
                other => panic!("{other:?} in {text}"),
            };
            (start..start + number(row, "length"), kind)
        })
        .collect()
}
