//! What a test and its small VMM say to each other: a line of JSON each way.

use std::ops::AddAssign;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the VMM is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// Sets all threads to work, and is answered at once.
    Start(Work),
    /// Waits until all threads are done.
    Idle,
    /// Stops all threads between two operations.
    Pause,
    Resume,
    /// One thread touches these pages, one after the other.
    Touch {
        pages: Vec<u64>,
        access: Access,
    },
    /// All threads check all of memory.
    Verify,
    Checksum,
    /// What happened to pages since the last mark.
    Pages,
    Mark,
    /// Writes what memory must be to a file. Touches no memory.
    WriteExpected(PathBuf),
    Quit,
}

/// How much.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Work {
    /// Operations of all threads together.
    Operations(u64),
    Milliseconds(u64),
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Memory is there, and handed over if it is to be.
    Ready(Vec<RegionAddress>),
    Done,
    Report(Report),
    Touched(Touched),
    Checksum(u64),
    Pages(Vec<PageRun>),
    /// It could not be done; the VMM goes on.
    Failed(String),
}

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Reads a word; the page is checked.
    Read,
    /// Writes a word.
    Write,
}

/// What touching pages took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Touched {
    /// From the first to the last, in nanoseconds.
    pub elapsed_ns: u64,

    /// Each page's first access, in nanoseconds, in the order they were touched.
    pub latencies_ns: Vec<u64>,
}

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionAddress {
    /// In the VMM's address space.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// In the image.
    pub offset: u64,
    /// Bytes of its pages.
    pub page_bytes: u64,
}

/// What happened to a run of pages since the last mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// The first page.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// Written to, and not given back since.
    pub written: bool,
    /// Given back, and perhaps written to since.
    pub given_back: bool,
    /// Read or written.
    pub touched: bool,
}

/// What threads did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Operations, those included that found their page taken by another thread.
    pub operations: u64,
    /// Pages read and checked.
    pub reads: u64,
    /// Of those, pages that changed while they were read, so that nothing could be said.
    pub unjudged: u64,
    /// Words written.
    pub writes: u64,
    /// Whole pages written.
    pub fills: u64,
    /// Pages given back.
    pub given_back: u64,
}

impl AddAssign for Report {
    fn add_assign(&mut self, other: Report) {
        self.operations += other.operations;
        self.reads += other.reads;
        self.unjudged += other.unjudged;
        self.writes += other.writes;
        self.fills += other.fills;
        self.given_back += other.given_back;
    }
}
