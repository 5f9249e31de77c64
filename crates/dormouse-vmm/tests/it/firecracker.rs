//! Firecracker's driver against doubles of its versions, whose guests do real memory work.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use dormouse_testkit::double::{Action, Program, Rule};
use dormouse_vmm::error::ErrorKind;
use dormouse_vmm::kind::Kind;
use dormouse_vmm::vmm::{
    Clock, Drive, Load, MemoryFrom, MemoryTo, Network, Quit, Status, Then, TrackDirty,
};

use crate::process::{Host, MIB, Running, load};

fn rule(call: &str, action: Action) -> Rule {
    Rule { call: call.to_owned(), skip: 0, times: None, action }
}

/// Lays a diff over its base: a hole keeps what was.
fn lay(diff: &Path, base: &Path) {
    let (from, to) =
        (fs::File::open(diff).unwrap(), fs::File::options().write(true).open(base).unwrap());
    for extent in dormouse_sys::sparse::data_extents(&from, 0..from.metadata().unwrap().len()) {
        let extent = extent.unwrap();
        let mut bytes = vec![0; usize::try_from(extent.end - extent.start).unwrap()];
        from.read_exact_at(&mut bytes, extent.start).unwrap();
        to.write_all_at(&bytes, extent.start).unwrap();
    }
}

fn cannot(running: &mut Running, load: &Load<'_>) -> ErrorKind {
    running.vmm.load(load).unwrap_err().kind()
}

/// Sleeps and wakes, in the bodies of each version: full, then a diff over it, disks moved.
#[test]
fn every_version_sleeps_and_wakes() {
    for version in ["1.7.0", "1.10.1", "1.12.1", "1.13.1", "1.14.2", "1.15.0", "1.16.1"] {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker(version));
        let mut running = host.boot("one");
        assert_eq!(running.vmm.version().to_string(), version);
        running.work();
        running.vmm.pause().unwrap();
        running.vmm.pause().unwrap();
        let (state, memory) = (host.make("state"), host.path("memory"));
        let saved = running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
        assert_eq!(saved.files, ["vmstate"]);
        assert_eq!(saved.memory.iter().map(|r| r.length).sum::<u64>(), MIB << 20);
        saved.sync(&state).unwrap();
        fs::copy(host.disk("root"), host.path("root-1")).unwrap();
        // It goes on, and sleeps as a diff.
        running.vmm.resume().unwrap();
        running.work();
        running.vmm.pause().unwrap();
        let (next, diff) = (host.make("next"), host.path("diff"));
        running.vmm.save(&next, MemoryTo::Diff(&diff)).unwrap();
        fs::copy(host.disk("root"), host.path("root-2")).unwrap();
        drop(running);
        let whole = host.path("whole");
        fs::copy(&memory, &whole).unwrap();
        lay(&diff, &whole);

        for (number, (state, memory)) in
            [(&state, &memory), (&next, &whole)].into_iter().enumerate()
        {
            let name = format!("wakes-{number}");
            let mut running = host.ready(&name);
            assert_eq!(running.vmm.status().unwrap(), Status::NotStarted);
            let drives =
                [Drive { id: "root".to_owned(), path: host.path(&format!("root-{}", number + 1)) }];
            let scratch = host.make(&name);
            let load = Load {
                drives: &drives,
                track_dirty: TrackDirty::Yes,
                ..load(state, &scratch, MemoryFrom::File(memory))
            };
            running.vmm.load(&load).unwrap();
            assert_eq!(running.vmm.status().unwrap(), Status::Running);
            running.verify();
            running.work();
            running.verify();
            // And once more, as a diff of the woken one.
            running.vmm.pause().unwrap();
            let again = host.make(&format!("again-{number}"));
            running
                .vmm
                .save(&again, MemoryTo::Diff(&host.path(&format!("diff-{number}"))))
                .unwrap();
            assert_eq!(running.vmm.quit().unwrap(), Quit::Kill);
        }
    }
}

