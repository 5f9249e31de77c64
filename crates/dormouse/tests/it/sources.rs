//! `dormouse:source`: which pack a run comes from, as tools that we did not write see it; and what
//! is decoded before it is read.

use std::fs;

use serde_json::Value;

use crate::fixture::{Home, noise, set_block};
use crate::nbd_fixture::{Served, nbdsh, tool, uri};

/// `(offset, length, source)` as nbdinfo tells it.
fn map_of(home: &Home, export: &str) -> Vec<(u64, u64, u64)> {
    let text = tool(home, "nbdinfo", &["--map=dormouse:source", "--json", &uri(export)]);
    let rows: Value = serde_json::from_str(&text).unwrap();
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap();
    rows.as_array()
        .unwrap()
        .iter()
        .map(|row| (number(row, "offset"), number(row, "length"), number(row, "type")))
        .collect()
}

/// The source that `show` gives for the pack that a snapshot wrote.
fn source_of(home: &Home, snapshot: &str) -> u64 {
    let show = home.json(&["show", snapshot]);
    let pack = show["packs"]
        .as_array()
        .unwrap()
        .iter()
        .find(|pack| pack["written_by"] == snapshot)
        .unwrap()
        .clone();
    let source = pack["source"].as_u64().unwrap();
    let digits = format!("{source:08x}");
    assert!(pack["pack"].as_str().unwrap().starts_with(&digits), "{pack}");
    assert!(home.ok(&["show", snapshot]).contains(&format!(" {source} ")));
    source
}

#[test]
fn tools_see_which_commit_a_run_comes_from() {
    let home = Home::with_store();
    let mut disk = noise(1, 64);
    disk[32 * 4096..48 * 4096].fill(0);
    home.file("d", &disk);
    home.ok(&["commit", "vm", "--disk", "d"]);
    set_block(&mut disk, 8, &noise(2, 1));
    set_block(&mut disk, 9, &noise(3, 1));
    home.file("d", &disk);
    home.ok(&["commit", "vm", "--disk", "d"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root", "--size", "512KiB"]);
    let (first, second) = (source_of(&home, "vm@1"), source_of(&home, "vm@2"));
    assert_ne!(first, second);
    let _served = Served::start(&home, &["vm@2:root", "box"]);
    let blocks = |rows: &[(u64, u64, u64)]| -> Vec<(u64, u64, u64)> {
        rows.iter().map(|&(at, length, source)| (at * 4096, length * 4096, source)).collect()
    };
    let image =
        blocks(&[(0, 8, first), (8, 2, second), (10, 22, first), (32, 16, 0), (48, 16, first)]);
    assert_eq!(map_of(&home, "vm@2:root"), image);
    let script = "h.pwrite(b'x' * 4096, 4096)\nh.zero(8192, 8 * 4096)\nh.flush()";
    nbdsh(&home, "box", "", script);
    let live = u64::from(u32::MAX);
    let disk = [
        (0, 1, first),
        (1, 1, live),
        (2, 6, first),
        (8, 2, 0),
        (10, 22, first),
        (32, 16, 0),
        (48, 16, first),
        (64, 64, 0),
    ];
    assert_eq!(map_of(&home, "box"), blocks(&disk));
    // After a commit it lies in a pack of its own.
    home.ok(&["disk", "commit", "box", "vm"]);
    let third = source_of(&home, "vm@3");
    assert_eq!(map_of(&home, "box")[1], (4096, 4096, third));

    let script = "\
seen = []
def extents(context, offset, entries, err):
    if context == 'dormouse:source':
        seen.extend(entries)
    return 0
h.block_status(8192, 4096, extents)
print(*seen)
print(h.can_meta_context('dormouse:source'), h.can_meta_context('dormouse:dirty'))";
    let before = "h.add_meta_context('dormouse:source')\nh.add_meta_context('base:allocation')";
    let said = nbdsh(&home, "box", before, script);
    let (entries, contexts) = said.trim().split_once('\n').unwrap();
    assert!(entries.starts_with(&format!("4096 {third} ")), "{said}");
    assert!(entries.contains(&format!(" {first}")), "{said}");
    assert_eq!(contexts, "True False");
}

/// CACHE brings frames into the cache; then the packs are gone and reading works all the same.
#[test]
fn what_was_cached_is_read_without_its_pack() {
    let home = Home::with_store();
    home.file("d", &noise(1, 1024));
    home.ok(&["commit", "vm", "--disk", "d"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root"]);
    for export in ["vm@1:root", "box"] {
        let _served = Served::start(&home, &[export]);
        let packs = home.store().join("packs");
        let cut = packs.display();
        let script = format!(
            "import glob, os
assert h.can_cache()
h.cache(2 << 20, 0)
for path in glob.glob('{cut}/**/*.pack', recursive=True):
    os.rename(path, path + '.away')
    saved = open(path + '.away', 'rb').read()
    open('{}', 'wb').write(saved)
    os.truncate(path + '.away', 0)
print(len(h.pread(2 << 20, 0)))
try:
    h.pread(1 << 20, 3 << 20)
    print('read')
except nbd.Error as e:
    print(e.errnum)
for path in glob.glob('{cut}/**/*.away', recursive=True):
    open(path, 'wb').write(saved)
    os.rename(path, path[:-len('.away')])",
            home.path("saved").display()
        );
        let said = nbdsh(&home, export, "", &script);
        assert_eq!(said, "2097152\n5\n", "{export}");
    }
    assert!(fs::metadata(home.path("saved")).unwrap().len() > 1 << 20);
    home.ok(&["verify", "--deep"]);
}
