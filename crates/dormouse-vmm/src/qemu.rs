//! QEMU, through its machine protocol.
//!
//! A save is a migration into a pipe of ours: the descriptor goes to QEMU over its socket, so that
//! it needs no shell and no right to open files, in every version. What comes out is
//! [split](stream) into memory and the rest on its way to the file. A load is the same backwards.
//!
//! `x-ignore-shared` is always on, at both ends: a guest that runs on a shared memory file is then
//! not sent at all, and one whose memory is private is sent page by page and taken out by us.
//! Either way the state that is left loads into a QEMU whose memory backend has the memory.
//! (Before 8.1 QEMU left out *every* shared block, so memory has to be a file, not
//! `memory-backend-memfd`.)
//!
//! Sources: QEMU's `docs/devel/migration`, `qapi/migration.json`, `qapi/run-state.json`.

mod machine;
pub mod message;
mod qmp;
mod sink;
pub mod stream;
mod transfer;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::deadline::{Deadline, Timeouts};
use crate::error::{Answer, Error, ErrorKind, Result};
use crate::kind::{Kind, Version};
use crate::vmm::{Drive, Load, MemoryFrom, MemoryTo, PagesPassed, Quit, Saved, Status, Then, Vmm};
use qmp::Qmp;
use sink::FileSink;
use stream::{Pages, Summary};
use transfer::{Cancel, feed, pipe, take};

pub use machine::regions;

/// The state's file.
pub const STATE: &str = "stream";

/// More than any pipe gives, so that QEMU does not pace itself.
const BANDWIDTH: u64 = 10 << 30;

/// The name that QEMU knows our descriptor under.
const DESCRIPTOR: &str = "dormouse";

/// Between two looks at a migration. One of a few MiB takes some tens of milliseconds.
const POLL: Duration = Duration::from_millis(1);

/// How long a migration that was given up may take to end.
const CANCEL: Duration = Duration::from_secs(2);

/// A QEMU.
#[derive(Debug)]
pub struct Qemu {
    qmp: Qmp,
    timeouts: Timeouts,
}

/// QEMU's word for a guest that it stopped because a disk failed.
const IO_ERROR: &str = "io-error";

