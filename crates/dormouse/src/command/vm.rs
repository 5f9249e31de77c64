//! `run`, `sleep`, `wake`, `fork`, `ps`, `inspect`, `kill` and `logs`: VMs, whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_vmm::vmm::Network;
use serde_json::{Value, json};

use crate::app::App;
use crate::background::{Side, split};
use crate::cli::vm::{ForkArgs, RunArgs, SleepArgs, VmArgs, WaitUntil, WakeArgs, WakeOptionArgs};
use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;
use crate::output::size::human;
use crate::output::table::{Column, Table};
use crate::vm::guest::{GUEST_BYTES_MAX, Guest};
use crate::vm::phase::Then;
use crate::vm::repair::repair_all;
use crate::vm::sleep::{Frozen, SleepOptions, sleep as fall_asleep};
use crate::vm::wake::{Awake, WakeOptions, run as boot, wake as awaken};
use crate::vm::{House, log_of};

/// The store with its VMs, those at rest that a crash left in the middle of something.
fn house(app: &App) -> Result<House> {
    let house = House::new(app.open()?, &app.store_dir)?;
    for (live, done) in repair_all(&house)? {
        tracing::info!(%live, ?done, "a VM was left in the middle of something");
    }
    Ok(house)
}

pub(super) fn run(app: &mut App, args: &RunArgs) -> Result<()> {
    let guest = read_guest(&args.guest)?;
    let house = house(app)?;
    let awake = boot(&house, guest, &args.name)?;
    tell_awake(app, &awake)
}

pub(super) fn wake(app: &mut App, args: &WakeArgs) -> Result<()> {
    let house = house(app)?;
    let options = wake_options(&args.options)?;
    let live = args.name.as_ref().unwrap_or(&args.snap.name);
    let awake = awaken(&house, &args.snap, live, &options)?;
    tell_awake(app, &awake)
}

pub(super) fn fork(app: &mut App, args: &ForkArgs) -> Result<()> {
    let house = house(app)?;
    let options = wake_options(&args.options)?;
    // All of the same one, whatever is committed meanwhile.
    let snap = house.store.resolve(&args.snap)?;
    let mut all = Vec::new();
    for live in &args.names {
        let awake = awaken(&house, &snap, live, &options).with_context(|| {
            let before: Vec<_> = all.iter().map(|awake: &Awake| awake.live.as_str()).collect();
            match before[..] {
                [] => format!("cannot wake {live}"),
                _ => format!("cannot wake {live}; awake are {}", before.join(", ")),
            }
        })?;
        if !app.json {
            tell_awake(app, &awake)?;
        }
        all.push(awake);
    }
    if app.json {
        let forks: Vec<Value> = all.iter().map(awake_object).collect();
        app.out.json(&json!({ "snapshot": snap.to_string(), "forks": forks }))?;
    }
    Ok(())
}

pub(super) fn sleep(app: &mut App, args: &SleepArgs) -> Result<ExitCode> {
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
                told = tell_frozen(app, frozen).and_then(|()| ready.tell(app, None));
            }
        },
        work.job(),
    )?;
    drop(work);
    told?;
    if args.wait == WaitUntil::Frozen && ready.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    if app.json {
        let mut object = serde_json::to_value(&slept)?;
        object["name"] = args.name.as_str().into();
        app.out.json(&object)?;
    } else {
        writeln!(app.out, "{}", slept.snapshot)?;
        app.out.flush()?;
        app.say(&format!(
            "{} written; frozen for {:.0} ms, {:.0} ms of it by the VMM; durable after {:.0} ms",
            human(slept.written_bytes),
            slept.frozen_seconds * 1e3,
            slept.vmm_seconds * 1e3,
            slept.durable_seconds * 1e3,
        ));
    }
    if let Some(ready) = ready {
        ready.tell(app, None)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tell_frozen(app: &mut App, frozen: Frozen) -> Result<()> {
    if app.json {
        app.out.json(&serde_json::to_value(frozen)?)?;
    } else {
        app.say(&format!("frozen for {:.0} ms", frozen.frozen_seconds * 1e3));
    }
    Ok(())
}

pub(super) fn ps(app: &mut App) -> Result<()> {
    let house = House::new(app.open()?, &app.store_dir)?;
    let vms = house.list()?;
    if app.json {
        return Ok(app.out.json(&json!({ "vms": vms }))?);
    }
    let columns = ["name", "state", "vmm", "pid", "over", "since"].map(Column::Text);
    let mut table = Table::new(app.palette, &columns);
    for vm in &vms {
        let text = |key: &str| match &vm[key] {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        table.row(["name", "state", "vmm", "pid", "over", "since"].map(text));
    }
    app.out.write_all(table.render().as_bytes())?;
    for vm in vms.iter().filter(|vm| vm["problem"].is_string()) {
        let text = |key: &str| vm[key].as_str().unwrap_or("?").to_owned();
        app.warn(&format!("{}: {}", text("name"), text("problem")));
    }
    Ok(())
}

pub(super) fn inspect(app: &mut App, args: &VmArgs) -> Result<()> {
    let house = House::new(app.open()?, &app.store_dir)?;
    let vm = house.inspect(&args.name)?;
    if app.json {
        return Ok(app.out.json(&vm)?);
    }
    writeln!(app.out, "{}", serde_json::to_string_pretty(&vm)?)?;
    Ok(())
}

pub(super) fn kill(app: &mut App, args: &VmArgs) -> Result<()> {
    let house = House::new(app.open()?, &app.store_dir)?;
    house.kill(&args.name)?;
    if app.json {
        app.out.json(&json!({ "name": args.name.as_str(), "killed": true }))?;
    }
    app.say(&format!("{} is gone; `dormouse gc` frees what only it held", args.name));
    Ok(())
}

pub(super) fn logs(app: &mut App, args: &VmArgs) -> Result<()> {
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
        .and_then(|file| file.take(GUEST_BYTES_MAX + 1).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 > GUEST_BYTES_MAX {
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
        networks: networks.collect(),
        vsock: args.vsock.clone(),
    })
}

pub(crate) fn awake_object(awake: &Awake) -> Value {
    json!({
        "name": awake.live.as_str(),
        "over": awake.over,
        "pid": awake.pid,
        "api": awake.api,
        "seconds": awake.seconds,
    })
}

fn tell_awake(app: &mut App, awake: &Awake) -> Result<()> {
    if app.json {
        return Ok(app.out.json(&awake_object(awake))?);
    }
    let name: &Name = &awake.live;
    writeln!(app.out, "{name}")?;
    app.out.flush()?;
    app.say(&format!(
        "process {}, API at {}; awake after {:.0} ms, {:.0} ms of it the VMM's",
        awake.pid,
        awake.api.display(),
        awake.seconds.total * 1e3,
        awake.seconds.vmm * 1e3,
    ));
    Ok(())
}
