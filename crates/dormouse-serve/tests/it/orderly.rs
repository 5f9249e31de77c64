//! Stopping: what is under way is answered, what comes later is told, what hangs is cut off.

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use dormouse_serve::nbd::Limits;

use crate::memory::Memory;
use crate::wire::{Fixture, READ, WRITE};
use std::io::Write;

#[test]
fn a_stop_drains_and_refuses() {
    let fixture = Fixture::new(vec![1; 1 << 20]);
    fixture.memory.gate_at.store(8192, Ordering::SeqCst);
    let mut client = fixture.client().structured().go("disk");
    client.request(WRITE, 1, 1, 8192, 5);
    client.stream.write_all(b"saved").unwrap();
    while !fixture.memory.at_gate.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    thread::scope(|scope| {
        let stop = scope.spawn(|| fixture.server.stop());
        while fixture.socket().exists() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(UnixStream::connect(fixture.socket()).is_err());
        client.request(READ, 0, 2, 0, 512);
        let refused = client.reply(0);
        assert_eq!((refused.cookie, refused.error), (2, 108));
        fixture.memory.open_gate();
        let answered = client.reply(0);
        assert_eq!((answered.cookie, answered.error), (1, 0));
        assert!(client.end().is_empty());
        stop.join().unwrap().unwrap();
    });
    assert_eq!(&fixture.memory.contents()[8192..8197], b"saved");
    fixture.server.stop().unwrap();
}

#[test]
fn a_stop_under_load_loses_no_answered_write() {
    let fixture = Fixture::new(vec![0; 4 << 20]);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let mut client = fixture.client().structured().go("disk");
                scope.spawn(move || {
                    let mut answered = 0u64;
                    loop {
                        let at = (writer << 20) + answered % 256 * 4096;
                        let mut bytes = client.header(WRITE, 0, answered, at, 4096);
                        bytes.extend([u8::try_from(1 + answered / 256 % 255).unwrap(); 4096]);
                        if client.stream.write_all(&bytes).is_err() {
                            return answered;
                        }
                        let mut magic = [0; 16];
                        if std::io::Read::read_exact(&mut client.stream, &mut magic).is_err()
                            || magic[..4] != [0x67, 0x44, 0x66, 0x98]
                        {
                            return answered;
                        }
                        answered += 1;
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(200));
        fixture.server.stop().unwrap();
        let contents = fixture.memory.contents();
        for (writer, thread) in writers.into_iter().enumerate() {
            let answered = thread.join().unwrap();
            assert!(answered > 0);
            let last = answered - 1;
            let at = (writer << 20) + (last % 256 * 4096) as usize;
            assert_eq!(u64::from(contents[at]), 1 + last / 256 % 255);
        }
    });
    assert_eq!(fixture.server.stats().connections, 0);
}

#[test]
fn a_device_that_hangs_does_not_hang_the_stop() {
    let limits = Limits { drain_ms: 200, ..Limits::STANDARD };
    let fixture = Fixture::with(Memory::new(vec![1; 1 << 20]), limits);
    fixture.memory.gate_at.store(0, Ordering::SeqCst);
    let mut client = fixture.client().go("disk");
    client.request(READ, 0, 1, 0, 512);
    while !fixture.memory.at_gate.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    assert!(fixture.server.stop().is_err());
    assert!(begun.elapsed() < Duration::from_secs(10));
    fixture.memory.open_gate();
}

#[test]
fn an_idle_or_half_open_client_does_not_hang_the_stop() {
    let fixture = Fixture::new(vec![1; 1 << 20]);
    let (_idle, _greeted) = (fixture.client().go("disk"), fixture.client());
    let mut half = fixture.client().go("disk");
    half.stream.write_all(&[0x25, 0x60]).unwrap();
    let begun = Instant::now();
    fixture.server.stop().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
}
