//! Real QEMU under TCG, with a guest that counts and checks its memory.

mod machine;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use dormouse_vmm::error::ErrorKind;
use dormouse_vmm::launch::Sharing;
use dormouse_vmm::vmm::{MemoryRegion, MemoryTo, PAGE_BYTES, PageSink, Quit, Status, Vmm};
use machine::{MEMORY_BYTES, Machine, Running, count};

/// Pages as they passed, and how often.
#[derive(Debug, Default)]
struct Taken {
    pages: BTreeMap<u64, Option<Box<[u8; PAGE_BYTES]>>>,
}

impl PageSink for Taken {
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_BYTES]) -> std::io::Result<()> {
        self.pages.insert(offset, Some(Box::new(*bytes)));
        Ok(())
    }

    fn zero(&mut self, offset: u64) -> std::io::Result<()> {
        self.pages.insert(offset, None);
        Ok(())
    }
}

impl Taken {
    fn write(&self, path: &Path) {
        use std::os::unix::fs::FileExt;
        let file = File::create(path).unwrap();
        file.set_len(MEMORY_BYTES).unwrap();
        for (offset, page) in &self.pages {
            if let Some(page) = page {
                file.write_all_at(&page[..], *offset).unwrap();
            }
        }
    }
}

/// The sleep that the issue tells of as the one that goes wrong: a guest that woke on private
/// memory sleeps again, so its pages are in the stream; several generations, on each machine.
#[test]
fn a_guest_on_private_memory_sleeps_and_wakes_again() {
    for machine in ["q35", "pc", "microvm"] {
        let folder = tempfile::tempdir().unwrap();
        let guest = Machine { machine, folder: folder.path() };
        let mut running = guest.boot(Sharing::Shared);
        let mut counted = count(&running, 0);
        let (mut memory, mut state) = (guest.path("memory-0"), guest.state("state-0"));
        running.vmm.pause().unwrap();
        let saved = running.vmm.save(&state, MemoryTo::Shared).unwrap();
        let passed = saved.pages.unwrap();
        assert_eq!((passed.data, passed.zero), (0, 0), "{machine}");
        assert_eq!(passed.total, MEMORY_BYTES / PAGE_BYTES as u64);
        let region = MemoryRegion {
            block: "dormouse-memory".to_owned(),
            image_offset: 0,
            guest_address: Some(0),
            length: MEMORY_BYTES,
        };
        assert_eq!(saved.memory, [region]);
        saved.sync(&state).unwrap();
        drop(running);

        for generation in 1..=4 {
            let before = fs::read(&memory).unwrap();
            let mut running = guest.wake(&memory, Sharing::Private, &state);
            counted = count(&running, counted);
            running.vmm.pause().unwrap();
            let next_state = guest.state(&format!("state-{generation}"));
            let next_memory = guest.path(&format!("memory-{generation}"));
            let mut taken = Taken::default();
            let saved = running.vmm.save(&next_state, MemoryTo::Pages(&mut taken)).unwrap();
            assert_eq!(taken.pages.len() as u64, MEMORY_BYTES / PAGE_BYTES as u64);
            let bytes = fs::metadata(next_state.join(&saved.files[0])).unwrap().len();
            assert!(bytes < 2 << 20, "{bytes} bytes of state without memory");
            assert!(saved.pages.unwrap().zero > 0);
            taken.write(&next_memory);
            assert_eq!(fs::read(&memory).unwrap(), before, "a private file stays as it is");
            // The first one goes on as if nothing had been.
            running.vmm.resume().unwrap();
            counted = count(&running, counted).max(counted);
            drop(running);
            (memory, state) = (next_memory, next_state);
        }
        assert!(counted > 64, "{machine}");
    }
}

