//! nbdinfo, nbdcopy, qemu-img, qemu-io, nbdsh, nbdkit and fio: what they say of the server.

use std::fs;
use std::sync::atomic::Ordering;

use crate::memory::Memory;
use crate::wire::{Fixture, run};

const MIB: usize = 1 << 20;

#[test]
fn nbdinfo_sees_what_is_offered() {
    let fixture = Fixture::new(Memory::pattern(8 * MIB));
    let about: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &fixture.uri()])).unwrap();
    assert_eq!(about["structured"], true);
    let [disk, fixed] = about["exports"].as_array().unwrap().as_slice() else { panic!("{about}") };
    assert_eq!((&disk["export-name"], &fixed["export-name"]), (&"disk".into(), &"fixed".into()));
    assert_eq!(disk["description"], "a disk in memory");
    assert_eq!(disk["export-size"], 8 * MIB as u64);
    assert_eq!(disk["block_size_preferred"], 4096);
    assert_eq!(disk["block_size_maximum"], 32 * MIB as u64);
    for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(disk[format!("can_{can}")], true, "{can}");
    }
    assert_eq!((&disk["is_read_only"], &fixed["is_read_only"]), (&false.into(), &true.into()));
    let contexts = disk["contexts"].to_string();
    assert!(contexts.contains("base:allocation") && contexts.contains("dormouse:dirty"));
    assert_eq!(run("nbdinfo", &["--size", &fixture.uri()]).trim(), (8 * MIB).to_string());
}

#[test]
fn nbdinfo_maps_maximal_extents() {
    let fixture = Fixture::new(Memory::pattern(MIB));
    let map = run("nbdinfo", &["--map", &fixture.uri()]);
    let rows: Vec<Vec<&str>> = map.lines().map(|row| row.split_whitespace().collect()).collect();
    let starts: Vec<_> = rows.iter().map(|row| (row[0], row[1], row[2])).collect();
    let expected = [("0", "65536", "0"), ("65536", "65536", "3"), ("131072", "196608", "0")];
    assert_eq!(starts[..3], expected, "{map}");
    let dirty = run("nbdinfo", &["--map=dormouse:dirty", &fixture.uri()]);
    assert_eq!(dirty.lines().count(), 1, "{dirty}");
}

#[test]
fn nbdcopy_copies_both_ways() {
    let bytes = Memory::pattern(24 * MIB + 4096 + 512);
    let fixture = Fixture::new(bytes.clone());
    let file = fixture.folder.path().join("raw").display().to_string();
    run("nbdcopy", &["--connections=4", &fixture.uri(), &file]);
    assert!(fs::read(&file).unwrap() == bytes);

    let empty = Fixture::new(vec![0xee; bytes.len()]);
    run("nbdcopy", &["--connections=4", "--flush", &file, &empty.uri()]);
    assert!(empty.memory.contents() == bytes);
    assert!(empty.memory.flushes.load(Ordering::SeqCst) > 0);
}

