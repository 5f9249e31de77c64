//! Malformed, oversized, half and endless input: the right error, and nobody else notices.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dormouse_serve::nbd::{DeviceErrorKind, Limits};

use crate::memory::Memory;
use crate::wire::{
    CACHE, Client, DISC, FLUSH, Fixture, READ, STATUS, TRIM, WRITE, ZEROES, info, meta, u32_at,
};

const MIB: usize = 1 << 20;
const UNSUP: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;
const EXT_HEADER_REQD: u32 = (1 << 31) + 10;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

#[test]
fn every_malformed_option_gets_its_answer_and_the_next_one_is_heard() {
    let fixture = Fixture::new(vec![1; MIB]);
    let mut client = fixture.client();
    let long = vec![0; (64 << 10) + 1];
    for (option, data, expected) in [
        (3, &b"x"[..], INVALID),
        (5, b"", POLICY),
        (5, b"x", INVALID),
        (8, b"x", INVALID),
        (11, b"x", INVALID),
        (6, b"", INVALID),
        (7, b"\0\0\0\x05disk\0\0", INVALID),
        (7, b"\xff\xff\xff\xffdisk\0\0", INVALID),
        (6, &info("nobody", &[]), UNKNOWN),
        (7, &info("disk\0", &[]), UNKNOWN),
        (9, &meta("disk", &[]), INVALID),
        (10, &meta("disk", &["base:allocation"]), INVALID),
        (4, b"", UNSUP),
        (12, b"whatever", UNSUP),
        (u32::MAX, b"", UNSUP),
        (6, &long, TOO_BIG),
        (99, &long, TOO_BIG),
        (3, b"", 1),
    ] {
        assert_eq!(client.verdict(option, data), expected, "{option} {}", data.len());
    }
    let mut client = client.structured();
    assert_eq!(client.verdict(8, b""), INVALID);
    assert_eq!(client.verdict(9, &meta("nobody", &[])), UNKNOWN);
    assert_eq!(client.verdict(9, b"\0\0\0\x04disk\0\0\0\x09"), INVALID);
    assert_eq!(client.verdict(10, &meta("disk", &["dormouse:source"])), EXT_HEADER_REQD);
    assert_eq!(client.option(9, &meta("disk", &[])).len(), 3);
    let mut client = client.extended();
    assert_eq!(client.verdict(8, b""), EXT_HEADER_REQD);
    assert_eq!(client.option(9, &meta("disk", &["dormouse:"])).len(), 3);
    let mut client = client.go("");
    assert!(client.lives());
}

#[test]
fn handshakes_that_cannot_go_on_end() {
    let fixture = Fixture::new(vec![1; MIB]);
    let export_name = |name: &str, prepare: fn(Client) -> Client| {
        let mut client = prepare(fixture.client());
        client.send_option(1, name.as_bytes());
        client.end()
    };
    assert!(export_name("nobody", |client| client).is_empty());
    assert!(export_name("disk", Client::extended).is_empty());
    let mut client = fixture.client();
    client.stream.write_all(b"NOTANOPT\0\0\0\x03\0\0\0\0").unwrap();
    assert!(client.end().is_empty());
    let mut client = fixture.client();
    assert_eq!(client.verdict(2, b""), 1);
    assert!(client.end().is_empty());
    // Endless options.
    let mut client = fixture.client();
    let nothing = b"IHAVEOPT\0\0\0\x63\0\0\0\0".repeat(2000);
    let _ = client.stream.write_all(&nothing);
    client.end();
    assert!(fixture.client().go("disk").lives());
}

#[test]
fn the_oldest_way_in_works() {
    let fixture = Fixture::new(vec![1; MIB]);
    let mut client = fixture.client();
    client.send_option(1, b"disk");
    assert_eq!(client.take(10)[..8], (MIB as u64).to_be_bytes());
    client.request(READ, 0, 5, 4096, 8);
    assert_eq!(client.reply(8).payload, [1; 8]);
}

