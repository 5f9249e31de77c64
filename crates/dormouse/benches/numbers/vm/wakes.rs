//! Our share of a wake and of forks, at generation 1 and 1,000.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::{CommitRequest, NewImage, Parent};
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use serde_json::{Value as Json, json};

use super::place::Place;
use super::quantile;
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::Random;
use crate::scratch::{Scratch, root_disk};

const MEMORY_MIB: u64 = 16;
const GENERATIONS: u64 = 1000;

/// Wakes of each generation: p99 is the second worst.
const WAKES: usize = 150;

/// Forks of ten of each generation.
const TENS: usize = 7;

/// What a wake took, beside its VMM.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// From the request until all that the VMM needs was there.
    ready: f64,

    /// From the request to the answer: of one, without its VMM's own time; of forks, whose VMMs start beside
    /// each other, in all.
    all: f64,
}

pub(super) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let place = Place::new(scratch, "wakes")?;
    let guest = place.double_guest(MEMORY_MIB)?;
    place.post("/v1/vms", &json!({ "name": "box", "guest": guest }))?;
    place.post("/v1/vms/box/sleep", &json!({ "as": "vm" }))?;
    lineage(scratch, &place)?;
    let newest = format!("vm@{GENERATIONS}");
    let snaps = ["vm@1", newest.as_str()];
    let mut ones = [const { Vec::new() }; 2];
    let mut tens = [const { Vec::new() }; 2];
    for round in 0..WAKES {
        for (snap, shares) in snaps.iter().zip(&mut ones) {
            let live = format!("one-{round}");
            let body = json!({ "name": live });
            let (took, awake) =
                place.timed("POST", &format!("/v1/snapshots/{snap}/wake"), &body)?;
            shares.push(share(took, std::slice::from_ref(&awake))?);
            if round == 0 {
                place.double(&live, "PUT", "verify", "")?;
            }
            place.kill(&live)?;
        }
    }
    let plain = json!({});
    for _ in 0..TENS {
        for (snap, shares) in snaps.iter().zip(&mut tens) {
            shares.push(fork(&place, snap, &plain, 10)?);
        }
    }
    for (at, snap) in snaps.iter().enumerate() {
        rows(
            report,
            (&format!("wake of {snap}"), "without the VMM"),
            &ones[at],
            &[(0.5, 5e-3), (0.99, 10e-3)],
        );
        rows(report, (&format!("ten forks of {snap}"), "VMMs and all"), &tens[at], &[(0.5, 30e-3)]);
        let hundred = fork(&place, snap, &plain, 100)?;
        rows(
            report,
            (&format!("100 forks of {snap}"), "VMMs and all"),
            &[hundred],
            &[(0.5, 300e-3)],
        );
    }
    asked_for(&place, guest, report)
}

/// The same where the VMM asks for each page (userfaultfd), and a process keeps its descriptors.
fn asked_for(place: &Place, mut guest: Json, report: &mut Report) -> Result<()> {
    guest["memory_backend"] = "uffd".into();
    let with_guest = json!({ "guest": guest });
    let ones: Result<Vec<Share>> =
        (0..WAKES).map(|_| fork(place, "vm@1", &with_guest, 1)).collect();
    let tens: Result<Vec<Share>> =
        (0..TENS).map(|_| fork(place, "vm@1", &with_guest, 10)).collect();
    rows(
        report,
        ("wake over userfaultfd", "without the VMM"),
        &ones?,
        &[(0.5, 5e-3), (0.99, 10e-3)],
    );
    rows(report, ("ten forks over userfaultfd", "VMMs and all"), &tens?, &[(0.5, 30e-3)]);
    Ok(())
}

fn rows(report: &mut Report, (what, all_of): (&str, &str), shares: &[Share], bars: &[(f64, f64)]) {
    let of = |pick: fn(&Share) -> f64| shares.iter().map(pick).collect::<Vec<_>>();
    let (mut ready, mut all) = (of(|share| share.ready), of(|share| share.all));
    for (part, bar) in bars {
        let name = if shares.len() == 1 { String::new() } else { format!(", p{}", part * 100.0) };
        report.row(
            Row::new(
                format!("{what}, request to ready{name}"),
                Value::Seconds(quantile(&mut ready, *part)),
            )
            .bar(Bar::AtMost(*bar)),
        );
        report.row(Row::new(
            format!("  to the answer, {all_of}{name}"),
            Value::Seconds(quantile(&mut all, *part)),
        ));
    }
}

