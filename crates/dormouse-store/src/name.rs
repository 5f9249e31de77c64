//! Names of snapshots, images and what is in them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The longest name in bytes: a file name with room for what we append.
pub const NAME_BYTES_MAX: usize = 128;

/// Names that mean something else in the tree that a store is mounted as.
const RESERVED: [&str; 3] = ["live", "capture", "discard"];

/// A name of a snapshot, disk, state or label: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks a name.
    pub fn new(text: impl Into<String>) -> Result<Name> {
        let text = text.into();
        let refuse = |why: &str| {
            Err(Error::new(ErrorKind::InvalidInput, format!("{text:?} is not a name: {why}")))
        };
        let mut bytes = text.bytes();
        let Some(first) = bytes.next() else { return refuse("it is empty") };
        if text.len() > NAME_BYTES_MAX {
            return refuse("it is longer than 128 bytes");
        }
        if !first.is_ascii_alphanumeric() {
            return refuse("it must begin with a letter or digit");
        }
        if !bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            return refuse("only letters, digits, '.', '_' and '-' are allowed");
        }
        if RESERVED.contains(&text.as_str()) {
            return refuse("it is reserved");
        }
        Ok(Name(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Name> {
        Name::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Name> {
        Name::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

/// A snapshot as a user names it: `NAME@N`, or `NAME` for the newest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapRef {
    /// The name.
    pub name: Name,

    /// The number; `None` means the newest.
    pub number: Option<u64>,
}

impl fmt::Display for SnapRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "{}@{number}", self.name),
            None => self.name.fmt(f),
        }
    }
}

impl FromStr for SnapRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<SnapRef> {
        match text.split_once('@') {
            None => Ok(SnapRef { name: Name::new(text)?, number: None }),
            Some((name, digits)) => {
                let number = digits
                    .parse()
                    .ok()
                    .filter(|number: &u64| *number > 0 && number.to_string() == digits)
                    .ok_or_else(|| {
                        Error::new(
                            ErrorKind::InvalidInput,
                            format!(
                                "{text:?} is not a snapshot: expected NAME or NAME@N with N from 1"
                            ),
                        )
                    })?;
                Ok(SnapRef { name: Name::new(name)?, number: Some(number) })
            }
        }
    }
}

/// An image in a snapshot: `memory`, `disk/ID` or `state/NAME`. A bare `ID` is a disk's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageName {
    /// A disk. Disks come first: memory is mostly page cache, so it is matched against them.
    Disk(Name),

    /// The guest's memory.
    Memory,

    /// An opaque state file of the VMM.
    State(Name),
}

impl ImageName {
    /// Whether this is a disk.
    pub fn is_disk(&self) -> bool {
        matches!(self, ImageName::Disk(_))
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageName::Disk(id) => f.pad(&format!("disk/{id}")),
            ImageName::Memory => f.pad("memory"),
            ImageName::State(name) => f.pad(&format!("state/{name}")),
        }
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(text: &str) -> Result<ImageName> {
        match text.split_once('/') {
            None if text == "memory" => Ok(ImageName::Memory),
            None => Ok(ImageName::Disk(Name::new(text)?)),
            Some(("disk", id)) => Ok(ImageName::Disk(Name::new(id)?)),
            Some(("state", name)) => Ok(ImageName::State(Name::new(name)?)),
            Some(_) => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is not an image: expected memory, disk/ID or state/NAME"),
            )),
        }
    }
}

impl TryFrom<String> for ImageName {
    type Error = Error;

    fn try_from(text: String) -> Result<ImageName> {
        text.parse()
    }
}

impl From<ImageName> for String {
    fn from(image: ImageName) -> String {
        image.to_string()
    }
}

/// An image of a snapshot: `SNAP:IMAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef {
    /// The snapshot.
    pub snap: SnapRef,

    /// The image in it.
    pub image: ImageName,
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.snap, self.image)
    }
}

impl FromStr for ImageRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<ImageRef> {
        let (snap, image) = text.split_once(':').ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("{text:?} is not SNAP:IMAGE"))
        })?;
        Ok(ImageRef { snap: snap.parse()?, image: image.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_their_alphabet() {
        for good in ["a", "A9", "vm-1.2_x", "0", &"x".repeat(128)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        let long = "x".repeat(129);
        for bad in [
            "", ".", "..", "../x", "-a", "_a", "a/b", "a b", "ä", "a@1", "a:b", "live", "capture",
            "discard", &long,
        ] {
            assert_eq!(Name::new(bad).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad:?}");
        }
    }

    #[test]
    fn snapshots_and_images_round_trip() {
        for text in ["vm", "vm@1", "vm@18446744073709551615"] {
            assert_eq!(text.parse::<SnapRef>().unwrap().to_string(), text);
        }
        for bad in
            ["vm@", "vm@0", "vm@-1", "vm@01", "vm@+1", "@1", "vm@1@2", "vm@18446744073709551616"]
        {
            bad.parse::<SnapRef>().unwrap_err();
        }
        for (text, full) in [
            ("memory", "memory"),
            ("root", "disk/root"),
            ("disk/d0", "disk/d0"),
            ("state/vmstate", "state/vmstate"),
        ] {
            assert_eq!(text.parse::<ImageName>().unwrap().to_string(), full);
        }
        for bad in ["", "disk/", "x/y", "state/a/b", "disk/../x"] {
            bad.parse::<ImageName>().unwrap_err();
        }
        assert_eq!("vm@3:memory".parse::<ImageRef>().unwrap().to_string(), "vm@3:memory");
        "vm".parse::<ImageRef>().unwrap_err();
    }
}
