//! What a crash left is brought to rest, by whoever has the VM's lock next.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_store::name::{Name, SnapRef};
use dormouse_store::store::Store;
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::vmm::connect;

use super::lock::VmLock;
use super::phase::{Phase, Repair, Seen, Sleep};
use super::plane::Plane;
use super::process::end_all_that_write_to;
use super::record::{Record, is_unsettled, settled};
use super::sleep::{ATTEMPT_LABEL, capture};
use super::{House, api_of, log_of, remove_vm};
use crate::exit::{Fault, Kind};
use crate::live::control::{Request, ask};
use crate::live::{LiveFolder, remove_leftovers, remove_tree};

/// How long a commit is waited for that goes on after whoever asked for it was killed.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a VMM that does not listen any more may take to have ended.
const ENDING_TIMEOUT: Duration = Duration::from_secs(2);

/// Brings a VM to rest that was left in the middle of something. What became of it.
pub(crate) fn repair(house: &House, folder: &LiveFolder, _lock: &VmLock) -> Result<Repair> {
    let read = match Record::read(folder.path()) {
        // Half of it, from before a power cut that its VMM went with; nobody was told of it.
        Err(error) if Kind::of(&error) == Kind::Corrupt && is_unsettled(folder.path()) => None,
        read => read?,
    };
    let Some(mut record) = read else {
        // Its record is the first thing that is written, and the pin's lock the last that goes.
        if is_unsettled(folder.path()) || folder.is_bare()? {
            remove_vm(house, folder)?;
            return Ok(Repair::Remove);
        }
        return Ok(Repair::None);
    };
    if record.phase != Phase::Waking {
        // Whoever was about to say so was killed.
        settled(folder.path())?;
    }
    if let Phase::FallingAsleep(_) = &record.phase {
        wait_for_commit(folder)?;
        capture::forget(house, folder);
    }
    let lives = match &record.process {
        Some(process) => process.find()?.is_some(),
        None => false,
    };
    let is_published = match &record.phase {
        Phase::FallingAsleep(sleep) => published(&house.store, sleep)?,
        _ => None,
    };
    let seen = Seen { vmm_lives: lives, is_published: is_published.is_some() };
    let mut repair = record.phase.repair(seen);
    if repair == Repair::Resume
        && let Err(error) = connect(record.kind(), &api_of(folder), Timeouts::STANDARD)
    {
        // Its sockets close before it has ended: one that is just ending is not one that hangs.
        let process = record.process.as_ref();
        if !process.map_or(Ok(true), |process| process.ends_within(ENDING_TIMEOUT))? {
            return Err(error).context("cannot reach the VMM");
        }
        repair = record.phase.repair(Seen { vmm_lives: false, ..seen });
    }
    match repair {
        Repair::None => {}
        Repair::Remove => {
            match &record.process {
                Some(process) => process.end()?,
                None => end_all_that_write_to(&log_of(folder))?,
            }
            remove_vm(house, folder)?;
        }
        Repair::Resume => {
            let mut vmm = connect(record.kind(), &api_of(folder), Timeouts::STANDARD)?;
            vmm.resume().context("letting the guest go on")?;
            remove_tree(&folder.file("vmm/save"))?;
            record.phase = Phase::Awake;
            if let Some(snapshot) = is_published {
                record.over = Some(snapshot);
            }
            record.write(folder.path())?;
        }
        Repair::Fail => {
            let when = record.phase.word();
            record.phase = Phase::Failed { why: format!("its VMM ended while it was {when}") };
            record.write(folder.path())?;
        }
    }
    Ok(repair)
}

/// The snapshot that came of a sleep, once nobody is at storing it any more.
pub(super) fn outcome(house: &House, folder: &LiveFolder, sleep: &Sleep) -> Result<Option<String>> {
    wait_for_commit(folder)?;
    published(&house.store, sleep)
}

/// Brings all VMs to rest that nobody is at, and sees to it that those that are awake have a data plane.
pub(crate) fn repair_all(house: &House) -> Result<Vec<(Name, Repair)>> {
    let mut repaired = Vec::new();
    remove_leftovers(&house.dir)?;
    for folder in LiveFolder::all(&house.dir)? {
        // One that was left while it fell asleep needs it to go on, too.
        if Record::read(folder.path()).is_ok_and(|record| record.is_some()) {
            Plane::find_or_start(&house.dir)?;
            break;
        }
    }
    for folder in LiveFolder::all(&house.dir)? {
        let lock = match VmLock::try_take(&folder) {
            Ok(Some(lock)) => lock,
            Ok(None) => continue,
            // Disks alone, or gone meanwhile, or left before it was anything.
            Err(error) if Kind::of(&error) == Kind::NotFound => {
                if folder.exists() && folder.is_bare()? {
                    folder.remove_if_never_made()?;
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        match repair(house, &folder, &lock) {
            Ok(Repair::None) => {}
            Ok(done) => repaired.push((folder.live.clone(), done)),
            // One that cannot be mended keeps nobody from the others.
            Err(error) => {
                tracing::error!(live = %folder.live, error = &*error, "a VM cannot be brought to rest");
            }
        }
    }
    Ok(repaired)
}

/// Waits until the process that has the disks is done with a commit that nobody waits for any more.
fn wait_for_commit(folder: &LiveFolder) -> Result<()> {
    let begun = Instant::now();
    loop {
        match ask(&folder.control(), &Request::Status)? {
            Some(status) if status["is_committing"] == true => {}
            _ => return Ok(()),
        }
        if begun.elapsed() > COMMIT_TIMEOUT {
            let message = format!("a commit of {} goes on and does not end", folder.live);
            return Err(Fault::new(Kind::Busy, message).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The snapshot that came of a sleep.
fn published(store: &Store, sleep: &Sleep) -> Result<Option<String>> {
    let name = Name::new(sleep.name.as_str())?;
    let attempt = sleep.attempt.to_string();
    // The newest first: it is one of the last.
    for number in store.numbers(&name)?.into_iter().rev() {
        let snap = SnapRef { name: name.clone(), number: Some(number) };
        let manifest = match store.manifest(&snap) {
            Ok(manifest) => manifest,
            // Removed meanwhile.
            Err(error) if error.kind() == dormouse_store::error::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        if manifest.labels.get(ATTEMPT_LABEL) == Some(&attempt) {
            return Ok(Some(manifest.display_name()));
        }
    }
    Ok(None)
}
