//! Which Firecracker loads which state: the major version of the state's format has to be its own,
//! and the minor not later (`snapshot/mod.rs`). Most releases have a format of their own.

use super::vmstate::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::kind::Version;

/// The first release with each version of the format. Releases in between have the earlier one.
const FORMATS: [(Version, Version); 9] = [
    (Version::new(1, 7, 0), Version::new(1, 0, 0)),
    (Version::new(1, 8, 0), Version::new(2, 0, 0)),
    (Version::new(1, 9, 0), Version::new(3, 0, 0)),
    (Version::new(1, 10, 1), Version::new(4, 0, 0)),
    (Version::new(1, 11, 0), Version::new(5, 0, 0)),
    (Version::new(1, 12, 0), Version::new(6, 0, 0)),
    (Version::new(1, 13, 0), Version::new(8, 0, 0)),
    (Version::new(1, 15, 0), Version::new(9, 0, 0)),
    (Version::new(1, 16, 0), Version::new(10, 0, 0)),
];

/// Later releases have formats that are not known here.
const KNOWN_UNTIL: Version = Version::new(1, 17, 0);

/// The version of the states that a release writes and loads, if it is known.
pub fn format_of(firecracker: Version) -> Option<Version> {
    if firecracker >= KNOWN_UNTIL {
        return None;
    }
    FORMATS.iter().rev().find(|(since, _)| *since <= firecracker).map(|(_, format)| *format)
}

/// Refuses a state that a Firecracker would not load. What is not known is let pass: Firecracker
/// itself refuses it then, and ends.
pub fn check(state: Header, firecracker: Version) -> Result<()> {
    let Some(format) = format_of(firecracker) else { return Ok(()) };
    let found = state.version;
    if found.major == format.major && found.minor <= format.minor {
        return Ok(());
    }
    let writer = FORMATS.iter().find(|(_, format)| format.major == found.major);
    let hint = writer.map(|(since, _)| format!("; {since} wrote it"));
    let context = format!(
        "the state has format {found}, and Firecracker {firecracker} loads {}.x{}; \
         use the version that made it",
        format.major,
        hint.unwrap_or_default(),
    );
    Err(Error::new(ErrorKind::Incompatible, context))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pairs_that_load_pass() {
        let releases: Vec<Version> = (7..=16).map(|minor| Version::new(1, minor, 0)).collect();
        let mut pairs = Vec::new();
        for writer in &releases {
            let state = Header { version: format_of(*writer).unwrap(), is_whole: true };
            for loader in &releases {
                if check(state, *loader).is_ok() && writer != loader {
                    pairs.push((writer.minor, loader.minor));
                }
            }
            check(state, *writer).unwrap();
            let patched = check(state, Version { patch: 3, ..*writer });
            assert_eq!(patched.is_ok(), writer.minor != 10, "{writer}");
        }
        assert_eq!(pairs, [(9, 10), (10, 9), (13, 14), (14, 13)]);
        let patched = Version::new(1, 10, 1);
        let state = Header { version: format_of(patched).unwrap(), is_whole: true };
        check(state, patched).unwrap();
        check(state, Version::new(1, 10, 0)).unwrap_err();
        let newer = Header { version: Version::new(3, 1, 0), is_whole: true };
        let error = check(newer, Version::new(1, 10, 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        check(newer, Version::new(1, 17, 0)).unwrap();
    }
}
