//! Real QEMU guests: a freeze with 50 MB dirty, and the sleep of one that idled.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_testkit::guest::{Assets, Console, Machine, cache_dir, guest_for_run};
use serde_json::{Value as Json, json};

use super::place::Place;
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, median};
use crate::scratch::Scratch;

const MEMORY_MIB: u64 = 512;
const IDLE: Duration = Duration::from_secs(10);

pub(super) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let assets = Assets::prepare(&cache_dir(), &mut |line| println!("{line}"))?;
    let place = Place::new(scratch, "guests")?;
    let disk = assets.disk();
    let disk = disk.to_str().context("a path of UTF-8")?;
    dormouse(&place, &["commit", "base", "--disk", disk])?;
    let guest = guest_for_run(&assets, Machine::Q35, MEMORY_MIB, "base:root")?;
    place.post("/v1/vms", &json!({ "name": "box", "guest": guest }))?;
    console(&place)?.wait_ready()?;
    place.post("/v1/vms/box/sleep", &json!({ "as": "vm" }))?;
    place.post("/v1/snapshots/vm/wake", &json!({ "name": "box" }))?;
    let mut guest = console(&place)?;
    guest.wait_counter()?;
    let keep = json!({ "keep_running": true });
    let asleep = |what: &str| -> Result<Json> {
        place.post("/v1/vms/box/sleep", &keep).with_context(|| format!("the sleep {what}"))
    };
    asleep("before it idles")?;
    thread::sleep(IDLE);
    let stored = number(&asleep("after it idled")?, "written_bytes")?;
    report.row(
        Row::new("sleep of a 512 MiB guest after 10 s of idling, written", Value::Bytes(stored))
            .bar(Bar::AtMost((1 << 20) as f64)),
    );
    guest.check("mount -t tmpfs tmp /mnt")?;
    let (mut ours, mut theirs, mut durable) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..FEW_ROUNDS {
        // A TCG guest makes random bytes slowly; the same ones, written over, are dirty as well.
        guest.check("head -c 50000000 /dev/zero | tr '\\0' x > /mnt/dirty; date >> /mnt/dirty")?;
        let slept = asleep("with 50 MB dirty")?;
        let frozen = number(&slept, "frozen_seconds")?;
        let vmm = number(&slept, "vmm_seconds")?;
        ours.push(frozen - vmm);
        theirs.push(vmm);
        durable.push(number(&slept, "durable_seconds")?);
    }
    report.row(
        Row::new("freeze of a QEMU guest, 50 MB dirty, our share", Value::Seconds(median(ours)))
            .beside("the VMM's", Value::Seconds(median(theirs)))
            .bar(Bar::AtMost(15e-3)),
    );
    report.row(Row::new("  until durable", Value::Seconds(median(durable))));
    Ok(())
}

fn number(answer: &Json, key: &str) -> Result<f64> {
    answer[key].as_f64().with_context(|| format!("no {key} in {answer}"))
}

fn console(place: &Place) -> Result<Console> {
    Console::connect(&place.folder("box").join("vmm/serial"))
}

fn dormouse(place: &Place, arguments: &[&str]) -> Result<()> {
    let status = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .arg("--store")
        .arg(&place.dir)
        .args(arguments)
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "dormouse {arguments:?} failed");
    Ok(())
}
