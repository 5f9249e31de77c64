//! What is at a path: which format, which version, and what is wrong with it.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::import::{Found, LookOptions, is_file};

/// What was detected.
#[derive(Debug)]
pub struct Detected {
    /// Whose it is.
    pub format: Format,

    /// The version, where it can be read.
    pub version: Option<String>,

    /// What it holds, in words, one thing a line.
    pub facts: Vec<String>,

    /// What is wrong with it or missing, and keeps it from being imported.
    pub problem: Option<Error>,
}

/// Opens what is at a path as a format.
pub fn look(format: Format, path: &Path, options: &LookOptions) -> Result<Found> {
    match format {
        Format::Wrenn => crate::wrenn::look(path, options),
        Format::E2b => crate::e2b::look(path, options),
        Format::DmSnapshot => crate::dm_snapshot::look(path, options),
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!("{other} cannot be imported from a path"),
        )),
    }
}

/// Says what is at a path.
pub fn detect(path: &Path, options: &LookOptions) -> Result<Detected> {
    let format = guess(path)?;
    let (version, facts, problem) = match look(format, path, options) {
        Ok(found) => {
            let mut facts = found.notes;
            for generation in &found.generations {
                let images: Vec<_> =
                    generation.images.iter().map(|content| content.image.to_string()).collect();
                facts.push(format!("{}: {}", generation.title, images.join(", ")));
            }
            (Some(found.version), facts, None)
        }
        Err(error) => (None, Vec::new(), Some(error)),
    };
    Ok(Detected { format, version, facts, problem })
}

/// Whose it is, by names and first bytes.
fn guess(path: &Path) -> Result<Format> {
    if path.is_dir() {
        if let Some(format) = guess_folder(path) {
            return Ok(format);
        }
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("{} is of no format that is known", path.display()),
    ))
}

fn guess_folder(path: &Path) -> Option<Format> {
    let has = |name: &str| is_file(&path.join(name));
    if has("metadata.json") || has("rootfs.ext4.header") {
        return Some(Format::E2b);
    }
    has("memfile.header").then_some(Format::Wrenn)
}
