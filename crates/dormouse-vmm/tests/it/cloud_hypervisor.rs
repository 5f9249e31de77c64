//! Cloud Hypervisor's driver against doubles of its versions.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dormouse_testkit::double::{Action, Program, Rule};
use dormouse_vmm::cloud_hypervisor::CloudHypervisor;
use dormouse_vmm::cloud_hypervisor::offload::{
    Faults, Memory as RestoreFrom, MemorySource, OnDemand, Received, Restore, Serve, Source,
};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::error::{ErrorKind, Result};
use dormouse_vmm::kind::Kind;
use dormouse_vmm::vmm::{Drive, Load, MemoryFrom, MemoryTo, Network, Quit, Status, Then};

use crate::process::{Host, MIB, Running, load};

#[test]
fn every_version_sleeps_and_wakes() {
    for version in ["48.0", "51.1", "52.0", "53.0"] {
        let folder = tempfile::tempdir().unwrap();
        let program = Program::cloud_hypervisor(version).regions_mib("10,6");
        let host = Host::new(folder.path(), Kind::CloudHypervisor, &program);
        let mut running = host.boot("one");
        running.work();
        let state = host.make("state");
        let error = running.vmm.save(&state, MemoryTo::Inside).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "it runs");
        running.vmm.pause().unwrap();
        running.vmm.pause().unwrap();
        let saved = running.vmm.save(&state, MemoryTo::Inside).unwrap();
        assert_eq!(saved.files, ["config.json", "state.json"]);
        let places: Vec<_> =
            saved.memory.iter().map(|r| (r.image_offset, r.guest_address, r.length)).collect();
        assert_eq!(places, [(0, Some(4 << 30), 6 << 20), (6 << 20, Some(0), 10 << 20)]);
        saved.sync(&state).unwrap();
        let error = running.vmm.save(&state, MemoryTo::Inside).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "its files are there");
        fs::copy(host.disk("root"), host.path("root-1")).unwrap();
        // The first one goes on, and does not disturb the second.
        running.vmm.resume().unwrap();
        running.work();

        let mut woken = host.ready("two");
        assert_eq!(woken.vmm.status().unwrap(), Status::NotStarted);
        let (memory, scratch) = (saved.memory_file.unwrap(), host.make("two"));
        let is_late = !version.starts_with("48") && !version.starts_with("51");
        let from = match is_late {
            true => MemoryFrom::FileOnDemand(&memory),
            false => MemoryFrom::FileCopied(&memory),
        };
        let drives = [Drive { id: "root".to_owned(), path: host.path("root-1") }];
        let networks = [Network { id: "net0".to_owned(), host_device: "tap5".to_owned() }];
        let plain = load(&state, &scratch, from);
        if !is_late {
            let lazy = Load { memory: MemoryFrom::FileOnDemand(&memory), ..plain.clone() };
            assert_eq!(woken.vmm.load(&lazy).unwrap_err().kind(), ErrorKind::Incompatible);
        }
        woken.vmm.load(&Load { drives: &drives, networks: &networks, ..plain }).unwrap();
        assert_eq!(woken.vmm.status().unwrap(), Status::Running);
        woken.verify();
        woken.work();
        woken.verify();
        let config = fs::read_to_string(scratch.join("restore/config.json")).unwrap();
        assert!(config.contains("tap5") && config.contains("root-1"), "{config}");
        woken.vmm.pause().unwrap();
        if is_late {
            // Memory may be filling still, which is refused and leaves nothing.
            let again = host.make("again");
            while let Err(error) = woken.vmm.save(&again, MemoryTo::Inside) {
                assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
                assert_eq!(fs::read_dir(&again).unwrap().count(), 0);
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        assert_eq!(woken.vmm.quit().unwrap(), Quit::Ends);
        assert!(woken.wait().success());
        assert_eq!(woken.vmm.status().unwrap_err().kind(), ErrorKind::Gone);
        running.verify();
    }
}

/// A write whose count nobody looked at leaves half a file, and a success.
#[test]
fn short_writes_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::CloudHypervisor, &Program::cloud_hypervisor("53.0"));
    let mut running = host.boot("one");
    running.work();
    running.vmm.pause().unwrap();
    let state = host.make("state");
    for file in ["config.json", "state.json", "memory-ranges"] {
        let action = Action::CutFile(file.to_owned());
        let call = "PUT /api/v1/vm.snapshot".to_owned();
        running.rules(&[Rule { call, skip: 0, times: None, action }]);
        let error = running.vmm.save(&state, MemoryTo::Inside).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{file}: {error}");
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    }
    running.rules(&[]);
    running.vmm.resume().unwrap();
    running.work();
    running.verify();
}

/// Memory as it was received, in the order of the image.
struct Memory {
    bytes: Vec<u8>,
    fails: AtomicBool,
}

impl MemorySource for Memory {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) && offset > 0 {
            return Err(io::Error::other("a pack is damaged"));
        }
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
        Ok(())
    }
}

/// What a commit keeps: configuration, state, memory.
type Kept = (Vec<u8>, Vec<u8>, Vec<u8>);