/// What a version does not have is refused before anything is asked of it.
#[test]
fn what_a_version_lacks_is_refused_and_what_it_has_is_passed_through() {
    let folder = tempfile::tempdir().unwrap();
    for version in ["1.7.0", "1.12.0", "1.16.0"] {
        let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker(version));
        let name = format!("boot-{version}");
        let mut running = host.boot(&name);
        running.work();
        running.vmm.pause().unwrap();
        let (state, memory) = (host.make(&format!("state-{version}")), host.path("memory"));
        running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
        let error = running.vmm.save(&state, MemoryTo::File(&memory)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "the state is there: {error}");
        drop(running);
        let name = format!("wake-{version}");
        let mut running = host.ready(&name);
        let scratch = host.make(&name);
        let networks = [Network { id: "net0".to_owned(), host_device: "tap7".to_owned() }];
        let plain = load(&state, &scratch, MemoryFrom::File(&memory));
        let network = Load { networks: &networks, ..plain.clone() };
        let all = Load {
            vsock: Some(Path::new("/other.sock")),
            clock: Clock::Advance,
            then: Then::StayPaused,
            ..network.clone()
        };
        match version {
            "1.7.0" => {
                assert_eq!(cannot(&mut running, &network), ErrorKind::Incompatible);
                running.vmm.load(&plain).unwrap();
            }
            "1.12.0" => {
                assert_eq!(cannot(&mut running, &all), ErrorKind::Incompatible);
                running.vmm.load(&network).unwrap();
            }
            _ => {
                running.vmm.load(&all).unwrap();
                assert_eq!(running.vmm.status().unwrap(), Status::Paused);
                running.vmm.resume().unwrap();
            }
        }
        running.work();
    }
}

/// A handler that never answers: pages are asked for before the load call returns, so it does not.
#[test]
fn faults_come_before_a_load_returns() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker("1.13.1"));
    let mut running = host.boot("one");
    running.work();
    running.vmm.pause().unwrap();
    let (state, memory) = (host.make("state"), host.path("memory"));
    running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
    drop(running);
    let socket = host.path("uffd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let timeouts = dormouse_vmm::deadline::Timeouts {
        load: std::time::Duration::from_millis(500),
        ..dormouse_vmm::deadline::Timeouts::STANDARD
    };
    let mut running = host.start("two", timeouts, true);
    let scratch = host.make("two");
    let load = load(&state, &scratch, MemoryFrom::Uffd(&socket));
    let error = running.vmm.load(&load).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    // The handshake did come.
    let (stream, _) = listener.accept().unwrap();
    let (mut table, mut descriptors) = (vec![0; 4096], Vec::new());
    let count = dormouse_sys::passing::receive(&stream, &mut table, &mut descriptors).unwrap();
    assert_eq!(descriptors.len(), 1);
    let table: serde_json::Value = serde_json::from_slice(&table[..count]).unwrap();
    assert_eq!(table[0]["size"], MIB << 20);
    assert_eq!(table[0]["page_size"], 4096);
}

/// States of another format, torn ones, and memory that is too short.
#[test]
fn what_cannot_be_loaded_is_refused_before_the_process_is_spoilt() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker("1.12.1"));
    let mut running = host.boot("one");
    running.vmm.pause().unwrap();
    let (state, memory) = (host.make("state"), host.path("memory"));
    running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
    drop(running);
    let newer = tempfile::tempdir().unwrap();
    let later = Host::new(newer.path(), Kind::Firecracker, &Program::firecracker("1.13.0"));
    let mut running = later.ready("other");
    let scratch = later.make("other");
    let plain = load(&state, &scratch, MemoryFrom::File(&memory));
    assert_eq!(cannot(&mut running, &plain), ErrorKind::Incompatible);
    assert_eq!(running.vmm.status().unwrap(), Status::NotStarted, "nothing was asked");

    let torn = host.make("torn");
    let bytes = fs::read(state.join("vmstate")).unwrap();
    fs::write(torn.join("vmstate"), &bytes[..bytes.len() - 3]).unwrap();
    let mut running = host.ready("two");
    assert_eq!(
        cannot(&mut running, &load(&torn, &scratch, MemoryFrom::File(&memory))),
        ErrorKind::InvalidFile
    );
    assert_eq!(running.vmm.status().unwrap(), Status::NotStarted);
    fs::File::options().write(true).open(&memory).unwrap().set_len(1 << 20).unwrap();
    let error = running.vmm.load(&load(&state, &scratch, MemoryFrom::File(&memory))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let answer = error.answer().unwrap();
    assert_eq!((answer.status, answer.call.as_str()), (Some(400), "PUT /snapshot/load"));
    assert!(answer.body.contains("OffsetTooLarge"), "{}", answer.body);
    assert!(!running.wait().success(), "a failed load ends the process");
    assert_eq!(running.vmm.status().unwrap_err().kind(), ErrorKind::Gone);
}

/// 1.14.0 and 1.14.1 write diffs of several regions at wrong offsets (#5705): the double does, so
/// the refusal is for a reason.
#[test]
fn broken_diffs_are_refused_and_are_broken() {
    // Where the guest happened to write the last pages of its first region all is where it belongs.
    assert!((0..20).any(|_| is_a_broken_diff_wrong()), "no diff was wrong");
}

