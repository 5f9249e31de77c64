//! A Cloud Hypervisor's memory that comes while its guest runs: what a guest touches is asked for at once,
//! everything else behind its back, page by page, as version 53 does.
//!
//! The connection is one for both, and one page is asked for at a time. A page that does not come ends the
//! process: its guest cannot go on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_sys::userfaultfd::{Event, Features, MESSAGE_BYTES, Register, Userfaultfd};

use super::offload::{PAGE_FAULT, read_head, request};
use crate::vmm::{EXIT_SETUP, PAGE_BYTES, fail};

/// A part of a guest's memory.
pub(super) struct Part {
    pub(super) gpa: u64,
    pub(super) addresses: Range<u64>,
    pub(super) file: File,
}

/// Pages that come.
pub(super) struct Postcopy {
    is_filling: Arc<AtomicBool>,
}

struct Pager {
    faults: UnixStream,
    uffd: Userfaultfd,
    parts: Vec<Part>,
    /// Addresses of pages that have come.
    here: BTreeSet<u64>,
    is_private: bool,
}

impl Postcopy {
    /// Lets pages come. Nobody may have touched any.
    pub(super) fn start(
        faults: UnixStream,
        parts: Vec<Part>,
        is_private: bool,
    ) -> Result<Postcopy> {
        let uffd = Userfaultfd::open(Features::NONE).context("cannot make a userfaultfd")?;
        for part in &parts {
            uffd.register(&part.addresses, Register::Missing).context("cannot register memory")?;
        }
        faults.set_read_timeout(None)?;
        let is_filling = Arc::new(AtomicBool::new(true));
        let filling = Arc::clone(&is_filling);
        let rest = std::env::var("DORMOUSE_DOUBLE_PREFAULT_REST_US").unwrap_or_default();
        let rest = Duration::from_micros(rest.parse().unwrap_or(0));
        let mut pager = Pager { faults, uffd, parts, here: BTreeSet::new(), is_private };
        std::thread::Builder::new().name("postcopy".to_owned()).spawn(move || {
            if let Err(error) = pager.work(rest) {
                fail(EXIT_SETUP, &format!("postcopy: {error:#}"));
            }
            filling.store(false, Ordering::SeqCst);
        })?;
        Ok(Postcopy { is_filling })
    }

    pub(super) fn is_filling(&self) -> bool {
        self.is_filling.load(Ordering::SeqCst)
    }
}

impl Pager {
    fn work(&mut self, rest: Duration) -> Result<()> {
        let page = PAGE_BYTES as u64;
        let pages = |part: &Part| part.addresses.clone().step_by(PAGE_BYTES);
        let all: Vec<u64> = self.parts.iter().flat_map(pages).collect();
        for address in all {
            self.answer_faults()?;
            self.fetch(address)?;
            std::thread::sleep(rest);
        }
        self.answer_faults()?;
        for part in &self.parts {
            self.uffd.unregister(&part.addresses)?;
            self.uffd.wake(&part.addresses)?;
        }
        ensure!(self.here.len() as u64 * page > 0, "a guest without memory");
        Ok(())
    }

    fn answer_faults(&mut self) -> Result<()> {
        loop {
            let mut messages = [[0; MESSAGE_BYTES]; 16];
            let count = match self.uffd.read(&mut messages) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
                count => count.context("cannot read faults")?,
            };
            if count == 0 {
                return Ok(());
            }
            for message in &messages[..count] {
                let Event::Fault { address, .. } = Event::parse(message) else { continue };
                let address = address / PAGE_BYTES as u64 * PAGE_BYTES as u64;
                self.fetch(address)?;
                self.uffd.wake(&(address..address + PAGE_BYTES as u64))?;
            }
        }
    }

    /// Asks for a page, and waits for it.
    fn fetch(&mut self, address: u64) -> Result<()> {
        if !self.here.insert(address) {
            return Ok(());
        }
        let part = self.parts.iter().find(|part| part.addresses.contains(&address));
        let part = part.context("a fault elsewhere")?;
        let offset = address - part.addresses.start;
        let mut asked = request(PAGE_FAULT, 16).to_vec();
        asked.extend((part.gpa + offset).to_le_bytes());
        asked.extend((PAGE_BYTES as u64).to_le_bytes());
        self.faults.write_all(&asked)?;
        let (status, length) = read_head(&mut self.faults).context("a page was not served")?;
        let expected = if self.is_private { PAGE_BYTES as u64 } else { 0 };
        ensure!(status == 1 && length == expected, "a page fault failed: {status}, {length}");
        if self.is_private {
            let mut bytes = [0; PAGE_BYTES];
            self.faults.read_exact(&mut bytes)?;
            part.file.write_all_at(&bytes, offset)?;
        }
        Ok(())
    }
}