#[test]
fn qemu_img_agrees() {
    let bytes = Memory::pattern(8 * MIB);
    let fixture = Fixture::new(bytes.clone());
    let folder = fixture.folder.path();
    let [raw, qcow2] = ["raw", "qcow2"].map(|name| folder.join(name).display().to_string());
    let uri = &fixture.uri();
    assert!(run("qemu-img", &["info", uri]).contains("8 MiB"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", uri, &qcow2]);
    run("qemu-img", &["convert", "-O", "raw", &qcow2, &raw]);
    assert!(fs::read(&raw).unwrap() == bytes);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", uri, &qcow2]);
    let map: serde_json::Value =
        serde_json::from_str(&run("qemu-img", &["map", "--output=json", "-f", "raw", uri]))
            .unwrap();
    assert_eq!(map[1]["start"], 65536);
    assert_eq!((&map[1]["zero"], &map[1]["length"]), (&true.into(), &65536.into()));

    let target = Fixture::new(vec![0xee; 8 * MIB]);
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", &qcow2, &target.uri()]);
    assert!(target.memory.contents() == bytes);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_forces() {
    let fixture = Fixture::new(vec![0x11; 16 * MIB]);
    let script = [
        "aio_write -P 0x22 0 64k",
        "aio_write -P 0x33 1M 2M",
        "aio_flush",
        "aio_read -P 0x33 1M 2M",
        "aio_flush",
        "write -z 4k 4k",
        "write -z -u 16k 8k",
        "write -f -P 0x44 12345 777",
        "discard 8M 4M",
        "read -P 0x22 0 4k",
        "read -P 0 4k 4k",
        "read -P 0 16k 8k",
        "read -P 0x44 12345 777",
        "read -P 0 8M 4M",
        "write -z -u 2M 14M",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "writeback"];
    script.iter().for_each(|command| arguments.extend(["-c", command]));
    let uri = fixture.uri();
    arguments.push(&uri);
    let output = run("qemu-io", &arguments);
    assert!(!output.contains("failed"), "{output}");
    let contents = fixture.memory.contents();
    assert!(contents[12345..12345 + 777].iter().all(|&byte| byte == 0x44));
    assert!(contents[2 * MIB..].iter().all(|&byte| byte == 0));
    assert!(contents[MIB..2 * MIB].iter().all(|&byte| byte == 0x33));
    assert!(fixture.memory.durable_writes.load(Ordering::SeqCst) > 0);
}

#[test]
fn libnbd_asks_oddly() {
    let fixture = Fixture::new(Memory::pattern(8 * MIB));
    let script = format!(
        r#"
import nbd, errno
uri = "{}"
def fails(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == number, (error.errno, number)
    else:
        assert False, "no error"
def connect(structured=True, contexts=()):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    for context in contexts: h.add_meta_context(context)
    h.set_strict_mode(0)
    h.connect_uri(uri)
    return h
for structured in (False, True):
    h = connect(structured)
    assert h.get_structured_replies_negotiated() == structured
    data = h.pread(3 * 1024 * 1024, 4097)
    h.pwrite(b"x" * 5, 8 * 1024 * 1024 - 5)
    assert bytes(h.pread(5, 8 * 1024 * 1024 - 5)) == b"xxxxx"
    fails("EINVAL", lambda: h.pread(2, 8 * 1024 * 1024 - 1))
    fails("ENOSPC", lambda: h.pwrite(b"xx", 8 * 1024 * 1024 - 1))
    fails("EINVAL", lambda: h.trim(2, 8 * 1024 * 1024 - 1))
    fails("ENOSPC", lambda: h.zero(1, 1 << 40))
    h.pwrite(b"y" * 4000000, 333, nbd.CMD_FLAG_FUA)
    assert bytes(h.pread(4000000, 333)) == b"y" * 4000000
    h.zero(3000000, 777, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert bytes(h.pread(3000000, 777)) == bytes(3000000)
    fails("ENOTSUP", lambda: h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))
    h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    h.cache(8 * 1024 * 1024, 0)
    h.flush()
    h.shutdown()
h = connect(True, ["base:allocation", "dormouse:dirty"])
seen = dict()
def extents(context, offset, entries, error):
    seen[context] = (offset, entries)
h.block_status(1024 * 1024, 0, extents)
assert set(seen) == {{"base:allocation", "dormouse:dirty"}}, seen
assert all(sum(entries[::2]) >= 1024 * 1024 for offset, entries in seen.values()), seen
h.block_status(100, 50, extents, nbd.CMD_FLAG_REQ_ONE)
assert all(len(entries) == 2 and entries[0] == 100 for offset, entries in seen.values()), seen
chunks = []
def chunk(data, offset, status, error): chunks.append((offset, len(data), status))
h.pread_structured(4 * 1024 * 1024, 0, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1 and chunks[0][1] == 4 * 1024 * 1024, chunks
chunks.clear()
h.pread_structured(4 * 1024 * 1024, 0, chunk)
assert any(status == nbd.READ_HOLE for offset, length, status in chunks), chunks
h.shutdown()
"#,
        fixture.uri()
    );
    // What nbdsh runs, with the interpreter that Debian's package is for, whatever PATH says.
    run("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
}

#[test]
fn nbdkit_passes_it_on() {
    let bytes = Memory::pattern(4 * MIB);
    let fixture = Fixture::new(bytes.clone());
    let file = fixture.folder.path().join("raw").display().to_string();
    let copy = format!("nbdcopy \"$uri\" {file}");
    run("nbdkit", &["-U", "-", "nbd", &format!("uri={}", fixture.uri()), "--run", &copy]);
    assert!(fs::read(&file).unwrap() == bytes);
}

#[test]
fn fio_verifies_over_several_connections() {
    let fixture = Fixture::new(vec![0; 64 * MIB]);
    let uri = format!("--uri={}", fixture.uri());
    let job = [
        "--name=mix",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned",
        "--iodepth=16",
        "--numjobs=3",
        "--size=16m",
        "--offset_increment=20m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--fsync=50",
        "--loops=2",
        "--thread",
    ];
    let output = run("fio", &job);
    assert!(output.contains("err= 0"), "{output}");
    let trims = [
        "--name=trim",
        "--ioengine=nbd",
        &uri,
        "--rw=randtrimwrite",
        "--bs=4k",
        "--iodepth=16",
        "--numjobs=2",
        "--size=8m",
        "--offset_increment=16m",
        "--thread",
    ];
    run("fio", &trims);
    let stats = &fixture.server.stats().exports[0];
    assert!(stats.trim.requests > 100 && stats.flush.requests > 10, "{stats:?}");
    assert_eq!((stats.read.errors, stats.write.errors, stats.refused), (0, 0, 0));
    assert!(stats.write.serving.as_nanos() > 0);
}
