//! VMs through the daemon: what we add to a wake, to forks and to a freeze; what an idle one stores; dumps
//! of memory; and fifty at once.
//!
//! Wakes, forks and the fifty are of doubles of Firecracker, which are this very program; the freeze and
//! the idle sleep are of real QEMU guests. Our share of a wake is what the client waits less what the
//! VMM's process takes from its start to the guest's going on.

mod dumps;
mod fleet;
mod guests;
mod place;
mod wakes;

use anyhow::Result;

use crate::report::Report;
use crate::scratch::Scratch;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    wakes::measure(scratch, report)?;
    guests::measure(scratch, report)?;
    dumps::measure(scratch, report)?;
    fleet::measure(scratch, report)
}

fn quantile(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let index = (times.len() as f64 * part) as usize;
    times.get(index.min(times.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
