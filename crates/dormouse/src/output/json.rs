//! What all JSON objects have in common.

use serde::Serialize;

/// The version of the objects' fields. Fields may be added to a version, never changed or removed.
pub(crate) const VERSION: u32 = 1;

/// An object with its version in front.
#[derive(Debug, Serialize)]
pub(crate) struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    value: &'a T,
}

impl<'a, T: Serialize> Versioned<'a, T> {
    /// `value`, which must be a structure or a map, with the version.
    pub(crate) fn new(value: &'a T) -> Versioned<'a, T> {
        Versioned { version: VERSION, value }
    }
}