fn is_a_broken_diff_wrong() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let broken = Program::firecracker("1.14.1").regions_mib("8,8");
    let host = Host::new(folder.path(), Kind::Firecracker, &broken);
    let mut running = host.boot("one");
    running.vmm.pause().unwrap();
    let (state, memory) = (host.make("state"), host.path("memory"));
    running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
    running.vmm.resume().unwrap();
    running.work();
    running.vmm.pause().unwrap();
    let error =
        running.vmm.save(&host.make("next"), MemoryTo::Diff(&host.path("diff"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("#5705"), "{error}");
    // What it would have been, without us.
    let [next, diff] = ["next", "diff"].map(|name| host.path(name));
    let body = serde_json::json!({
        "snapshot_type": "Diff", "snapshot_path": next.join("vmstate"), "mem_file_path": diff,
    });
    let answer = running.call("PUT", "/snapshot/create", &body.to_string());
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    fs::copy(host.disk("root"), host.path("root-1")).unwrap();
    running.vmm.resume().unwrap();
    running.work();
    drop(running);
    fs::copy(host.path("root-1"), host.path("root")).unwrap();
    lay(&diff, &memory);
    let mut running = host.ready("two");
    let scratch = host.make("two");
    running.vmm.load(&load(&next, &scratch, MemoryFrom::File(&memory))).unwrap();
    let answer = running.try_call("PUT", "/double/verify", "");
    if answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 204")) {
        return false;
    }
    assert_eq!(running.wait().code(), Some(dormouse_testkit::vmm::EXIT_WRONG_BYTE));
    true
}

/// A guest that wakes with a disk that moved on is a guest that is wrong, and its double sees it.
#[test]
fn a_disk_of_another_moment_ends_the_double() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker("1.16.1"));
    let mut running = host.boot("one");
    running.work();
    running.vmm.pause().unwrap();
    let (state, memory) = (host.make("state"), host.path("memory"));
    running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
    running.vmm.resume().unwrap();
    running.work();
    drop(running);
    let mut running = host.ready("two");
    let scratch = host.make("two");
    running.vmm.load(&load(&state, &scratch, MemoryFrom::File(&memory))).unwrap();
    drop(running.try_call("PUT", "/double/verify", ""));
    assert_eq!(running.wait().code(), Some(dormouse_testkit::double::EXIT_WRONG_DISK));
}

/// Whatever goes wrong while the state is made, the guest is paused as before and goes on, and
/// nothing of the state is left; unless the VMM is gone.
#[test]
fn a_save_that_fails_leaves_the_guest_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::Firecracker, &Program::firecracker("1.13.1"));
    let mut running = host.boot("one");
    running.work();
    running.vmm.pause().unwrap();
    let (state, memory) = (host.make("state"), host.path("memory"));
    let create = "PUT /snapshot/create";
    let fault = r#"{"fault_message":"Create snapshot error: no space"}"#;
    for (action, kind) in [
        (Action::Refuse(400, fault.to_owned()), ErrorKind::Refused),
        (Action::Refuse(500, "<html>".to_owned()), ErrorKind::Refused),
        (Action::Close, ErrorKind::Gone),
        (Action::Garbage, ErrorKind::Protocol),
        (Action::CutFile("vmstate".to_owned()), ErrorKind::InvalidFile),
    ] {
        running.rules(&[rule(create, action.clone())]);
        let error = running.vmm.save(&state, MemoryTo::File(&memory)).unwrap_err();
        assert_eq!(error.kind(), kind, "{action:?}: {error}");
        assert!(!state.join("vmstate").exists(), "{action:?}");
        assert_eq!(running.vmm.status().unwrap(), Status::Paused);
    }
    running.rules(&[rule(create, Action::Slow(200)), rule("GET /", Action::Chunked)]);
    let saved = running.vmm.save(&state, MemoryTo::File(&memory)).unwrap();
    assert!(saved.vmm_time.as_millis() >= 200);
    running.rules(&[rule("GET /", Action::CutAnswer)]);
    assert_eq!(running.vmm.status().unwrap_err().kind(), ErrorKind::Gone);
    running.rules(&[]);
    running.vmm.resume().unwrap();
    running.work();
    running.vmm.pause().unwrap();
    running.rules(&[rule(create, Action::DieAfter)]);
    let error = running.vmm.save(&host.make("last"), MemoryTo::File(&memory)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}
