//! A file of bytes, dense or sparse: one image, as it is.

use std::path::Path;

use dormouse_store::name::{ImageName, Name};

use crate::data::StableFile;
use crate::error::Result;
use crate::format::Format;
use crate::import::{Body, Found, Generation, LookOptions, NewContent};

/// Looks at a file that is a disk.
pub fn look(path: &Path, options: &LookOptions) -> Result<Found> {
    StableFile::open(path)?;
    let name = options.disk.clone().map_or_else(|| Name::new("root"), Ok)?;
    let mut generation = Generation::new(path.display().to_string());
    let body =
        if options.is_diff { Body::Diff(path.to_owned()) } else { Body::File(path.to_owned()) };
    generation.images.push(NewContent { image: ImageName::Disk(name), body, replay: None });
    Ok(Found {
        format: Format::Raw,
        version: "bytes".to_owned(),
        generations: vec![generation],
        notes: Vec::new(),
        is_whole: false,
        base: None,
    })
}
