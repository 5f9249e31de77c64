//! Handshakes through real sockets, with real descriptors, in every order.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::userfaultfd::Register;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

const TABLE: &[u8] = br#"[{"base_host_virt_addr":65536,"size":8192,"offset":0,"page_size":4096}]"#;

/// Long enough for a loaded machine where nothing should run out.
const PATIENT: Limits = Limits { timeout: Duration::from_secs(60) };
/// Where it should.
const BRIEF: Limits = Limits { timeout: Duration::from_millis(50) };

fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn uffd() -> Userfaultfd {
    Userfaultfd::open(Features::EVENT_REMOVE).unwrap()
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

#[test]
fn one_message_with_everything() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, TABLE, &[uffd().as_fd()]);
    let handshake = receive(&ours, PATIENT).unwrap();
    assert_eq!(handshake.regions, firecracker::parse(TABLE).unwrap().unwrap().regions);
    assert_eq!(handshake.features, Features::EVENT_REMOVE);
    assert_eq!(handshake.socket_end, SocketEnd::VmGone);
    assert_eq!(handshake.peer.pid(), std::process::id());
    assert!(handshake.others.is_empty());
}

#[test]
fn a_socket_that_is_closed_at_once_had_everything() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let table = br#"[{"base_host_virt_addr":65536,"size":8192,"offset":0}]"#;
    send(&theirs, table, &[uffd().as_fd()]);
    drop(theirs);
    assert_eq!(receive(&ours, PATIENT).unwrap().socket_end, SocketEnd::Nothing);
}

/// The descriptor that came is the one that was sent: it serves the sender's faults.
#[test]
fn the_descriptor_works() {
    let mapping = Mapping::anonymous(4096, PageSize::Small).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sent = uffd();
    sent.register(&mapping.addresses(), Register::Missing).unwrap();
    send(&theirs, TABLE, &[sent.as_fd()]);
    drop(sent);
    let handshake = receive(&ours, PATIENT).unwrap();
    let start = mapping.addresses().start;
    let copied =
        handshake.uffd.copy(start, &[9; 4096], dormouse_sys::userfaultfd::Protection::Writable);
    assert!(copied.stop.is_none(), "{copied:?}");
    assert_eq!(mapping.bytes()[17].load(std::sync::atomic::Ordering::Relaxed), 9);
}

#[test]
fn pieces_come_in_any_order() {
    type Sender = fn(&UnixStream);
    let senders: &[(&str, Sender)] = &[
        ("the table first", |to| {
            send(to, TABLE, &[]);
            send(to, b" ", &[uffd().as_fd()]);
        }),
        ("the descriptor first", |to| {
            send(to, b"[", &[uffd().as_fd()]);
            send(to, &TABLE[1..], &[]);
        }),
        ("the descriptor in the middle", |to| {
            send(to, &TABLE[..20], &[]);
            send(to, &TABLE[20..30], &[uffd().as_fd()]);
            send(to, &TABLE[30..], &[]);
        }),
        ("byte by byte", |to| {
            for (at, byte) in TABLE.iter().enumerate() {
                match at {
                    7 => send(to, &[*byte], &[uffd().as_fd()]),
                    _ => send(to, &[*byte], &[]),
                }
                thread::sleep(Duration::from_micros(100));
            }
        }),
    ];
    for (name, sender) in senders {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| sender(&theirs));
            let handshake =
                receive(&ours, PATIENT).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(handshake.regions.len(), 1, "{name}");
        });
    }
}

#[test]
fn the_userfaultfd_is_told_by_what_it_is() {
    let (one, two, fault) = (null(), null(), uffd());
    let orders: [&[BorrowedFd<'_>]; 3] = [
        &[fault.as_fd(), one.as_fd(), two.as_fd()],
        &[one.as_fd(), fault.as_fd(), two.as_fd()],
        &[one.as_fd(), two.as_fd(), fault.as_fd()],
    ];
    for order in orders {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, TABLE, order);
        assert_eq!(receive(&ours, PATIENT).unwrap().others.len(), 2);
    }
    // In messages of their own, too.
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, &TABLE[..9], &[one.as_fd()]);
    send(&theirs, &TABLE[9..], &[fault.as_fd()]);
    assert_eq!(receive(&ours, PATIENT).unwrap().others.len(), 1);
}