/// Forks a snapshot with these options, and ends the forks.
fn fork(place: &Place, snap: &str, options: &Json, count: usize) -> Result<Share> {
    let names: Vec<String> = (0..count).map(|number| format!("fork-{number}")).collect();
    let mut body = options.clone();
    body["names"] = json!(names);
    let (took, answer) = place.timed("POST", &format!("/v1/snapshots/{snap}/fork"), &body)?;
    let forks = answer["forks"].as_array().context("no forks")?;
    ensure!(forks.len() == count, "{} forks, not {count}", forks.len());
    let share = share(took, forks)?;
    names.iter().try_for_each(|live| place.kill(live))?;
    Ok(share)
}

/// What VMs that were woken at once cost: the last one was ready when all were.
fn share(took: f64, awake: &[Json]) -> Result<Share> {
    let seconds = |one: &Json, key: &str| one["seconds"][key].as_f64().context("no seconds");
    let last = awake.last().context("nobody is awake")?;
    let ready = took - seconds(last, "total")? + seconds(last, "ready")?;
    let vmm = if awake.len() == 1 { seconds(last, "vmm")? } else { 0.0 };
    Ok(Share { ready, all: took - vmm })
}

/// Commits generations up to the last one, each with a page of memory and a block of the disk that are
/// not as in the one before; the last has the memory of the first again, which the guest knows.
fn lineage(scratch: &Scratch, place: &Place) -> Result<()> {
    let store = place.store()?;
    let first = store.snapshot(&"vm@1".parse()?)?;
    let memory = first.image(&ImageName::Memory)?;
    let mut states = Vec::new();
    for entry in &first.manifest().images {
        if matches!(entry.image, ImageName::State(_)) {
            let image = first.image(&entry.image)?;
            let mut bytes = vec![0; usize::try_from(image.size_bytes())?];
            image.read_at(&mut bytes, 0)?;
            states.push((entry.image.clone(), bytes));
        }
    }
    let mut random = Random::new(21);
    let pages = (MEMORY_MIB << 20) / 4096;
    let page_of = |generation: u64| generation * 37 % pages * 4096;
    for generation in 2..=GENERATIONS {
        let (memory_diff, disk_diff) = (scratch.path("memory-diff"), scratch.path("disk-diff"));
        let file = File::create(&memory_diff)?;
        file.set_len(memory.size_bytes())?;
        if generation > 2 {
            let mut page = vec![0; 4096];
            memory.read_at(&mut page, page_of(generation - 1))?;
            file.write_all_at(&page, page_of(generation - 1))?;
        }
        if generation < GENERATIONS {
            file.write_all_at(&random.block(), page_of(generation))?;
        }
        let file = File::create(&disk_diff)?;
        file.set_len(64 << 20)?;
        // Beyond what the double's guest looks at.
        file.write_all_at(&random.block(), (64 + random.below(16_000)) * 4096)?;
        let diff = |image: ImageName, path| NewImage {
            image,
            source: Source::File(path),
            holes: HoleMeaning::Parent,
        };
        let mut images = vec![diff(ImageName::Memory, memory_diff), diff(root_disk()?, disk_diff)];
        // New memory wants a state, too; it is the same one.
        images.extend(states.iter().map(|(image, bytes)| NewImage {
            image: image.clone(),
            source: Source::Bytes(bytes.clone().into()),
            holes: HoleMeaning::Zero,
        }));
        let request = CommitRequest {
            parent: Parent::Snapshot(format!("vm@{}", generation - 1).parse()?),
            images,
            ..CommitRequest::new(Name::new("vm")?)
        };
        store.commit(request, Job::quiet())?;
    }
    Ok(())
}
