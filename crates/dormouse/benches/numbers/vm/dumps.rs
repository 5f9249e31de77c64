//! Memory that Firecracker writes whole, to a file or into a capture; and what a guest changed, told by its
//! page tables while Firecracker's own dump is dropped, beside that dump captured.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_testkit::double::ask;
use serde_json::{Value as Json, json};

use super::place::Place;
use crate::report::{Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, median};
use crate::scratch::Scratch;

const MEMORY_MIB: u64 = 512;

/// How long a guest works before it sleeps.
const WORK: Duration = Duration::from_millis(500);

pub(super) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let place = Place::new(scratch, "dumps")?;
    let guest = place.double_guest(MEMORY_MIB)?;
    let mut whole = [const { (Vec::new(), Vec::new()) }; 2];
    for _ in 0..FEW_ROUNDS {
        place.post("/v1/vms", &json!({ "name": "box", "guest": guest }))?;
        for (keep_running, (frozen, durable)) in [true, false].into_iter().zip(&mut whole) {
            thread::sleep(WORK);
            let wanted = json!({ "as": "vm", "keep_running": keep_running });
            let slept = place.post("/v1/vms/box/sleep", &wanted)?;
            frozen.push(seconds(&slept, "frozen_seconds")?);
            durable.push(seconds(&slept, "durable_seconds")?);
        }
    }
    let [(file_frozen, file_durable), (capture_frozen, capture_durable)] = whole;
    report.row(
        Row::new("sleep of a booted Firecracker, dump in a file, frozen", time(file_frozen))
            .beside("dump captured", time(capture_frozen)),
    );
    report.row(
        Row::new("  until durable", time(file_durable))
            .beside("dump captured", time(capture_durable)),
    );
    place.post("/v1/snapshots/vm/wake", &json!({ "name": "box" }))?;
    let (mut told, mut dumped) = (Vec::new(), Vec::new());
    for _ in 0..FEW_ROUNDS {
        thread::sleep(WORK);
        let wanted = json!({ "as": "vm", "keep_running": true });
        let slept = place.post("/v1/vms/box/sleep", &wanted)?;
        told.push(seconds(&slept, "durable_seconds")?);
        thread::sleep(WORK);
        dumped.push(capture_diff(&place)?);
    }
    report.row(
        Row::new("changes of a woken one, from its page tables, until durable", time(told))
            .beside("its own diff captured", time(dumped)),
    );
    place.double("box", "PUT", "verify", "")?;
    Ok(())
}

/// Has Firecracker write what it has of its memory into a capture, and commits that with the disks.
fn capture_diff(place: &Place) -> Result<f64> {
    let api = place.folder("box").join("vmm/api");
    let capture = place.dir.join("live/.plane/files/capture/diff");
    let state = place.folder("box").join("vmm/state-of-diff");
    let call = |method: &str, path: &str, body: &Json| -> Result<()> {
        let answer = ask(&api, method, path, &body.to_string())?;
        ensure!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer:?}");
        Ok(())
    };
    let begun = Instant::now();
    call("PATCH", "/vm", &json!({ "state": "Paused" }))?;
    fs::create_dir(&capture)?;
    fs::write(capture.join("parent"), "vm")?;
    let body = json!({
        "snapshot_type": "Diff", "snapshot_path": state, "mem_file_path": capture.join("memory-diff"),
    });
    call("PUT", "/snapshot/create", &body)?;
    let status = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .arg("--store")
        .arg(&place.dir)
        .args(["-q", "commit", "diff", "--live", "box", "--parent", "none", "--capture"])
        .arg(&capture)
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "the capture was not committed");
    call("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    let took = begun.elapsed().as_secs_f64();
    fs::remove_file(&state)?;
    Ok(took)
}

fn time(times: Vec<f64>) -> Value {
    Value::Seconds(median(times))
}

fn seconds(answer: &Json, key: &str) -> Result<f64> {
    answer[key].as_f64().with_context(|| format!("no {key} in {answer}"))
}
