//! `dormouse export --as`: a snapshot in another system's format.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_formats::export::{ExportRequest, export};
use dormouse_formats::format::Format;
use dormouse_store::name::SnapRef;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::app::App;
use crate::cli::ExportArgs;
use crate::cli::formats::AsFormat;
use crate::exit::Fault;
use crate::output::size::human;

/// The longest list of what a receiver has: a million UUIDs.
const HAS_BYTES_MAX: u64 = 64 << 20;

#[derive(Serialize)]
struct ExportAsObject {
    snapshot: String,
    format: &'static str,
    format_version: String,
    path: String,
    files: Vec<FileRow>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct FileRow {
    name: String,
    size_bytes: u64,
}

pub(super) fn run(app: &mut App, args: &ExportArgs, snap: &SnapRef, to: &AsFormat) -> Result<()> {
    if args.force || args.diff_from.is_some() {
        let message =
            "--force and --diff-from are for our own exports; with --as, a diff is --base";
        return Err(Fault::usage(message).into());
    }
    let is_pipe = args.path.as_os_str() == "-";
    if is_pipe && to.format != Format::Carry {
        let message = format!("{} is not written to standard output; name a path", to.format);
        return Err(Fault::usage(message).into());
    }
    let options = &args.other;
    if options.has.is_some() && to.format != Format::Carry {
        return Err(Fault::usage(format!("{} has no use for --has; carry has", to.format)).into());
    }
    let request = ExportRequest {
        version: to.version.clone(),
        data_codec: to.compression,
        build_id: options.build_id,
        base: options.base.clone(),
        disk: options.disk.as_ref().map(ToString::to_string),
        has: options.has.as_deref().map(read_has).transpose()?.unwrap_or_default(),
        rewrite: options.rewrite.clone(),
    };
    let store = app.open()?;
    let snap = store.resolve(snap)?;
    let work = app.work()?;
    let report = export(&store, &snap, &args.path, to.format, &request, work.job())?;
    drop(work);
    let object = ExportAsObject {
        snapshot: snap.to_string(),
        format: report.format.word(),
        format_version: report.version,
        path: report.path.display().to_string(),
        files: report
            .files
            .into_iter()
            .map(|(name, size_bytes)| FileRow { name, size_bytes })
            .collect(),
        notes: report.notes,
    };
    // Standard output is the carry's own.
    if app.json && !is_pipe {
        app.out.json(&object)?;
        return Ok(());
    }
    object.notes.iter().for_each(|note| app.say(note));
    let bytes = object.files.iter().map(|file| file.size_bytes).sum();
    app.say(&format!(
        "wrote {} as {} {} to {} ({})",
        object.snapshot,
        object.format,
        object.format_version,
        object.path,
        human(bytes)
    ));
    Ok(())
}

/// The UUIDs in a file, one a line or as the JSON of `have`.
fn read_has(path: &Path) -> Result<BTreeSet<Uuid>> {
    let what = || format!("read what the receiver has from {}", path.display());
    let length = path.metadata().with_context(what)?.len();
    if length > HAS_BYTES_MAX {
        let message = format!("{} has {length} bytes; at most {HAS_BYTES_MAX}", path.display());
        return Err(Fault::usage(message).into());
    }
    let text = std::fs::read_to_string(path).with_context(what)?;
    parse_has(&text).map_err(|wrong| {
        let what = format!(
            "{}: {wrong}; expected what `dormouse have` prints, a UUID a line",
            path.display()
        );
        Fault::usage(what).into()
    })
}

fn parse_has(text: &str) -> Result<BTreeSet<Uuid>, String> {
    #[derive(Deserialize)]
    struct Have {
        uuids: BTreeSet<Uuid>,
    }
    if text.trim_start().starts_with('{') {
        let have: Have = serde_json::from_str(text).map_err(|error| error.to_string())?;
        return Ok(have.uuids);
    }
    let lines = (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty());
    lines
        .map(|(number, line)| {
            line.parse().map_err(|_| format!("line {number} is {line:.100?}, which is no UUID"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Junk was skipped, so a list of another program said that the receiver has nothing.
    #[test]
    fn what_the_receiver_has_is_read_or_refused() {
        let one = "0199a3e2-6c1f-7c52-9d0e-6f3c1a2b4d5e";
        let json = format!("{{\"version\":1,\"uuids\":[\"{one}\"]}}\n");
        for text in [format!("{one}\n"), format!("\n  {one}\r\n\n"), json] {
            let has = parse_has(&text).unwrap();
            assert_eq!(has.into_iter().map(|uuid| uuid.to_string()).collect::<Vec<_>>(), [one]);
        }
        assert!(parse_has("").unwrap().is_empty());
        for (text, told) in [
            (format!("{one}\nvm@1\n"), "line 2"),
            (format!("{one} {one}\n"), "line 1"),
            ("{\"uuids\":[\n\"vm\"]}".to_owned(), "line 2"),
            ("{}".to_owned(), "line 1"),
        ] {
            let wrong = parse_has(&text).unwrap_err();
            assert!(wrong.contains(told), "{text}: {wrong}");
        }
    }
}