#[test]
fn memory_goes_to_a_file_or_stays_in_the_state() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot(Sharing::Private);
    let counted = count(&running, 0);
    running.vmm.pause().unwrap();
    let [to_file, inside] = ["file", "inside"].map(|name| guest.state(name));
    let memory = guest.path("dump");
    let saved = running.vmm.save(&to_file, MemoryTo::File(&memory)).unwrap();
    assert_eq!(saved.memory_file.as_deref(), Some(memory.as_path()));
    assert_eq!(fs::metadata(&memory).unwrap().len(), MEMORY_BYTES);
    // It saves once.
    assert_eq!(refusal(&mut running.vmm, &inside, MemoryTo::Inside), ErrorKind::Refused);
    running.vmm.resume().unwrap();
    running.vmm.pause().unwrap();
    running.vmm.save(&inside, MemoryTo::Inside).unwrap();
    let bytes = |folder: &Path| fs::metadata(folder.join("stream")).unwrap().len();
    assert!(bytes(&inside) > bytes(&to_file) + (1 << 20));
    drop(running);
    count(&guest.wake(&memory, Sharing::Private, &to_file), counted);
    // All of it is in the state: the file that memory starts with does not matter.
    let empty = guest.path("empty");
    File::create(&empty).unwrap().set_len(MEMORY_BYTES).unwrap();
    count(&guest.wake(&empty, Sharing::Private, &inside), counted);
}

/// Memory that is dropped from the stream is that of the process, where others take it.
#[test]
fn dropped_memory_is_in_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot(Sharing::Private);
    let counted = count(&running, 0);
    running.vmm.pause().unwrap();
    let state = guest.state("dropped");
    let saved = running.vmm.save(&state, MemoryTo::Dropped).unwrap();
    assert!(saved.pages.unwrap().data > 0);
    let memory = guest.path("dump");
    fs::write(&memory, running.memory(&guest.path("memory-0"))).unwrap();
    drop(running);
    count(&guest.wake(&memory, Sharing::Private, &state), counted);
}

#[test]
fn what_cannot_be_is_refused_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot(Sharing::Shared);
    let counted = count(&running, 0);
    let state = guest.state("state");
    let vmm = &mut running.vmm;
    assert_eq!(vmm.status().unwrap(), Status::Running);
    assert_eq!(refusal(vmm, &state, MemoryTo::Shared), ErrorKind::Refused, "it runs");
    vmm.pause().unwrap();
    vmm.pause().unwrap();
    assert_eq!(vmm.status().unwrap(), Status::Paused);
    // Pages of shared memory are not in the stream, and must not be missed silently.
    assert_eq!(refusal(vmm, &state, MemoryTo::Dropped), ErrorKind::Incompatible);
    let mut taken = Taken::default();
    assert_eq!(refusal(vmm, &state, MemoryTo::Pages(&mut taken)), ErrorKind::Incompatible);
    assert_eq!(refusal(vmm, &state, MemoryTo::Diff(Path::new("/none"))), ErrorKind::Incompatible);
    vmm.resume().unwrap();
    vmm.resume().unwrap();
    count(&running, counted);
    assert_eq!(running.vmm.quit().unwrap(), Quit::Ends);
    running.wait();
    assert_eq!(running.vmm.status().unwrap_err().kind(), ErrorKind::Gone);
}

/// The kind of a save's failure, which leaves nothing.
fn refusal(vmm: &mut Box<dyn Vmm>, folder: &Path, memory: MemoryTo<'_>) -> ErrorKind {
    let error = vmm.save(folder, memory).unwrap_err();
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "nothing is left of {error}");
    error.kind()
}

