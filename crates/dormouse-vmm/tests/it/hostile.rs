//! VMMs that hang, at every call: each returns in its time, and says which call it was.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use dormouse_testkit::double::{Action, Program, Rule};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::error::{ErrorKind, Result};
use dormouse_vmm::kind::Kind;
use dormouse_vmm::vmm::{MemoryFrom, MemoryTo, Vmm, connect};

use crate::process::{Host, load};

const SOON: Duration = Duration::from_millis(200);
const SHORT: Timeouts = Timeouts { start: SOON, call: SOON, save: SOON, load: SOON };

fn in_time<T>(what: &str, call: impl FnOnce() -> Result<T>) {
    let started = Instant::now();
    let Err(error) = call() else { panic!("{what} returned") };
    assert_eq!(error.kind(), ErrorKind::Timeout, "{what}: {error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{what}: {:?}", started.elapsed());
}

#[test]
fn who_never_answers_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let _listener = UnixListener::bind(&path).unwrap();
    for kind in Kind::ALL {
        in_time(kind.name(), || connect(kind, &path, SHORT));
    }
}

#[test]
fn each_call_has_an_end() {
    for (kind, program, api) in [
        (Kind::Firecracker, Program::firecracker("1.13.1"), ""),
        (Kind::CloudHypervisor, Program::cloud_hypervisor("53.0"), "/api/v1"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::new(folder.path(), kind, &program);
        let mut running = host.start("one", SHORT, false);
        // What is to succeed has the time that a busy machine needs.
        let mut steady = connect(kind, &running.api, Timeouts::STANDARD).unwrap();
        steady.pause().unwrap();
        let hang = |call: &str| Rule {
            call: call.replace("API", api),
            skip: 0,
            times: None,
            action: Action::Hang,
        };
        let state = host.make("state");
        let memory = host.path("memory");
        let save = |vmm: &mut Box<dyn Vmm>| match kind {
            Kind::Firecracker => vmm.save(&state, MemoryTo::File(&memory)),
            _ => vmm.save(&state, MemoryTo::Inside),
        };
        running.rules(&[hang("GET API/")]);
        in_time("status", || running.vmm.status());
        running.rules(&[hang("PUT "), hang("PATCH ")]);
        in_time("save", || save(&mut running.vmm));
        in_time("resume", || running.vmm.resume());
        if kind == Kind::CloudHypervisor {
            in_time("quit", || running.vmm.quit());
        }
        running.rules(&[]);
        save(&mut steady).unwrap();
        steady.resume().unwrap();
        running.rules(&[hang("PUT "), hang("PATCH ")]);
        in_time("pause", || running.vmm.pause());

        let mut waiting = host.start("two", SHORT, true);
        waiting.rules(&[hang("PUT ")]);
        let scratch = host.make("two");
        let from: MemoryFrom<'_> = match kind {
            Kind::Firecracker => MemoryFrom::File(&memory),
            _ => MemoryFrom::FileCopied(Path::new(&state)),
        };
        let image = state.join("memory-ranges");
        let from = if kind == Kind::Firecracker { from } else { MemoryFrom::FileCopied(&image) };
        in_time("load", || waiting.vmm.load(&load(&state, &scratch, from)));
    }
}