fn keep(received: &Received) -> Kept {
    let mut memory = Vec::new();
    for (slot, file) in &received.slots {
        let mut bytes = vec![0; usize::try_from(slot.size).unwrap()];
        file.read_exact_at(&mut bytes, slot.file_offset).unwrap();
        memory.extend(bytes);
    }
    (received.config.clone(), received.state.clone(), memory)
}

#[test]
fn a_snapshot_by_descriptors_is_committed_before_the_source_may_forget_it() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::cloud_hypervisor("54.0").regions_mib("10,6");
    let host = Host::new(folder.path(), Kind::CloudHypervisor, &program);
    let mut running = host.boot("one");
    running.work();
    running.vmm.pause().unwrap();
    let mut ch = CloudHypervisor::connect(&running.api, Timeouts::STANDARD).unwrap();
    let socket = host.path("offload.sock");

    // A commit that fails is told, and the guest stays.
    let error = ch
        .snapshot_by_descriptors(&socket, Source::Ends, &mut |_| Err("no space".into()))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Sink, "{error}");
    assert!(!socket.exists());
    assert_eq!(running.vmm.status().unwrap(), Status::Paused);

    let mut kept = None;
    ch.snapshot_by_descriptors(&socket, Source::Stays, &mut |received| {
        assert!(!received.was_running);
        assert_eq!(received.regions().len(), 2);
        kept = Some(keep(received));
        Ok(())
    })
    .unwrap();
    fs::copy(host.disk("root"), host.path("root-1")).unwrap();
    running.vmm.resume().unwrap();
    running.work();
    running.verify();
    running.vmm.pause().unwrap();
    ch.snapshot_by_descriptors(&socket, Source::Ends, &mut |_| Ok(())).unwrap();
    assert!(running.wait().success(), "it ends when it was told");

    let (config, state, memory) = kept.unwrap();
    assert_eq!(memory.len() as u64, MIB << 20);
    let memory = Arc::new(Memory { bytes: memory, fails: AtomicBool::new(false) });
    let ways = [None, Some(OnDemand::Shared), Some(OnDemand::Private)];
    for (number, on_demand) in ways.into_iter().enumerate() {
        fs::copy(host.path("root-1"), host.path("root")).unwrap();
        let running = host.ready(&format!("wakes-{number}"));
        let (restored, faults) = restore(&running, &socket, (&config, &state, &memory), on_demand);
        restored.unwrap();
        assert_eq!(faults.is_some(), on_demand.is_some());
        running.work();
        running.verify();
        if let Some(faults) = faults {
            // It closed the connection when it had all pages.
            assert!(faults.wait().unwrap() >= MIB << 8);
        }
        running.verify();
    }

    // A page that cannot be read is never zeros: the restore fails, or whoever serves it says so and the
    // guest ends.
    memory.fails.store(true, Ordering::Relaxed);
    for on_demand in ways {
        let mut running = host.ready(&format!("fails-{on_demand:?}"));
        let (restored, faults) = restore(&running, &socket, (&config, &state, &memory), on_demand);
        match faults {
            None => assert_eq!(restored.unwrap_err().kind(), ErrorKind::Sink),
            Some(faults) => {
                assert_eq!(faults.wait().unwrap_err().kind(), ErrorKind::Sink);
                assert!(!running.wait().success());
            }
        }
        drop(running);
        drop(fs::remove_file(&socket));
    }
}

/// Restores what was kept, and tells how that went, and who serves its pages.
fn restore(
    running: &Running,
    socket: &Path,
    (config, state, memory): (&[u8], &[u8], &Arc<Memory>),
    on_demand: Option<OnDemand>,
) -> (Result<()>, Option<Faults>) {
    let mut ch = CloudHypervisor::connect(&running.api, Timeouts::STANDARD).unwrap();
    let mut faults = None;
    let serve: &mut Serve<'_> = &mut |requests| {
        let source = Arc::clone(memory) as Arc<dyn MemorySource>;
        faults = Some(requests.serve_on_thread(source)?);
        Ok(())
    };
    let memory = match on_demand {
        None => RestoreFrom::Copied(&**memory),
        Some(how) => RestoreFrom::OnDemand(how, serve),
    };
    let then = Then::Resume;
    let restored = ch.restore_by_descriptors(socket, Restore { config, state, memory, then });
    (restored, faults)
}

#[test]
fn offload_is_refused_where_it_would_lose_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path(), Kind::CloudHypervisor, &Program::cloud_hypervisor("52.0"));
    let mut running = host.boot("one");
    running.vmm.pause().unwrap();
    let socket = host.path("offload.sock");
    let mut ch = CloudHypervisor::connect(&running.api, Timeouts::STANDARD).unwrap();
    let mut never = |_: &Received| panic!("nothing is to be committed");
    let error = ch.snapshot_by_descriptors(&socket, Source::Ends, &mut never).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    let host = Host::new(folder.path(), Kind::CloudHypervisor, &Program::cloud_hypervisor("53.0"));
    let mut running = host.boot("two");
    running.vmm.pause().unwrap();
    let mut ch = CloudHypervisor::connect(&running.api, Timeouts::STANDARD).unwrap();
    let error = ch.snapshot_by_descriptors(&socket, Source::Stays, &mut never).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "53.0 would end without a word");
    assert_eq!(running.vmm.status().unwrap(), Status::Paused);
}