#[test]
fn many_regions_in_a_real_stream() {
    let row = |n: usize| {
        let (address, offset) = ((n + 1) << 21, n << 20);
        format!(
            r#"{{"base_host_virt_addr":{address},"size":1048576,"offset":{offset},"page_size":4096,"page_size_kib":4096}}"#
        )
    };
    let table = format!("[{}]", (0..REGIONS_MAX).map(row).collect::<Vec<_>>().join(","));
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            send(&theirs, &table.as_bytes()[..1000], &[uffd().as_fd()]);
            theirs.write_all(&table.as_bytes()[1000..]).unwrap();
        });
        let handshake = receive(&ours, PATIENT).unwrap();
        assert_eq!(handshake.regions.len(), REGIONS_MAX);
        check(&handshake.regions, (REGIONS_MAX as u64) << 20, Layout::Running).unwrap();
    });
}

#[test]
fn what_is_not_a_handshake_is_refused_with_what_is_wrong() {
    type Sender = fn(&UnixStream);
    let cases: &[(&str, Sender)] = &[
        ("sent nothing", |_| ()),
        ("unfinished at 20 bytes", |to| send(to, &TABLE[..20], &[uffd().as_fd()])),
        ("without a descriptor", |to| send(to, TABLE, &[])),
        ("none of its 2 descriptors", |to| send(to, TABLE, &[null().as_fd(), null().as_fd()])),
        ("two userfaultfds", |to| send(to, TABLE, &[uffd().as_fd(), uffd().as_fd()])),
        ("not a memory table", |to| send(to, b"{}", &[uffd().as_fd()])),
        ("behind a memory table", |to| {
            send(to, &[TABLE, b"x"].concat(), &[uffd().as_fd()]);
        }),
        ("went on after its table", |to| {
            // What comes with descriptors is not read together with what follows.
            send(to, TABLE, &[null().as_fd()]);
            send(to, b"x", &[]);
        }),
        ("more descriptors", |to| {
            let many: Vec<_> = (0..DESCRIPTORS_MAX + 1).map(|_| null()).collect();
            send(to, TABLE, &many.iter().map(AsFd::as_fd).collect::<Vec<_>>());
        }),
        ("more descriptors", |to| {
            for at in 0..=DESCRIPTORS_MAX {
                send(to, &TABLE[at..=at], &[null().as_fd()]);
            }
        }),
    ];
    for (expected, sender) in cases {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sender(&theirs);
        drop(theirs);
        let error = receive(&ours, PATIENT).expect_err(expected);
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert!(error.to_string().contains(expected), "{error}: {expected}");
    }
}

#[test]
fn a_silent_vmm_is_waited_for_as_long_as_was_said() {
    for (sent, expected) in [(&b""[..], "nothing"), (&TABLE[..9], "9 bytes"), (TABLE, "descriptor")]
    {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(sent).unwrap();
        let before = Instant::now();
        let error = receive(&ours, BRIEF).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(before.elapsed() >= BRIEF.timeout);
    }
}

/// Sends the same piece again and again, each when the last one was taken, until one is refused.
fn refused(
    inbox: &mut Inbox,
    (ours, theirs): (&UnixStream, &mut UnixStream),
    piece: &[u8],
    most: usize,
) -> Error {
    let error = (0..most).find_map(|_| {
        theirs.write_all(piece).unwrap();
        inbox.take(ours, firecracker::parse).err()
    });
    error.expect("it was all taken")
}

/// A peer that trickles a table without end must not keep a thread busy parsing it. Each piece is
/// taken before the next is sent: the kernel joins what a fast peer sends into pieces of any size.
#[test]
fn a_table_in_very_many_pieces_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut inbox = Inbox::default();
    theirs.write_all(b"[").unwrap();
    inbox.take(&ours, firecracker::parse).unwrap();
    let filling = [b' '; 1000];
    while inbox.bytes.len() < 200_000 {
        theirs.write_all(&filling).unwrap();
        inbox.take(&ours, firecracker::parse).unwrap();
    }
    let error = refused(&mut inbox, (&ours, &mut theirs), b"  ", LOOKED_AT_BYTES_MAX / 200_000);
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert!(error.to_string().contains("too many pieces"), "{error}");
}

#[test]
fn a_table_without_end_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut inbox = Inbox::default();
    theirs.write_all(b"[").unwrap();
    let piece = [b' '; PIECE_BYTES];
    let most = MESSAGE_BYTES_MAX / PIECE_BYTES + 1;
    let error = refused(&mut inbox, (&ours, &mut theirs), &piece[1..], most);
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert!(error.to_string().contains("more than"), "{error}");
}

/// Whoever sends on is told by its own errors that nobody listens.
#[test]
fn whoever_never_ends_is_let_go() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            assert!(theirs.write_all(b"[").is_ok());
            let kilobyte = [b' '; 1024];
            while theirs.write_all(&kilobyte).is_ok() {}
        });
        let error = receive(&ours, PATIENT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        drop(ours);
    });
}
