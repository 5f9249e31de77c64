//! `dormouse show`: a snapshot's images, figures, and how much of which pack it uses.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Result;
use dormouse_store::manifest::{Figures, Manifest};
use dormouse_store::usage::PackUse;
use serde::Serialize;

use crate::app::App;
use crate::cli::SnapArgs;
use crate::output::colour::Palette;
use crate::output::size::{human, percent};
use crate::output::table::{Column, Table};
use crate::output::time::utc;

#[derive(Serialize)]
pub(crate) struct ShowObject<'a> {
    snapshot: String,
    manifest: &'a Manifest,
    packs: &'a [PackUse],
}

/// A snapshot, as `show --json` prints it.
pub(crate) fn show_object<'a>(manifest: &'a Manifest, packs: &'a [PackUse]) -> ShowObject<'a> {
    ShowObject { snapshot: manifest.display_name(), manifest, packs }
}

pub(super) fn run(app: &mut App, args: &SnapArgs) -> Result<()> {
    let snapshot = app.open()?.snapshot(&args.snap)?;
    let work = app.work()?;
    let packs = snapshot.packs(work.job())?;
    drop(work);
    let manifest = snapshot.manifest();
    if app.json {
        app.out.json(&show_object(manifest, &packs))?;
    } else {
        let palette = app.palette;
        let text = [
            head(manifest, palette),
            images(manifest, palette),
            figures(&manifest.figures, palette),
            layout(manifest, palette),
            packs_table(&packs, palette),
        ];
        let text: Vec<String> = text.into_iter().filter(|part| !part.is_empty()).collect();
        app.out.write_all(text.join("\n").as_bytes())?;
    }
    Ok(())
}

fn head(manifest: &Manifest, palette: Palette) -> String {
    let mut text = format!("{}\n", palette.bold(&manifest.display_name()));
    let mut line = |key: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {key:<12} {value}");
    };
    line("uuid", &manifest.uuid.to_string());
    line("created", &format!("{} UTC", utc(manifest.created)));
    if let Some(parent) = &manifest.parent {
        line("parent", &format!("{}@{}", parent.name, parent.number));
    }
    let vmm = &manifest.vmm;
    if let Some(kind) = &vmm.kind {
        line(
            "vmm",
            [kind.as_str(), vmm.version.as_deref().unwrap_or_default()].join(" ").trim_end(),
        );
    }
    for (key, value) in
        [("cpu model", &vmm.cpu_model), ("host kernel", &vmm.host_kernel), ("arch", &vmm.arch)]
    {
        if let Some(value) = value {
            line(key, value);
        }
    }
    if let Some(vcpus) = vmm.vcpus {
        line("vcpus", &vcpus.to_string());
    }
    for (key, value) in &manifest.labels {
        line("label", &format!("{key}={value:?}"));
    }
    text
}

fn images(manifest: &Manifest, palette: Palette) -> String {
    let columns = [
        Column::Text("IMAGE"),
        Column::Number("SIZE"),
        Column::Number("NOT ZERO"),
        Column::Number("CHANGED"),
        Column::Number("NEW"),
        Column::Number("STORED"),
    ];
    let mut table = Table::new(palette, &columns);
    for entry in &manifest.images {
        let size = human(entry.size_bytes);
        let [nonzero, changed, new, stored] = match &entry.figures {
            Some(figures) => [
                human(figures.nonzero_bytes),
                human(figures.changed_bytes),
                human(figures.new_bytes),
                human(figures.stored_bytes),
            ],
            None => ["-", "inherited", "-", "-"].map(str::to_owned),
        };
        table.row([entry.image.to_string(), size, nonzero, changed, new, stored]);
    }
    table.render()
}

fn figures(figures: &Figures, palette: Palette) -> String {
    let columns = [Column::Text("THIS COMMIT"), Column::Number("BYTES"), Column::Number("OF RAW")];
    let mut table = Table::new(palette, &columns);
    for (what, bytes) in [
        ("raw", figures.raw_bytes),
        ("zero", figures.zero_bytes),
        ("unchanged", figures.unchanged_bytes),
        ("found elsewhere", figures.elsewhere_bytes),
        ("found in itself", figures.self_bytes),
        ("(of those, from disks)", figures.from_disks_bytes),
        ("new", figures.new_bytes),
        ("new, compressed", figures.stored_bytes),
        ("map nodes", figures.map_bytes),
    ] {
        table.row([what.to_owned(), human(bytes), percent(bytes, figures.raw_bytes)]);
    }
    table.render()
}

fn layout(manifest: &Manifest, palette: Palette) -> String {
    if manifest.memory_layout.is_empty() {
        return String::new();
    }
    let columns = [
        Column::Text("MEMORY BLOCK"),
        Column::Number("IN IMAGE"),
        Column::Number("IN GUEST"),
        Column::Number("LENGTH"),
        Column::Number("PAGE"),
        Column::Text("PLUGGED"),
    ];
    let mut table = Table::new(palette, &columns);
    for row in &manifest.memory_layout {
        table.row([
            if row.block.is_empty() { "-".to_owned() } else { row.block.clone() },
            format!("{:#x}", row.image_offset),
            row.guest_address.map_or_else(|| "?".to_owned(), |address| format!("{address:#x}")),
            human(row.length),
            human(row.page_size),
            if row.plugged { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table.render()
}

fn packs_table(packs: &[PackUse], palette: Palette) -> String {
    let columns = [
        Column::Text("PACK"),
        Column::Number("SOURCE"),
        Column::Text("WRITTEN BY"),
        Column::Number("IN FILE"),
        Column::Number("SLOTS"),
        Column::Number("USED"),
        Column::Number("SHARE"),
        Column::Number("USED BYTES"),
    ];
    let mut table = Table::new(palette, &columns);
    for pack in packs {
        table.row([
            pack.pack.chars().take(12).collect(),
            pack.source.to_string(),
            pack.written_by.clone().unwrap_or_else(|| "(removed)".to_owned()),
            if pack.is_lost { "LOST".to_owned() } else { human(pack.file_bytes) },
            pack.slots.to_string(),
            pack.used_slots.to_string(),
            percent(pack.used_slots, pack.slots),
            human(pack.used_bytes),
        ]);
    }
    table.render()
}