/// A sink that is full fails the save, names itself, and leaves a guest that goes on and sleeps.
#[test]
fn a_sink_that_fails_fails_the_save_alone() {
    #[derive(Debug)]
    struct Full(u64);
    impl PageSink for Full {
        fn page(&mut self, _: u64, _: &[u8; PAGE_BYTES]) -> std::io::Result<()> {
            self.0 += 1;
            if self.0 > 100 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
        fn zero(&mut self, _: u64) -> std::io::Result<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot(Sharing::Private);
    let counted = count(&running, 0);
    let state = guest.state("state");
    running.vmm.pause().unwrap();
    let mut full = Full(0);
    let error = running.vmm.save(&state, MemoryTo::Pages(&mut full)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Sink, "{error}");
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    running.vmm.resume().unwrap();
    let counted = count(&running, counted);
    running.vmm.pause().unwrap();
    let mut taken = Taken::default();
    running.vmm.save(&state, MemoryTo::Pages(&mut taken)).unwrap();
    drop(running);
    taken.write(&guest.path("dump"));
    let running: Running = guest.wake(&guest.path("dump"), Sharing::Private, &state);
    count(&running, counted);
}

/// A QEMU that hangs in the middle of a save does not hang us, and goes on when it does.
#[test]
fn a_qemu_that_hangs_is_given_up_and_one_that_is_killed_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot_within(Sharing::Private, machine::SHORT);
    let counted = count(&running, 0);
    let state = guest.state("state");
    running.vmm.pause().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(running.pid()).unwrap()).unwrap();
    #[derive(Debug)]
    struct Stop(rustix::process::Pid, u32, rustix::process::Signal);
    impl PageSink for Stop {
        fn page(&mut self, _: u64, _: &[u8; PAGE_BYTES]) -> std::io::Result<()> {
            self.1 += 1;
            if self.1 == 50 {
                rustix::process::kill_process(self.0, self.2)?;
            }
            Ok(())
        }
        fn zero(&mut self, _: u64) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut hangs = Stop(pid, 0, rustix::process::Signal::STOP);
    let started = std::time::Instant::now();
    let error = running.vmm.save(&state, MemoryTo::Pages(&mut hangs)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    // What was cancelled is over soon; until then QEMU does not go on.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while let Err(error) = running.vmm.resume() {
        assert!(std::time::Instant::now() < deadline, "{error}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let counted = count(&running, counted);
    running.vmm.pause().unwrap();
    let mut taken = Taken::default();
    running.vmm.save(&state, MemoryTo::Pages(&mut taken)).unwrap();
    taken.write(&guest.path("dump"));
    count(&guest.wake(&guest.path("dump"), Sharing::Private, &state), counted);

    running.vmm.resume().unwrap();
    running.vmm.pause().unwrap();
    let mut dies = Stop(pid, 0, rustix::process::Signal::KILL);
    let error = running.vmm.save(&guest.state("next"), MemoryTo::Pages(&mut dies)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}

/// A state that QEMU does not load is an error in time, whatever QEMU makes of it: it ends.
#[test]
fn a_damaged_state_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Machine { machine: "q35", folder: folder.path() };
    let mut running = guest.boot(Sharing::Shared);
    count(&running, 0);
    running.vmm.pause().unwrap();
    let state = guest.state("state");
    running.vmm.save(&state, MemoryTo::Shared).unwrap();
    drop(running);
    let bytes = fs::read(state.join("stream")).unwrap();
    for (number, damaged) in
        [&bytes[..bytes.len() / 2], &bytes[..9], b"nothing of QEMU's", &[]].into_iter().enumerate()
    {
        let folder = guest.state(&format!("damaged-{number}"));
        fs::write(folder.join("stream"), damaged).unwrap();
        let mut running = guest.ready(&guest.path("memory-0"), Sharing::Private);
        let error = running.vmm.load(&guest.load(&folder)).unwrap_err();
        let is_its_kind = match number {
            0 | 1 => matches!(error.kind(), ErrorKind::Gone | ErrorKind::Refused),
            _ => error.kind() == ErrorKind::InvalidFile,
        };
        assert!(is_its_kind, "{number}: {error}");
    }
    let mut running = guest.ready(&guest.path("memory-0"), Sharing::Private);
    let error = running.vmm.load(&guest.load(&guest.state("none"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    running.vmm.load(&guest.load(&state)).unwrap();
}