impl Qemu {
    pub(crate) fn greet(
        stream: UnixStream,
        timeouts: Timeouts,
        deadline: Deadline,
    ) -> Result<Qemu> {
        let qmp = Qmp::greet(stream, deadline)?;
        Kind::Qemu.check_version(qmp.version())?;
        Ok(Qemu { qmp, timeouts })
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments, Deadline::after(self.timeouts.call))
    }

    /// The id of the memory backend that is the machine's memory, its bytes, and the machine type.
    fn memory(&mut self) -> Result<(String, u64, String)> {
        let asked = |object: &str, property: &str| json!({ "path": object, "property": property });
        let backend = text(self.call("qom-get", asked("/machine", "memory-backend"))?)?;
        let machine = text(self.call("qom-get", asked("/machine", "type"))?)?;
        if backend.is_empty() {
            let context = "QEMU's memory has no backend of its own; \
                           start it with -machine …,memory-backend=ID and a memory-backend-file";
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        // An id, or since QEMU 6 the path of the object.
        let id = backend.strip_prefix("/objects/").unwrap_or(&backend).to_owned();
        let size = self.call("qom-get", asked(&format!("/objects/{id}"), "size"))?;
        let bytes = size.as_u64().ok_or_else(|| odd("qom-get", &size))?;
        Ok((id, bytes, machine))
    }

    /// Whether the file behind memory is the guest's memory.
    fn is_shared(&mut self, memory_id: &str) -> Result<bool> {
        let share = json!({ "path": format!("/objects/{memory_id}"), "property": "share" });
        let answer = self.call("qom-get", share)?;
        answer.as_bool().ok_or_else(|| odd("qom-get", &answer))
    }

    /// What the guest does, and QEMU's word for it.
    fn status_and_word(&mut self) -> Result<(Status, String)> {
        let answer = self.call("query-status", Value::Null)?;
        let word = answer["status"].as_str().ok_or_else(|| odd("query-status", &answer))?;
        let status = match word {
            "running" => Status::Running,
            "inmigrate" => Status::Loading,
            // One that waits for its disk to work again tries what failed once more when it goes on.
            "paused" | "prelaunch" | "postmigrate" | "finish-migrate" | "save-vm"
            | "restore-vm" | "debug" | "suspended" | "watchdog" | "colo" | IO_ERROR => {
                Status::Paused
            }
            // shutdown, guest-panicked, internal-error
            other => Status::Stopped(other.to_owned()),
        };
        Ok((status, word.to_owned()))
    }

    fn prepare_migration(&mut self) -> Result<()> {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.call("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
        self.call("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH }))?;
        Ok(())
    }

    /// Polls a migration until it is over. A failed one is an error with QEMU's words.
    fn wait_migration(&mut self, what: &str, deadline: Deadline) -> Result<()> {
        loop {
            let left = deadline.left(what)?.min(self.timeouts.call);
            let answer = self.qmp.execute("query-migrate", Value::Null, Deadline::after(left))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let words = answer["error-desc"].as_str().unwrap_or(
                        "it failed and did not say why; a disk that cannot be flushed does that",
                    );
                    return Err(Error::refused(Answer::new(what, None, words)));
                }
                _ => sleep(POLL),
            }
        }
    }

    /// Whether a migration is under way, begun by whomever.
    fn is_migrating(&mut self) -> Result<bool> {
        let answer = self.call("query-migrate", Value::Null)?;
        // Before the first one there is no status.
        let over = [None, Some("none"), Some("completed"), Some("failed"), Some("cancelled")];
        Ok(!over.contains(&answer["status"].as_str()))
    }

    /// Gives a migration up, so that the guest may go on.
    fn cancel_migration(&mut self) {
        let deadline = Deadline::after(CANCEL);
        let cancelled = self.qmp.execute("migrate_cancel", Value::Null, deadline).and_then(|_| {
            match self.wait_migration("migrate_cancel", deadline) {
                Err(error) if error.kind() == ErrorKind::Refused => Ok(()),
                over => over,
            }
        });
        if let Err(error) = cancelled {
            tracing::warn!(%error, "QEMU's migration could not be cancelled");
        }
    }

    /// Migrates into a file, with memory going where it is to go.
    fn save_stream(&mut self, path: &Path, memory_id: &str, pages: Pages<'_>) -> Result<Summary> {
        let file = File::options().write(true).create_new(true).open(path);
        let mut file =
            file.map_err(|error| Error::file(format!("cannot make {}", path.display()), error))?;
        let deadline = Deadline::after(self.timeouts.save);
        let (ours, theirs) = pipe()?;
        let cancel = Cancel::default();
        let (migrated, taken) = std::thread::scope(|scope| {
            let taking = scope.spawn(|| {
                let mut from = take(ours, &cancel);
                let split = stream::split(&mut from, &mut file, memory_id, pages);
                // Nobody reads any more: QEMU's next write fails, and its migration with it.
                drop(from);
                split
            });
            let migrated = self.migrate_into(theirs, deadline);
            if migrated.is_err() {
                cancel.now();
            }
            let taken = taking.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Io, "the thread that takes QEMU's stream panicked"))
            });
            (migrated, taken)
        });
        // What went wrong on our side is the cause of what QEMU says.
        let summary = match (taken, migrated) {
            (Ok(summary), Ok(())) => Ok(summary),
            (Ok(_), Err(error)) => Err(error),
            (Err(ours), Ok(())) => Err(ours),
            (Err(ours), Err(theirs)) => match ours.kind() {
                ErrorKind::Gone | ErrorKind::Timeout | ErrorKind::InvalidFile => Err(theirs),
                _ => Err(ours),
            },
        };
        summary.inspect_err(|_| {
            self.cancel_migration();
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "cannot remove half a state");
            }
        })
    }

    fn migrate_into(&mut self, pipe: std::os::fd::OwnedFd, deadline: Deadline) -> Result<()> {
        self.give(pipe)?;
        self.call("migrate", json!({ "uri": format!("fd:{DESCRIPTOR}") }))?;
        self.wait_migration("migrate", deadline)
    }

    /// Hands a descriptor over, and keeps none.
    fn give(&mut self, descriptor: std::os::fd::OwnedFd) -> Result<()> {
        use std::os::fd::AsFd;
        let deadline = Deadline::after(self.timeouts.call);
        let name = json!({ "fdname": DESCRIPTOR });
        self.qmp.execute_with("getfd", name, &[descriptor.as_fd()], deadline)?;
        Ok(())
    }
}