#[test]
fn who_takes_too_long_to_begin_is_cut_off() {
    let limits = Limits { handshake_ms: 200, ..Limits::STANDARD };
    let fixture = Fixture::with(Memory::new(vec![1; MIB]), limits);
    let mut done = fixture.client().go("disk");
    let mut client = fixture.client();
    client.stream.write_all(b"IHAVE").unwrap();
    let begun = Instant::now();
    assert!(client.end().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(done.lives(), "a connection past its handshake has all the time it wants");
}

#[test]
fn connections_are_bounded() {
    let limits = Limits { connections: 2, ..Limits::STANDARD };
    let fixture = Fixture::with(Memory::new(vec![1; MIB]), limits);
    let mut first = fixture.client().go("disk");
    let second = fixture.client();
    let mut third = std::os::unix::net::UnixStream::connect(fixture.socket()).unwrap();
    let mut nothing = Vec::new();
    let _ = std::io::Read::read_to_end(&mut third, &mut nothing);
    assert!(nothing.is_empty());
    assert_eq!(fixture.server.stats().turned_away, 1);
    drop(second);
    assert!(first.lives());
}

/// A client that never read, or sent half a request, kept its place for ever, and 256 of them the
/// server to themselves. They are let be until somebody needs the room; who waits quietly stays.
#[test]
fn who_stalls_makes_room() {
    let limits = Limits { connections: 4, stall_ms: 200, ..Limits::STANDARD };
    let fixture = Fixture::with(Memory::new(vec![1; 16 * MIB]), limits);
    let mut quiet = fixture.client().go("disk");
    let mut deaf = fixture.client().go("disk");
    (0..8).for_each(|cookie| deaf.request(READ, 0, cookie, 0, 16 << 20));
    let mut half = fixture.client().go("disk");
    half.stream.write_all(&[0x25, 0x60]).unwrap();
    let mut cut = fixture.client().go("disk");
    let write = cut.header(WRITE, 0, 1, 0, 4096);
    cut.stream.write_all(&write).unwrap();
    let come_in = || loop {
        let mut stream = std::os::unix::net::UnixStream::connect(fixture.socket()).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        // Turned away until one has stalled for long enough.
        if std::io::Read::read_exact(&mut stream, &mut [0; 18]).is_ok() {
            return stream;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let _new: Vec<_> = (0..3).map(|_| come_in()).collect();
    assert_eq!(fixture.server.stats().connections, 4);
    assert!(half.end().is_empty() && cut.end().is_empty());
    assert!(quiet.lives());
}

#[test]
fn every_wrong_request_gets_its_number_and_the_connection_lives() {
    let fixture = Fixture::new(vec![1; 64 * MIB]);
    let end = 64 * MIB as u64;
    let table = [
        (READ, 0, end, 1, EINVAL),
        (READ, 0, u64::MAX, 4096, EINVAL),
        (READ, 2, 0, 4096, EINVAL),
        (READ, 0, 0, 33 << 20, EINVAL),
        (READ, 4, 0, 33 << 20, EOVERFLOW),
        (FLUSH, 8, 0, 0, EINVAL),
        (TRIM, 0, 1, end, EINVAL),
        (TRIM, 0x8000, 0, 1, EINVAL),
        (ZEROES, 0, end - 1, 2, ENOSPC),
        (ZEROES, 2 | 16, 0, 4096, ENOTSUP),
        (CACHE, 0, end, 1, EINVAL),
        (STATUS, 0, 0, 4096, EINVAL),
        (8, 0, 0, 0, EINVAL),
        (0xffff, 0xffff, u64::MAX, 0xffff, EINVAL),
        (READ, 0, end, 0, 0),
        (ZEROES, 1, 5, 0, 0),
    ];
    for extended in [false, true] {
        let client = fixture.client();
        let client = if extended { client.extended() } else { client.structured() };
        let mut client = client.go("disk");
        for (command, flags, offset, length, expected) in table {
            if extended && flags & 0x20 != 0 {
                continue;
            }
            let error = client.error_of(command, flags, offset, length);
            assert_eq!(error, expected, "{command} {flags:#x} {offset}+{length} {extended}");
        }
        assert!(client.lives());
    }
}

#[test]
fn the_payload_of_a_refused_write_is_dropped() {
    let fixture = Fixture::new(vec![1; 64 * MIB]);
    let mut client = fixture.client().go("disk");
    for (flags, offset, length, expected) in [
        (0, 64 * MIB as u64, 4096, ENOSPC),
        (0, 64 * MIB as u64 - 1, 3 * MIB, ENOSPC),
        (0x40, 0, 100, EINVAL),
        (0, 0, 33 * MIB, EINVAL),
    ] {
        client.request(WRITE, flags, 9, offset, length as u64);
        client.stream.write_all(&vec![7; length]).unwrap();
        let reply = client.reply(0);
        assert_eq!((reply.cookie, reply.error), (9, expected));
    }
    assert!(client.lives());
    let mut fixed = fixture.client().go("fixed");
    for (command, payload) in [(WRITE, 4096), (TRIM, 0), (ZEROES, 0)] {
        fixed.request(command, 0, 9, 0, 4096);
        fixed.stream.write_all(&vec![7; payload]).unwrap();
        assert_eq!(fixed.reply(0).error, EPERM, "{command}");
    }
    assert!(fixed.lives());
    assert_eq!(fixture.memory.contents(), vec![1; 64 * MIB]);
}

#[test]
fn extended_requests_say_what_payload_they_have() {
    let fixture = Fixture::new(vec![1; 8 * MIB]);
    let mut client = fixture.client().extended().go("disk");
    client.request(READ, 0x20, 1, 0, 5);
    client.stream.write_all(b"extra").unwrap();
    assert_eq!(client.reply(0).error, EINVAL);
    client.request(WRITE, 0, 2, 0, 5);
    assert_eq!(client.reply(0).error, EINVAL);
    client.request(WRITE, 0x20 | 1, 3, 0, 5);
    client.stream.write_all(b"hello").unwrap();
    assert_eq!(
        client.reply(0),
        crate::wire::Reply { kind: Some(0), done: true, cookie: 3, error: 0, payload: vec![] }
    );
    // 64-bit lengths.
    client.request(ZEROES, 0, 4, 0, 1 << 40);
    assert_eq!(client.reply(0).error, ENOSPC);
    assert!(client.lives());
    client.request(WRITE, 0x20, 5, 0, 1 << 40);
    assert!(client.end().is_empty(), "nobody waits for a tebibyte");
}

#[test]
fn extended_block_status_has_wide_flags() {
    let fixture = Fixture::new(Memory::pattern(4 * MIB));
    let mut client =
        fixture.client().extended().select(&["base:allocation", "dormouse:source"]).go("disk");
    client.request(STATUS, 0, 6, 0, 4 * MIB as u64);
    let (allocation, source) = (client.reply(0), client.reply(0));
    assert_eq!((allocation.kind, allocation.done, source.done), (Some(6), false, true));
    assert_eq!((u32_at(&allocation.payload, 0), u32_at(&source.payload, 0)), (1, 3));
    assert_eq!(u32_at(&source.payload, 4), 4);
    assert_eq!(
        source.payload[8..24],
        [[0, 0, 0, 0, 0, 0x10, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]].concat()
    );
    client.request(STATUS, 8, 6, 5000, 1_500_000);
    let (allocation, source) = (client.reply(0), client.reply(0));
    assert_eq!((allocation.payload.len(), source.payload.len()), (24, 24));
    assert_eq!(source.payload[8..16], (MIB as u64 - 5000).to_be_bytes());
}

/// A client that selected several contexts asks for some of them, with a payload that also has the
/// length. It may where the server said so, which it says with extended headers only.
#[test]
fn block_status_of_some_contexts() {
    let fixture = Fixture::new(Memory::pattern(4 * MIB));
    let flags = |mut client: Client| {
        let about = client.option(6, &info("disk", &[])).remove(0).1;
        u16::from_be_bytes([about[10], about[11]])
    };
    assert_eq!(flags(fixture.client().structured()) >> 12 & 1, 0);
    assert_eq!(flags(fixture.client().extended()) >> 12 & 1, 1);
    let contexts = ["base:allocation", "dormouse:dirty", "dormouse:source"];
    let mut client = fixture.client().extended().select(&contexts).go("disk");
    let ask = |client: &mut Client, flags: u16, offset: u64, payload: &[u8]| {
        client.request(STATUS, flags, 6, offset, payload.len() as u64);
        client.stream.write_all(payload).unwrap();
    };
    let payload = |length: u64, ids: &[u32]| {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        length.to_be_bytes().into_iter().chain(ids).collect::<Vec<_>>()
    };
    for ids in [&[1][..], &[3], &[3, 1], &[2, 3], &[1, 2, 3]] {
        ask(&mut client, 0x20, 4096, &payload(MIB as u64, ids));
        let mut told = Vec::new();
        loop {
            let reply = client.reply(0);
            assert_eq!((reply.kind, reply.error), (Some(6), 0));
            told.push(u32_at(&reply.payload, 0));
            if reply.done {
                break;
            }
        }
        let mut expected = ids.to_vec();
        expected.sort_unstable();
        assert_eq!(told, expected);
    }
    ask(&mut client, 0x20 | 8, 4096, &payload(1000, &[1]));
    let one = client.reply(0);
    assert_eq!((one.payload.len(), &one.payload[8..16]), (24, &1000_u64.to_be_bytes()[..]));
    let wrong = [
        payload(MIB as u64, &[]),
        payload(MIB as u64, &[1, 1]),
        payload(MIB as u64, &[4]),
        payload(MIB as u64, &[0]),
        payload(MIB as u64, &[1, 2, 3, 1]),
        payload(0, &[1]),
        payload(8 * MIB as u64, &[1]),
        payload(u64::MAX, &[1]),
        payload(MIB as u64, &[1])[..10].to_vec(),
        vec![0; 3],
        vec![0; 100_000],
    ];
    for wrong in wrong {
        ask(&mut client, 0x20, 4096, &wrong);
        let reply = client.reply(0);
        assert_eq!((reply.error, reply.done), (EINVAL, true), "{} bytes", wrong.len());
    }
    assert!(client.lives());
    // Without contexts there is nothing to choose from.
    let mut plain = fixture.client().extended().go("disk");
    ask(&mut plain, 0x20, 0, &payload(4096, &[1]));
    assert_eq!(plain.reply(0).error, EINVAL);
    assert!(plain.lives());
}

#[test]
fn an_error_of_the_device_reaches_its_request_only() {
    let fixture = Fixture::new(vec![1; 8 * MIB]);
    for (number, (kind, expected)) in [
        (DeviceErrorKind::Io, EIO),
        (DeviceErrorKind::NoSpace, ENOSPC),
        (DeviceErrorKind::ReadOnly, EPERM),
        (DeviceErrorKind::NotSupported, ENOTSUP),
        (DeviceErrorKind::Invalid, EINVAL),
        (DeviceErrorKind::Shutdown, ESHUTDOWN),
    ]
    .into_iter()
    .enumerate()
    {
        fixture.memory.failures.lock().unwrap().insert(number as u64 * 4096, kind);
        let mut client = fixture.client().structured().go("disk");
        let mut bytes = Vec::new();
        for cookie in 0..20 {
            bytes.extend(client.header(READ, 0, cookie, cookie * 4096, 4096));
        }
        client.stream.write_all(&bytes).unwrap();
        let mut seen = 0;
        for _ in 0..20 {
            let reply = client.reply(0);
            let wrong = reply.cookie <= number as u64;
            assert_eq!(reply.error != 0, wrong, "{reply:?}");
            if reply.cookie == number as u64 {
                assert_eq!(reply.error, expected);
                assert_eq!(reply.kind, Some(0x8002));
                assert_eq!(
                    reply.payload[reply.payload.len() - 8..],
                    (number as u64 * 4096).to_be_bytes()
                );
            }
            seen += 1;
        }
        assert_eq!(seen, 20);
        // In the simple form, also where the reply is in one large piece.
        let mut simple = fixture.client().go("disk");
        simple.request(READ, 0, 1, number as u64 * 4096, 3 * MIB as u64);
        assert_eq!(simple.reply(3 * MIB).error, expected);
        assert!(simple.lives());
    }
    assert_eq!(fixture.server.stats().exports[0].read.errors, 21 + 6);
}

#[test]
fn half_a_request_holds_up_nobody_else() {
    let fixture = Fixture::new(vec![1; 8 * MIB]);
    let mut half = fixture.client().go("disk");
    half.request(READ, 0, 1, 0, 4096);
    half.request(WRITE, 0, 2, 0, MIB as u64);
    half.stream.write_all(&[2; 1000]).unwrap();
    assert_eq!(half.reply(4096).cookie, 1, "what came before is answered");
    let mut other = fixture.client().go("disk");
    assert!(other.lives());
    half.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(half.end().is_empty());
    assert_eq!(fixture.memory.contents()[0], 1, "half a write is none");
    // A wrong magic is the end, after what came before is answered.
    other.request(READ, 0, 3, 0, 16);
    other.stream.write_all(&[0x55; 28]).unwrap();
    assert_eq!(other.reply(16).payload, [1; 16]);
    assert!(other.end().is_empty());
}

#[test]
fn who_reads_nothing_or_floods_holds_up_only_itself() {
    let fixture = Fixture::new(vec![1; 8 * MIB]);
    let mut deaf = fixture.client().structured().go("disk");
    deaf.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let read = deaf.header(READ, 0, 1, 0, MIB as u64);
    let flood = read.repeat(10_000);
    let mut sent = 0;
    while sent < 20 * flood.len() {
        match deaf.stream.write(&flood) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
    }
    assert!(sent < 20 * flood.len(), "the server reads no more than it can answer");
    let mut other = fixture.client().structured().go("disk");
    for _ in 0..100 {
        assert!(other.lives());
    }
    drop(deaf);
    let begun = Instant::now();
    while fixture.server.stats().connections > 1 {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(other.lives());
}

#[test]
fn a_slow_request_or_a_large_zeroing_lets_others_pass() {
    let fixture = Fixture::new(vec![1; 64 * MIB]);
    let mut client = fixture.client().structured().go("disk");
    fixture.memory.gate_at.store(12 << 20, Ordering::SeqCst);
    // One that looks quick and is not, one that is served in bulk, and 1,000 that are quick.
    client.request(READ, 0, 1, 12 << 20, 512);
    client.request(ZEROES, 1, 2, 0, 64 << 20);
    for cookie in 10..1010 {
        client.request(READ, 0, cookie, 4096, 512);
    }
    let mut quick = 0;
    while quick < 1000 {
        let cookie = client.reply(0).cookie;
        assert_ne!(cookie, 1);
        quick += u64::from(cookie >= 10);
    }
    fixture.memory.open_gate();
    client.request(DISC, 0, 0, 0, 0);
    let rest = client.end();
    assert!(rest.len() >= 20, "DISC drains: {}", rest.len());
    assert!(fixture.memory.contents().iter().all(|&byte| byte == 0));
    assert!(fixture.memory.largest_zero.load(Ordering::SeqCst) <= 16 << 20);
    assert!(fixture.memory.flushes.load(Ordering::SeqCst) > 0, "FUA of a split request");
}
