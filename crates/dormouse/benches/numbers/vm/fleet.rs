//! Fifty VMs that live and work at once: what the daemon takes, and how long their pages do.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use serde_json::{Value as Json, json};

use super::place::Place;
use super::quantile;
use crate::report::{Bar, Report, Row, Value};
use crate::rounds::Random;
use crate::scratch::Scratch;

const VMS: usize = 50;
const MEMORY_MIB: u64 = 128;

/// Pages of each VM that are touched.
const TOUCHES: usize = 200;

/// What the daemon may hold; docs/api.md says so.
const DAEMON_BYTES: f64 = 128.0 * (1 << 20) as f64;

pub(super) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let place = Place::new(scratch, "fleet")?;
    let guest = place.double_guest(MEMORY_MIB)?;
    place.post("/v1/vms", &json!({ "name": "box", "guest": guest }))?;
    place.post("/v1/vms/box/sleep", &json!({ "as": "vm" }))?;
    let names: Vec<String> = (0..VMS).map(|number| format!("vm-{number}")).collect();
    place.post("/v1/snapshots/vm/fork", &json!({ "names": names }))?;
    let mut random = Random::new(31);
    let pages = (MEMORY_MIB << 20) / 4096;
    let mut times: Vec<f64> = Vec::new();
    // In turns, so that each page of a VM is asked for while all others work; and not from the page cache,
    // but for pages that another VM has mapped.
    let memory = File::open(place.dir.join("live/.plane/files/vm/1/memory"))?;
    for _ in 0..10 {
        for live in &names {
            rustix::fs::fadvise(&memory, 0, None, rustix::fs::Advice::DontNeed)?;
            let wanted: Vec<u64> = (0..TOUCHES / 10).map(|_| random.below(pages)).collect();
            let body = json!(wanted).to_string();
            let touched: Json = serde_json::from_str(&place.double(live, "PUT", "touch", &body)?)?;
            let taken = touched["latencies_ns"].as_array().context("no latencies")?;
            ensure!(taken.len() == wanted.len(), "{} of {}", taken.len(), wanted.len());
            times.extend(taken.iter().filter_map(Json::as_f64).map(|ns| ns / 1e9));
        }
    }
    for live in names.iter().step_by(10) {
        place.double(live, "PUT", "verify", "")?;
    }
    let [p50, p99, worst] = [0.5, 0.99, 1.0].map(|part| quantile(&mut times, part));
    report.row(
        Row::new(
            format!("{VMS} VMs of {MEMORY_MIB} MiB at work, a page, p99"),
            Value::Seconds(p99),
        )
        .bar(Bar::AtMost(20e-3)),
    );
    report.row(Row::new("  p50", Value::Seconds(p50)));
    report.row(Row::new("  the worst of all", Value::Seconds(worst)));
    let resident = place.metric("dormouse_daemon_resident_bytes")?;
    report.row(
        Row::new("  the daemon's memory", Value::Bytes(resident)).bar(Bar::AtMost(DAEMON_BYTES)),
    );
    let own = VMS as f64;
    for (what, name, more) in [("threads", "threads", own), ("descriptors", "descriptors", 0.0)] {
        let has = place.metric(&format!("dormouse_daemon_{name}"))?;
        let most = place.metric(&format!("dormouse_daemon_{name}_max"))? + more;
        report.row(Row::new(format!("  its {what}"), Value::Count(has)).bar(Bar::AtMost(most)));
    }
    Ok(())
}
