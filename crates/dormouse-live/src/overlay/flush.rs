//! Flushing: everything written before is durable after.

use std::sync::atomic::Ordering;

use super::Overlay;
use crate::error::Result;

impl Overlay {
    /// Makes all that was written before this call durable, whoever wrote it.
    ///
    /// Flushes that wait for another one are answered together by the next. A flush fails as long
    /// as an earlier request's failure is not made good, but does its work all the same.
    pub fn flush(&self) -> Result<()> {
        self.settle()?;
        self.failures.check()
    }

    /// Does the work of a flush, whatever failed before.
    pub(super) fn settle(&self) -> Result<()> {
        let seen = self.round.load(Ordering::Acquire);
        let mut succeeded = self.flushed();
        self.failures.check_poison()?;
        if *succeeded > seen {
            // That round began after this call did, so it covers what this call has to.
            return Ok(());
        }
        let round = self.round.fetch_add(1, Ordering::AcqRel) + 1;
        // Before the stack is looked up and its states are taken: what is noted in the file that is
        // left is in them.
        self.notes.begin_flush();
        let stack = self.stack.load_full();
        let mut first_error = None;
        for layer in stack.layers.iter().rev() {
            if let Err(error) = layer.flush(&*self.folder, &self.failures) {
                first_error.get_or_insert(error);
            }
        }
        if let Some(error) = first_error {
            return Err(error);
        }
        self.notes.end_flush();
        *succeeded = round;
        Ok(())
    }

    /// Writes `bytes` at `offset`, durable on return (FUA). A flush of everything: the one
    /// `fdatasync` it comes down to does not know parts.
    pub fn write_durably(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.write_at(bytes, offset)?;
        self.flush()
    }
}
