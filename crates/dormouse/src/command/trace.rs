//! `dormouse trace show`: draws in which order waking VMs touch a snapshot's memory.

use std::io::Write;

use anyhow::{Context, Result};
use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};
use dormouse_live::trace::{Wake, WakeKind};
use dormouse_store::name::ImageName;
use serde::Serialize;

use crate::app::App;
use crate::cli::TraceShowArgs;
use crate::exit::{Fault, Kind};
use crate::live::read_trace;
use crate::output::size::{human, percent};
use crate::output::trace::{Plot, svg, terminal};

#[derive(Serialize)]
struct TraceObject {
    snapshot: String,
    size_bytes: u64,
    touched_bytes: u64,
    wakes: Vec<WakeObject>,
    runs: Vec<RunObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    svg: Option<String>,
}

#[derive(Serialize)]
struct WakeObject {
    kind: &'static str,
    touched_bytes: u64,
}

#[derive(Serialize)]
struct RunObject {
    offset: u64,
    length: u64,
}

pub(super) fn show(app: &mut App, args: &TraceShowArgs) -> Result<()> {
    let store = app.open()?;
    let snapshot = store.snapshot(&args.snap)?;
    let name = snapshot.manifest().display_name();
    let trace = read_trace(&snapshot)?.ok_or_else(|| {
        let message = format!("{name} has no trace; it gets one when a VM wakes from it");
        Fault::new(Kind::NotFound, message)
    })?;
    let size_bytes = snapshot.image(&ImageName::Memory)?.size_bytes();
    let (order, image_blocks) = (trace.order(), blocks_in(size_bytes));
    let touched: u64 = order.iter().map(|run| run.end - run.start).sum();
    let touched_bytes = touched * BLOCK_BYTES_U64;
    let what = format!(
        "{} of {} touched ({}), in {} runs, as {} wakes agree",
        human(touched_bytes),
        human(size_bytes),
        percent(touched_bytes, size_bytes),
        order.len(),
        trace.wakes().len(),
    );
    if let Some(path) = &args.svg {
        let plot = Plot::new(svg::COLUMNS, svg::ROWS, &order, image_blocks);
        std::fs::write(path, svg::draw(&name, &what, &plot))
            .with_context(|| format!("write {}", path.display()))?;
    }
    if app.json {
        let object = TraceObject {
            snapshot: name,
            size_bytes,
            touched_bytes,
            wakes: trace.wakes().iter().map(wake_object).collect(),
            runs: order
                .iter()
                .map(|run| RunObject {
                    offset: run.start * BLOCK_BYTES_U64,
                    length: (run.end - run.start) * BLOCK_BYTES_U64,
                })
                .collect(),
            svg: args.svg.as_ref().map(|path| path.display().to_string()),
        };
        app.out.json(&object)?;
    } else if let Some(path) = &args.svg {
        app.say(&format!("drew the trace of {name} to {}", path.display()));
    } else {
        let plot = Plot::new(terminal::COLUMNS, terminal::ROWS, &order, image_blocks);
        let drawing = terminal::draw(&name, &what, &plot, app.palette);
        app.out.write_all(drawing.as_bytes())?;
    }
    Ok(())
}

fn wake_object(wake: &Wake) -> WakeObject {
    let kind = match wake.kind() {
        WakeKind::Whole => "whole",
        WakeKind::Misses => "misses",
    };
    WakeObject { kind, touched_bytes: wake.blocks() * BLOCK_BYTES_U64 }
}
