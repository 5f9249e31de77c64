//! `run`, `sleep`, `wake`, `fork`, `ps`, `inspect`, `kill` and `logs`: VMs, whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_vmm::vmm::Network;
use serde_json::{Value, json};

use crate::app::App;
use crate::background::{Side, split};
use crate::cli::vm::{ForkArgs, RunArgs, SleepArgs, VmArgs, WaitUntil, WakeArgs, WakeOptionArgs};
use crate::daemon::client::{Client, Until, Watch, absolute};
use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;
use crate::output::size::human;
use crate::output::table::{Column, Table};
use crate::progress::Display;
use crate::vm::guest::{GUEST_BYTES_MAX, Guest};
use crate::vm::phase::Then;
use crate::vm::repair::repair_all;
use crate::vm::sleep::{SleepOptions, sleep as fall_asleep};
use crate::vm::wake::{Awake, WakeOptions, fork as fork_all, run as boot, wake as awaken};
use crate::vm::{House, log_of};

/// The store with its VMs, those at rest that a crash left in the middle of something.
fn house(app: &App) -> Result<House> {
    let house = House::new(app.open()?, &app.store_dir)?;
    for (live, done) in repair_all(&house)? {
        tracing::info!(%live, ?done, "a VM was left in the middle of something");
    }
    Ok(house)
}

pub(super) fn recover(app: &App) -> Result<()> {
    house(app).map(drop)
}

pub(super) fn run(app: &mut App, args: &RunArgs) -> Result<()> {
    let guest = read_guest(&args.guest)?;
    let awake = match Client::find(app)? {
        Some(daemon) => {
            let body = json!({ "name": args.name.as_str(), "guest": guest_elsewhere(guest)? });
            let display = app.work()?;
            daemon.job("POST", "/v1/vms", Some(&body), watched(&display, &mut |_| Ok(())))?
        }
        None => {
            let work = app.work()?;
            json!(boot(&house(app)?, guest, &args.name, work.job())?)
        }
    };
    tell_awake(app, &awake)
}

pub(super) fn wake(app: &mut App, args: &WakeArgs) -> Result<()> {
    let live = args.name.as_ref().unwrap_or(&args.snap.name);
    let options = wake_options(&args.options)?;
    let awake = match Client::find(app)? {
        Some(daemon) => {
            let mut body = options_elsewhere(options)?;
            body["name"] = live.as_str().into();
            let path = format!("/v1/snapshots/{}/wake", args.snap);
            let display = app.work()?;
            daemon.job("POST", &path, Some(&body), watched(&display, &mut |_| Ok(())))?
        }
        None => {
            let work = app.work()?;
            json!(awaken(&house(app)?, &args.snap, live, &options, work.job())?)
        }
    };
    tell_awake(app, &awake)
}

pub(super) fn fork(app: &mut App, args: &ForkArgs) -> Result<()> {
    let options = wake_options(&args.options)?;
    if let Some(daemon) = Client::find(app)? {
        let mut body = options_elsewhere(options)?;
        body["names"] = args.names.iter().map(Name::as_str).collect();
        let path = format!("/v1/snapshots/{}/fork", args.snap);
        let display = app.work()?;
        let mut on_awake = |awake: &Value| if app.json { Ok(()) } else { tell_awake(app, awake) };
        let forks = daemon.job("POST", &path, Some(&body), watched(&display, &mut on_awake))?;
        return if app.json { Ok(app.out.json(&forks)?) } else { Ok(()) };
    }
    let work = app.work()?;
    let house = house(app)?;
    let mut on_awake =
        |awake: &Awake| if app.json { Ok(()) } else { tell_awake(app, &json!(awake)) };
    let (snap, names) = (&args.snap, &args.names);
    let forks = fork_all(&house, snap, names, &options, work.job(), &mut on_awake)?;
    if app.json {
        app.out.json(&json!(forks))?;
    }
    Ok(())
}

