//! `dormouse disk`: live disks, made, looked at, committed and removed.

use std::io::Write;

use anyhow::Result;
use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_live::base::{Base, FileBase};
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::Overlay;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::store::{Durable, Store};
use serde::Serialize;
use serde_json::{Value, json};

use super::serve::stop_server;
use crate::app::App;
use crate::cli::live::{DiskCommand, DiskCommitArgs, DiskCreateArgs};
use crate::exit::{Fault, Kind};
use crate::live::control::Request;
use crate::live::memory::LiveMemory;
use crate::live::owner::{Reached, commit_wherever, reach};
use crate::live::{
    BaseLabel, Committed, LiveCommit, LiveDisks, LiveFolder, LiveRef, NewBase, Scope, Step,
};
use crate::output::size::human;

/// What a blank disk is called that was given no id.
const DEFAULT_DISK: &str = "root";

/// What the writable memory of a live VM is called among its disks.
const MEMORY: &str = "memory";

pub(super) fn run(app: &mut App, command: DiskCommand) -> Result<()> {
    match command {
        DiskCommand::Create(args) => create(app, &args),
        DiskCommand::Ls => ls(app),
        DiskCommand::Status { live } => status(app, &live),
        DiskCommand::Rm { live } => rm(app, &live),
        DiskCommand::Commit(args) => commit_disks(app, args),
        DiskCommand::Discard { live } => discard(app, &live),
    }
}

fn create(app: &mut App, args: &DiskCreateArgs) -> Result<()> {
    let store = app.open()?;
    let folder = LiveFolder::new(&app.store_dir, &args.live.live);
    // Its guest would never see the disk, and its next snapshot would have it.
    folder.check_is_no_vm()?;
    let (id, size_bytes) = match &args.from {
        Some(from) => {
            let id = match &from.image {
                ImageName::Disk(id) => id.clone(),
                ImageName::Memory => memory_id(args)?,
                ImageName::State(_) => {
                    return Err(Fault::usage(format!("{from} is not a disk")).into());
                }
            };
            let snapshot = store.snapshot(&from.snap)?;
            let image = snapshot.image(&from.image)?;
            let name = format!("{}:{}", snapshot.manifest().display_name(), from.image);
            let size = args.size.unwrap_or(image.size_bytes());
            if size < image.size_bytes() {
                let message = format!(
                    "{} is smaller than {name}, which has {}; a disk can only grow",
                    human(size),
                    human(image.size_bytes())
                );
                return Err(Fault::usage(message).into());
            }
            let id = args.live.disk.as_ref().unwrap_or(&id).clone();
            LiveDisks::create(
                &store,
                &folder,
                &id,
                NewBase::Image(&image, name),
                size,
                Durable::AtOnce,
            )?;
            (id, size)
        }
        None if args.from_file.is_some() => {
            let path = args.from_file.clone().unwrap_or_default();
            let bytes = FileBase::open(&path)?.size_bytes();
            let id = args.live.disk.clone().map_or_else(|| Name::new(DEFAULT_DISK), Ok)?;
            let size = args.size.unwrap_or(bytes);
            LiveDisks::create(&store, &folder, &id, NewBase::File(&path), size, Durable::AtOnce)?;
            (id, size)
        }
        None => {
            let Some(size) = args.size else {
                return Err(
                    Fault::usage("a blank disk wants --size; or give --from SNAP:ID").into()
                );
            };
            let id = args.live.disk.clone().map_or_else(|| Name::new(DEFAULT_DISK), Ok)?;
            LiveDisks::create(&store, &folder, &id, NewBase::Blank, size, Durable::AtOnce)?;
            (id, size)
        }
    };
    let name = format!("{}/{id}", folder.live);
    if app.json {
        app.out.json(&json!({ "disk": name, "size_bytes": size_bytes }))?;
    } else {
        writeln!(app.out, "{name}")?;
    }
    Ok(())
}

/// What a live memory is called, which has the length of the guest's memory and no name of its own.
fn memory_id(args: &DiskCreateArgs) -> Result<Name> {
    let id = Name::new(MEMORY)?;
    if args.size.is_some() || args.live.disk.as_ref().is_some_and(|given| *given != id) {
        let message =
            format!("a live memory is called {MEMORY} and is as long as what it lies over");
        return Err(Fault::usage(message).into());
    }
    Ok(id)
}