impl Vmm for Qemu {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn version(&self) -> Version {
        self.qmp.version()
    }

    fn status(&mut self) -> Result<Status> {
        Ok(self.status_and_word()?.0)
    }

    fn pause(&mut self) -> Result<()> {
        match self.status_and_word()? {
            (Status::Running, _) => {}
            // What failed has to be on its disks first: it is tried once more.
            (_, word) if word == IO_ERROR => self.resume()?,
            (Status::Paused, _) => return Ok(()),
            (other, _) => return Err(cannot("pause", &other)),
        }
        self.qmp.forget_events();
        self.call("stop", Value::Null)?;
        // One whose disk fails again had stopped before.
        if self.status_and_word()?.1 == IO_ERROR {
            let context = "QEMU stopped the guest because one of its disks fails, as one does that has \
                           no room; it goes on when that works again and the next sleep is asked for";
            return Err(Error::new(ErrorKind::Refused, context));
        }
        // It has stopped when it says so, at the latest; its CPUs and its disks' requests.
        self.qmp.wait_event("STOP", Deadline::after(self.timeouts.call))?;
        Ok(())
    }

    fn save(&mut self, folder: &Path, memory: MemoryTo<'_>) -> Result<Saved> {
        let (status, word) = self.status_and_word()?;
        match status {
            Status::Paused if word == "postmigrate" => {
                let context = "QEMU was saved since the guest was paused, and saves once; \
                               resume and pause it first";
                return Err(Error::new(ErrorKind::Refused, context));
            }
            Status::Paused => {}
            other => return Err(cannot("save", &other)),
        }
        let (memory_id, memory_bytes, machine) = self.memory()?;
        let is_shared = self.is_shared(&memory_id)?;
        match (&memory, is_shared) {
            (MemoryTo::Diff(_), _) => {
                let context = "QEMU has no diffs of memory; \
                               take what changed out of its page tables";
                return Err(Error::new(ErrorKind::Incompatible, context));
            }
            (MemoryTo::Shared, false) => {
                let context = "the guest's memory is private to QEMU (share=off), \
                               so its file is not the guest's memory; take the pages instead";
                return Err(Error::new(ErrorKind::Incompatible, context));
            }
            (MemoryTo::Shared, true) | (_, false) => {}
            (_, true) => {
                let context = "the guest runs on a shared memory file, which QEMU leaves out; \
                               take the file";
                return Err(Error::new(ErrorKind::Incompatible, context));
            }
        }
        self.prepare_migration()?;
        let path = folder.join(STATE);
        let started = Instant::now();
        let mut memory_file = None;
        let summary = match memory {
            MemoryTo::Inside => self.save_stream(&path, &memory_id, Pages::Keep)?,
            MemoryTo::Pages(sink) => self.save_stream(&path, &memory_id, Pages::Take(sink))?,
            MemoryTo::Shared | MemoryTo::Dropped | MemoryTo::Diff(_) => {
                self.save_stream(&path, &memory_id, Pages::Drop)?
            }
            MemoryTo::File(file) | MemoryTo::DiscardFile(file) => {
                let mut sink = FileSink::create(file, memory_bytes)?;
                memory_file = Some(file.to_owned());
                self.save_stream(&path, &memory_id, Pages::Take(&mut sink))?
            }
        };
        let vmm_time = started.elapsed();
        check_pages(&summary, is_shared).inspect_err(|_| {
            // A state without its memory must not be taken for one.
            drop(std::fs::remove_file(&path));
        })?;
        Ok(Saved {
            files: vec![STATE.to_owned()],
            memory_file,
            memory: regions(&memory_id, &machine, memory_bytes),
            vmm_time,
            pages: Some(summary.pages),
        })
    }

    fn resume(&mut self) -> Result<()> {
        match self.status()? {
            Status::Paused => {}
            Status::Running => return Ok(()),
            other => return Err(cannot("resume", &other)),
        }
        // Whoever began a save may be gone: what it began ends first, or QEMU refuses to go on.
        if self.is_migrating()? {
            self.cancel_migration();
        }
        let deadline = Deadline::after(self.timeouts.call);
        loop {
            match self.call("cont", Value::Null) {
                // A migration that ends just now.
                Err(error) if error.kind() == ErrorKind::Refused && !deadline.has_passed() => {
                    sleep(POLL);
                }
                answered => {
                    answered?;
                    break;
                }
            }
        }
        match self.status_and_word()? {
            (Status::Running, _) => Ok(()),
            // It went on, and its disk fails still.
            (_, word) if word == IO_ERROR => Ok(()),
            (other, _) => Err(cannot("resume", &other)),
        }
    }