pub(super) fn sleep(app: &mut App, args: &SleepArgs) -> Result<ExitCode> {
    if let Some(daemon) = Client::find(app)? {
        return sleep_there(app, &daemon, args);
    }
    let mut ready = match split(args.wait == WaitUntil::Frozen)? {
        Side::Started(code) => return Ok(code),
        Side::Here(ready) => Some(ready),
    };
    let house = house(app)?;
    let options = SleepOptions {
        name: args.snapshot.clone(),
        then: if args.keep_running { Then::GoOn } else { Then::End },
        labels: args.label.iter().cloned().collect(),
    };
    let mut told = Ok(());
    let work = app.work()?;
    let slept = fall_asleep(
        &house,
        &args.name,
        &options,
        &mut |frozen| {
            if args.wait == WaitUntil::Frozen
                && let Some(ready) = ready.take()
            {
                told = tell_frozen(app, &json!(frozen)).and_then(|()| ready.tell(app, None));
            }
        },
        work.job(),
    )?;
    drop(work);
    told?;
    if args.wait == WaitUntil::Frozen && ready.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut object = serde_json::to_value(&slept)?;
    object["name"] = args.name.as_str().into();
    tell_slept(app, &object)?;
    if let Some(ready) = ready {
        ready.tell(app, None)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the daemon put a VM to sleep.
fn sleep_there(app: &mut App, daemon: &Client, args: &SleepArgs) -> Result<ExitCode> {
    let labels: BTreeMap<_, _> = args.label.iter().cloned().collect();
    let mut body = json!({ "keep_running": args.keep_running, "labels": labels });
    if let Some(name) = &args.snapshot {
        body["as"] = name.as_str().into();
    }
    let until = match args.wait {
        WaitUntil::Frozen => Until::Frozen,
        WaitUntil::Durable => Until::End,
    };
    let display = app.work()?;
    let watch = Watch { display: Some(&display), until, on_awake: &mut |_| Ok(()) };
    let path = format!("/v1/vms/{}/sleep", args.name);
    let slept = daemon.job("POST", &path, Some(&body), watch)?;
    drop(display);
    match args.wait {
        WaitUntil::Frozen => {
            let seconds = &slept["frozen_seconds"];
            tell_frozen(app, &json!({ "frozen_seconds": seconds, "job": slept["job"] }))?;
        }
        WaitUntil::Durable => tell_slept(app, &slept)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tell_slept(app: &mut App, slept: &Value) -> Result<()> {
    if app.json {
        return Ok(app.out.json(slept)?);
    }
    writeln!(app.out, "{}", slept["snapshot"].as_str().unwrap_or_default())?;
    app.out.flush()?;
    let milliseconds = |key: &str| slept[key].as_f64().unwrap_or_default() * 1e3;
    app.say(&format!(
        "{} written; frozen for {:.0} ms, {:.0} ms of it by the VMM; durable after {:.0} ms",
        human(slept["written_bytes"].as_u64().unwrap_or_default()),
        milliseconds("frozen_seconds"),
        milliseconds("vmm_seconds"),
        milliseconds("durable_seconds"),
    ));
    Ok(())
}

fn tell_frozen(app: &mut App, frozen: &Value) -> Result<()> {
    if app.json {
        return Ok(app.out.json(frozen)?);
    }
    let seconds = frozen["frozen_seconds"].as_f64().unwrap_or_default();
    app.say(&format!("frozen for {:.0} ms", seconds * 1e3));
    Ok(())
}

pub(super) fn ps(app: &mut App) -> Result<()> {
    let listed = match Client::find_to_look(app)? {
        Some(daemon) => daemon.get("/v1/vms")?,
        None => json!({ "vms": House::new(app.open()?, &app.store_dir)?.list()? }),
    };
    if app.json {
        return Ok(app.out.json(&listed)?);
    }
    let vms = listed["vms"].as_array().cloned().unwrap_or_default();
    let columns = ["name", "state", "vmm", "pid", "over", "since"].map(Column::Text);
    let mut table = Table::new(app.palette, &columns);
    for vm in &vms {
        let text = |key: &str| match &vm[key] {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let since = text("since");
        // To the second: the rest is for machines.
        let since =
            since.split_once('.').map_or(since.clone(), |(seconds, _)| format!("{seconds}Z"));
        let [name, state, vmm, pid, over] = ["name", "state", "vmm", "pid", "over"].map(text);
        table.row([name, state, vmm, pid, over, since]);
    }
    app.out.write_all(table.render().as_bytes())?;
    for vm in vms.iter().filter(|vm| vm["problem"].is_string()) {
        let text = |key: &str| vm[key].as_str().unwrap_or("?").to_owned();
        app.warn(&format!("{}: {}", text("name"), text("problem")));
    }
    Ok(())
}

pub(super) fn inspect(app: &mut App, args: &VmArgs) -> Result<()> {
    let vm = match Client::find_to_look(app)? {
        Some(daemon) => daemon.get(&format!("/v1/vms/{}", args.name))?,
        None => House::new(app.open()?, &app.store_dir)?.inspect(&args.name)?,
    };
    if app.json {
        return Ok(app.out.json(&vm)?);
    }
    writeln!(app.out, "{}", serde_json::to_string_pretty(&vm)?)?;
    Ok(())
}

pub(super) fn kill(app: &mut App, args: &VmArgs) -> Result<()> {
    match Client::find(app)? {
        Some(daemon) => {
            let path = format!("/v1/vms/{}", args.name);
            let watch = Watch { display: None, on_awake: &mut |_| Ok(()), until: Until::End };
            daemon.job("DELETE", &path, None, watch)?;
        }
        None => House::new(app.open()?, &app.store_dir)?.kill(&args.name)?,
    }
    if app.json {
        app.out.json(&json!({ "name": args.name.as_str(), "killed": true }))?;
    }
    app.say(&format!("{} is gone; `dormouse gc` frees what only it held", args.name));
    Ok(())
}

pub(super) fn logs(app: &mut App, args: &VmArgs) -> Result<()> {
    if let Some(daemon) = Client::find_to_look(app)? {
        return daemon.copy(&format!("/v1/vms/{}/logs", args.name), &mut app.out);
    }
    let house = House::new(app.open()?, &app.store_dir)?;
    let folder = LiveFolder::new(&house.dir, &args.name);
    house.record(&folder)?;
    let path = log_of(&folder);
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        file => {
            io::copy(&mut file?, &mut app.out)
                .with_context(|| format!("cannot print {}", path.display()))?;
        }
    }
    Ok(())
}

pub(crate) fn read_guest(path: &Path) -> Result<Guest> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(GUEST_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() > GUEST_BYTES_MAX {
        let message = format!("{} has more than {GUEST_BYTES_MAX} bytes", path.display());
        return Err(Fault::new(Kind::Usage, message).into());
    }
    Guest::parse(&bytes).with_context(|| format!("cannot use {}", path.display()))
}

fn wake_options(args: &WakeOptionArgs) -> Result<WakeOptions> {
    let networks = args
        .network
        .iter()
        .map(|(id, device)| Network { id: id.clone(), host_device: device.clone() });
    Ok(WakeOptions {
        guest: args.guest.as_deref().map(read_guest).transpose()?,
        vmm: args.vmm.clone(),
        networks: networks.collect(),
        vsock: args.vsock.clone(),
    })
}

/// A job that is waited for, and told to stop when we are.
fn watched<'a>(
    display: &'a Display,
    on_awake: &'a mut dyn FnMut(&Value) -> Result<()>,
) -> Watch<'a> {
    Watch { display: Some(display), on_awake, until: Until::End }
}

/// A guest for a process that runs in another folder.
fn guest_elsewhere(mut guest: Guest) -> Result<Value> {
    for disk in &mut guest.disks {
        disk.from_file = disk.from_file.as_deref().map(absolute).transpose()?;
    }
    let launch = &mut guest.launch;
    launch.work_folder = launch.work_folder.as_deref().map(absolute).transpose()?;
    launch.program = launch.program.take().map(program_elsewhere).transpose()?;
    Ok(serde_json::to_value(guest)?)
}

/// A program for such a process; a mere name is looked for along the PATH.
fn program_elsewhere(program: PathBuf) -> Result<PathBuf> {
    if program.components().count() > 1 { absolute(&program) } else { Ok(program) }
}

/// The options of a wake, for such a process.
fn options_elsewhere(options: WakeOptions) -> Result<Value> {
    let networks: BTreeMap<_, _> =
        options.networks.into_iter().map(|network| (network.id, network.host_device)).collect();
    Ok(json!({
        "guest": options.guest.map(guest_elsewhere).transpose()?,
        "vmm": options.vmm.map(program_elsewhere).transpose()?,
        "networks": networks,
        "vsock": options.vsock.as_deref().map(absolute).transpose()?,
    }))
}

fn tell_awake(app: &mut App, awake: &Value) -> Result<()> {
    if app.json {
        return Ok(app.out.json(awake)?);
    }
    let text = |key: &str| awake[key].as_str().unwrap_or_default().to_owned();
    writeln!(app.out, "{}", text("name"))?;
    app.out.flush()?;
    let milliseconds = |key: &str| awake["seconds"][key].as_f64().unwrap_or_default() * 1e3;
    app.say(&format!(
        "process {}, API at {}; awake after {:.0} ms, {:.0} ms of it the VMM's",
        awake["pid"],
        text("api"),
        milliseconds("total"),
        milliseconds("vmm"),
    ));
    Ok(())
}
