//! `dormouse clone`: a copy of an image that takes as little as the file system allows.

use std::io;

use anyhow::{Context, Result};
use dormouse_sys::clone::clone_file;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::CloneArgs;
use crate::exit::{Fault, Kind};

#[derive(Serialize)]
struct CloneObject {
    source: String,
    target: String,
    way: &'static str,
}

pub(super) fn run(app: &mut App, args: &CloneArgs) -> Result<()> {
    let work = app.work()?;
    let (source, target) = (args.source.display().to_string(), args.target.display().to_string());
    let way = clone_file(&args.source, &args.target, &|| work.is_cancelled());
    drop(work);
    let way = match way {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            return Err(Fault::new(Kind::Cancelled, "cancelled").into());
        }
        way => way.with_context(|| format!("clone {source} to {target}"))?.word(),
    };
    if app.json {
        app.out.json(&CloneObject { source, target, way })?;
    } else {
        app.say(&format!("cloned {source} to {target} by {way}"));
    }
    Ok(())
}
