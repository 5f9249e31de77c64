//! What can be chosen about an image.

use crate::error::{Error, ErrorKind, Result};

/// How large the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// So many bytes, at least 1 MiB; what is less than a block at the end stays unused.
    Exactly(u64),

    /// As few as the tree needs and so many bytes that stay free, rounded up to 1 MiB.
    Slack(u64),
}

/// What the image is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uuid {
    /// A hash of the tree's names and attributes.
    Derived,

    /// This one.
    Given([u8; 16]),
}

/// How long the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Journal {
    /// By the image's size: from 4 MiB below 128 MiB to 1 GiB from 128 GiB on. None below 8 MiB.
    Standard,

    /// So many bytes, at least 4 MiB.
    Bytes(u64),

    /// None.
    None,
}

/// The shortest journal that the kernel takes.
const JOURNAL_BYTES_MIN: u64 = 4 << 20;

/// The longest that jbd2 numbers.
const JOURNAL_BYTES_MAX: u64 = 40 << 30;

/// The smallest image.
const SIZE_BYTES_MIN: u64 = 1 << 20;

/// The longest label.
const LABEL_BYTES_MAX: usize = 16;

/// What can be chosen about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How large it is.
    pub size: Size,

    /// Its name, at most 16 bytes.
    pub label: String,

    /// What it is known by.
    pub uuid: Uuid,

    /// How long its journal is.
    pub journal: Journal,

    /// Blocks for root alone, in percent of all: at most 50.
    pub reserved_percent: u8,

    /// How many inodes it has at least; one for each 16 KiB if not said.
    pub inodes: Option<u32>,

    /// The second that stands for now (`SOURCE_DATE_EPOCH`): no time in the image is later.
    pub epoch: Option<i64>,
}

impl Options {
    /// An image of a size, with a standard journal and no label.
    pub fn new(size: Size) -> Options {
        Options {
            size,
            label: String::new(),
            uuid: Uuid::Derived,
            journal: Journal::Standard,
            reserved_percent: 0,
            inodes: None,
            epoch: None,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::new(ErrorKind::InvalidInput, what));
        if let Size::Exactly(bytes) = self.size
            && bytes < SIZE_BYTES_MIN
        {
            return wrong(format!("an image of {bytes} bytes; 1 MiB is the least"));
        }
        if self.label.len() > LABEL_BYTES_MAX || self.label.contains('\0') {
            return wrong(format!("label {:?} has more than 16 bytes or a zero byte", self.label));
        }
        if let Journal::Bytes(bytes) = self.journal
            && !(JOURNAL_BYTES_MIN..=JOURNAL_BYTES_MAX).contains(&bytes)
        {
            return wrong(format!("a journal of {bytes} bytes; 4 MiB to 40 GiB can be"));
        }
        if self.reserved_percent > 50 {
            return wrong(format!("{} % reserved; 50 % is the most", self.reserved_percent));
        }
        Ok(())
    }
}