#[derive(Serialize)]
struct LiveRow {
    disk: String,
    base: Option<String>,
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl LiveRow {
    fn broken(disk: String, problem: String) -> LiveRow {
        LiveRow { disk, base: None, size_bytes: None, problem: Some(problem) }
    }
}

fn ls(app: &mut App) -> Result<()> {
    app.open()?;
    let mut rows = Vec::new();
    for folder in LiveFolder::all(&app.store_dir)? {
        if folder.is_bare()? {
            let problem = "neither disks nor memory, only what it holds of the store".to_owned();
            rows.push(LiveRow::broken(folder.live.to_string(), problem));
        }
        for id in folder.ids()? {
            let disk = format!("{}/{id}", folder.live);
            rows.push(match folder.describe(&id) {
                Ok((label, size_bytes)) => LiveRow {
                    disk,
                    base: Some(label.display().to_owned()),
                    size_bytes: Some(size_bytes),
                    problem: None,
                },
                // One that is damaged keeps nobody from seeing the others.
                Err(error) => LiveRow::broken(disk, format!("{error:#}")),
            });
        }
    }
    if app.json {
        return Ok(app.out.json(&json!({ "disks": rows }))?);
    }
    for row in rows {
        let LiveRow { disk, base, size_bytes, problem } = row;
        match (base, size_bytes) {
            (Some(base), Some(size)) => writeln!(app.out, "{disk}  {}  over {base}", human(size))?,
            _ => {
                let problem = problem.unwrap_or_default();
                writeln!(app.out, "{disk}  DAMAGED: {problem}; `dormouse disk rm {disk}`")?;
            }
        }
    }
    Ok(())
}

fn status(app: &mut App, live: &LiveRef) -> Result<()> {
    let store = app.open()?;
    let folder = LiveFolder::new(&app.store_dir, &live.live);
    folder.check()?;
    let mut value = match reach(&store, &folder, &Request::Status, &mut |_| {}, &mut || {})? {
        Reached::Answer(value) => value,
        Reached::Disks(disks) => {
            let mut status = status_of(&disks, None)?;
            status["server"] = Value::Null;
            if let Some(label) = folder.memory_label()? {
                status["memory"] = json!({ "base": label.display(), "state": "unserved" });
            }
            status
        }
    };
    if let (Some(id), Some(disks)) = (&live.disk, value["disks"].as_array_mut()) {
        disks.retain(|disk| disk["id"] == id.as_str());
        if disks.is_empty() {
            return Err(Fault::new(Kind::NotFound, format!("there is no live disk {live}")).into());
        }
    }
    if app.json {
        return Ok(app.out.json(&value)?);
    }
    for disk in value["disks"].as_array().into_iter().flatten() {
        let bytes = |key: &str| human(disk[key].as_u64().unwrap_or(0));
        writeln!(
            app.out,
            "{}/{}: {} over {}; {} dirty, {} zero, {} on the disk, {}{}",
            live.live,
            disk["id"].as_str().unwrap_or("?"),
            bytes("size_bytes"),
            disk["base"].as_str().unwrap_or("?"),
            bytes("dirty_bytes"),
            bytes("zero_bytes"),
            bytes("allocated_bytes"),
            match disk["layers"].as_u64() {
                Some(1) => "1 layer".to_owned(),
                layers => format!("{} layers", layers.unwrap_or(0)),
            },
            if disk["is_committing"] == true { "; being committed" } else { "" },
        )?;
        if let Some(problem) = disk["problem"].as_str() {
            writeln!(app.out, "    FAILED: {problem}")?;
        }
    }
    if value["memory"].is_object() {
        writeln!(app.out, "{}", memory_line(&live.live, &value["memory"]))?;
    }
    if let Some(pid) = value["server"]["pid"].as_u64() {
        writeln!(app.out, "served by process {pid}")?;
    }
    Ok(())
}

/// What is told of a live VM's memory.
fn memory_line(live: &Name, memory: &Value) -> String {
    let base = memory["base"].as_str().unwrap_or("?");
    let state = match memory["state"].as_str() {
        Some("waiting") => "waits for its VMM".to_owned(),
        Some("unserved") => format!(
            "served by nobody; `dormouse serve memory --take-over {live}` serves it, if its VM lives"
        ),
        _ => {
            let pages = |key: &str| {
                human(memory["pages"][key].as_u64().unwrap_or(0).saturating_mul(BLOCK_BYTES_U64))
            };
            format!(
                "{} dirty, {} zero, {} untouched; {} faults of process {}",
                pages("dirty"),
                pages("removed"),
                pages("missing"),
                memory["faults"],
                memory["pid"],
            )
        }
    };
    format!("{live}: memory over {base}; {state}")
}

/// Figures of all disks and the memory, as `disk status --json` prints them.
pub(crate) fn status_of(live: &LiveDisks, memory: Option<&LiveMemory>) -> Result<Value> {
    let labels = live.folder.labels()?;
    let mut disks = Vec::new();
    for disk in &live.disks {
        let mut object = overlay_figures(&disk.overlay)?;
        object["id"] = json!(disk.id.as_str());
        object["base"] = json!(labels.get(&disk.id).map_or("-", BaseLabel::display));
        disks.push(object);
    }
    let memory = memory.map(LiveMemory::figures);
    Ok(json!({ "live": live.folder.live.as_str(), "disks": disks, "memory": memory }))
}

/// Figures of one disk.
pub(crate) fn overlay_figures(overlay: &Overlay) -> Result<Value> {
    let status = overlay.status()?;
    Ok(json!({
        "size_bytes": status.size_bytes,
        "dirty_bytes": status.blocks.dirty * BLOCK_BYTES_U64,
        "zero_bytes": status.blocks.zero * BLOCK_BYTES_U64,
        "allocated_bytes": status.allocated_bytes,
        "memory_bytes": status.memory_bytes,
        "layers": status.layers,
        "is_committing": status.is_committing,
        "has_failed": status.problem.is_some(),
        "failed_ranges": status.failed_ranges,
        "is_poisoned": status.is_poisoned,
        "problem": status.problem,
    }))
}

fn rm(app: &mut App, live: &LiveRef) -> Result<()> {
    let store = app.open()?;
    let folder = LiveFolder::new(&app.store_dir, &live.live);
    if !folder.exists() {
        folder.check()?;
    }
    folder.check_no_vm()?;
    match &live.disk {
        Some(id) => folder.remove_disk(&store, id)?,
        None => {
            stop_server(&folder)?;
            // A VMM may have been let in before its server ended.
            folder.check_no_vm()?;
            folder.remove()?;
        }
    }
    app.say(&format!("removed {live}; `dormouse gc` frees what only it held"));
    Ok(())
}

fn commit_disks(app: &mut App, args: DiskCommitArgs) -> Result<()> {
    let store = app.open()?;
    let folder = LiveFolder::new(&app.store_dir, &args.live.live);
    folder.disks()?;
    let wanted = LiveCommit {
        parent: args.parent,
        labels: args.label.into_iter().collect(),
        ..LiveCommit::new(Scope::disk(args.live.disk), args.name)
    };
    commit_live(app, &store, &folder, &wanted)
}

/// Has a live VM committed by the process that has it, or by this one if none has, and tells.
pub(super) fn commit_live(
    app: &mut App,
    store: &Store,
    folder: &LiveFolder,
    wanted: &LiveCommit,
) -> Result<()> {
    let work = app.work()?;
    let value = commit_wherever(store, folder, wanted, &mut |_| {}, work.job())?;
    drop(work);
    if app.json {
        return Ok(app.out.json(&value)?);
    }
    writeln!(app.out, "{}", value["snapshot"].as_str().unwrap_or("?"))?;
    app.say(&format!(
        "{} written; frozen for {:.0} µs",
        human(value["written_bytes"].as_u64().unwrap_or(0)),
        value["freeze_seconds"].as_f64().unwrap_or(0.0) * 1e6,
    ));
    let left_out = value["left_out"].as_array().into_iter().flatten();
    let left_out: Vec<_> = left_out.filter_map(Value::as_str).collect();
    if !left_out.is_empty() {
        app.say(&super::commit::left_out(&left_out.join(", ")));
    }
    if value["is_live"] == false {
        app.say("not all changes are tracked: the guest had to stay paused until now");
    }
    Ok(())
}

/// What `disk commit --json` prints.
pub(crate) fn committed(committed: &Committed) -> Value {
    let report = &committed.report;
    json!({
        "snapshot": report.manifest.display_name(),
        "uuid": report.manifest.uuid,
        "number": report.manifest.number,
        "figures": report.manifest.figures,
        "left_out": report.left_out.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "written_bytes": report.written_bytes,
        "seconds": report.seconds,
        "freeze_seconds": committed.freeze.total.as_secs_f64(),
        "memory_freeze_seconds": committed.freeze.memory.map(|freeze| freeze.as_secs_f64()),
        "is_live": committed.freeze.is_over,
    })
}

/// What is told of a step of a commit.
pub(crate) fn told(step: &Step) -> Value {
    match step {
        Step::Sealed(freeze) => json!({
            "freeze_seconds": freeze.total.as_secs_f64(),
            "memory_freeze_seconds": freeze.memory.map(|freeze| freeze.as_secs_f64()),
            "is_live": freeze.is_over,
        }),
        Step::Read => json!({ "is_read": true }),
        Step::Stored(snapshot) => json!({ "stored": snapshot }),
    }
}

fn discard(app: &mut App, live: &LiveRef) -> Result<()> {
    app.open()?;
    let folder = LiveFolder::new(&app.store_dir, &live.live);
    let wanted = |id: &Name| live.disk.as_ref().is_none_or(|one| one == id);
    if !folder.disks()?.iter().any(wanted) {
        return Err(Fault::new(Kind::NotFound, format!("there is no live disk {live}")).into());
    }
    // All of them, as the process has that serves one.
    let locks = folder.lock_disks()?;
    // One whose server was killed goes on when that is taken over, and knows what it wrote.
    folder.check_no_vm()?;
    for (id, lock) in locks.iter().filter(|(id, _)| wanted(id)) {
        let files = RealFolder::new(folder.disk(id));
        Overlay::discard(&files, &**lock)?;
        app.say(&format!("{}/{id} is as its base again", folder.live));
    }
    Ok(())
}