    fn load(&mut self, load: &Load<'_>) -> Result<()> {
        if load.memory != MemoryFrom::AtStart {
            let context = "QEMU is given its memory when it starts, not when it loads";
            return Err(Error::new(ErrorKind::InvalidInput, context));
        }
        match self.status()? {
            Status::Loading => {}
            other => return Err(cannot("load", &other)),
        }
        let path = load.folder.join(STATE);
        let mut file = File::open(&path)
            .map_err(|error| Error::file(format!("no state {}", path.display()), error))?;
        // QEMU waits for ever for the first byte of a stream that has none.
        stream::check_head(&mut file, &path)?;
        self.prepare_migration()?;
        let deadline = Deadline::after(self.timeouts.load);
        let (theirs, ours) = pipe()?;
        let cancel = Cancel::default();
        let (loaded, fed) = std::thread::scope(|scope| {
            let feeding = scope.spawn(|| {
                let mut to = feed(ours, &cancel);
                io::copy(&mut file, &mut to).and_then(|_| to.flush())
            });
            let loaded = self
                .give(theirs)
                .and_then(|()| {
                    self.call("migrate-incoming", json!({ "uri": format!("fd:{DESCRIPTOR}") }))
                })
                .and_then(|_| self.wait_migration("migrate-incoming", deadline));
            if loaded.is_err() {
                cancel.now();
            }
            (loaded, feeding.join())
        });
        loaded?;
        match fed {
            Ok(Ok(())) => {}
            // It has what it wanted: what it did not read is the description of devices.
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(error)) => {
                return Err(Error::file(format!("cannot read {}", path.display()), error));
            }
            Err(_) => return Err(Error::new(ErrorKind::Io, "the thread that feeds QEMU panicked")),
        }
        match load.then {
            Then::Resume => self.resume(),
            Then::StayPaused => match self.status()? {
                Status::Paused => Ok(()),
                other => {
                    let context = format!(
                        "QEMU is {other:?} after its load, expected paused; start it with -S"
                    );
                    Err(Error::new(ErrorKind::Incompatible, context))
                }
            },
        }
    }

    fn set_drive(&mut self, drive: &Drive) -> Result<()> {
        let context = format!("QEMU is given disk {} when it starts", drive.id);
        Err(Error::new(ErrorKind::Incompatible, context))
    }

    fn quit(&mut self) -> Result<Quit> {
        match self.call("quit", Value::Null) {
            Ok(_) => Ok(Quit::Ends),
            // It may close its socket before its answer is out.
            Err(error) if error.kind() == ErrorKind::Gone => Ok(Quit::Ends),
            Err(error) => Err(error),
        }
    }
}

/// Refuses a state whose memory is not where it was to be.
fn check_pages(summary: &Summary, is_shared: bool) -> Result<()> {
    let PagesPassed { total, .. } = summary.pages;
    let passed = summary.distinct_pages;
    let expected = if is_shared { 0 } else { total };
    if passed == expected {
        return Ok(());
    }
    let context =
        format!("{passed} of the {total} pages of memory came out of QEMU, expected {expected}");
    Err(Error::new(ErrorKind::Protocol, context))
}

fn cannot(what: &str, status: &Status) -> Error {
    let context = match status {
        Status::Running => format!("cannot {what} a guest that runs; pause it first"),
        Status::Loading => format!("cannot {what} a QEMU that waits for a state to load"),
        Status::Stopped(why) => format!("cannot {what}: QEMU says the guest is in {why}"),
        Status::NotStarted | Status::Paused => format!("cannot {what} a QEMU that is {status:?}"),
    };
    Error::new(ErrorKind::Refused, context)
}

fn text(value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(odd("qom-get", &other)),
    }
}

fn odd(command: &str, value: &Value) -> Error {
    let text = value.to_string();
    let answer = Answer::new(command, None, &text);
    let context = format!("QEMU's answer to {command} is {}", answer.body);
    Error::new(ErrorKind::Protocol, context).with_answer(answer)
}
