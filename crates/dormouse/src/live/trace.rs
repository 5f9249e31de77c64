//! The trace of a snapshot: bytes to the store, an order of blocks to whoever wakes a VM.

use anyhow::Result;
use dormouse_image::block::blocks_in;
use dormouse_live::trace::{TRACE_BYTES_MAX as LIVE_BYTES_MAX, Trace};
use dormouse_store::name::ImageName;
use dormouse_store::store::Snapshot;
use dormouse_store::trace::TRACE_BYTES_MAX;

const _: () = assert!(LIVE_BYTES_MAX as u64 <= TRACE_BYTES_MAX);

/// The snapshot's trace, as far as its memory goes. One that cannot be used is as good as none: it is
/// advice, so that is a warning.
pub(crate) fn read_trace(snapshot: &Snapshot) -> Result<Option<Trace>> {
    let manifest = snapshot.manifest();
    let memory = snapshot.image(&ImageName::Memory)?;
    let trace = match snapshot.trace() {
        Ok(None) => return Ok(None),
        Ok(Some(bytes)) => {
            Trace::parse(&bytes, *manifest.uuid.as_bytes()).map_err(anyhow::Error::from)
        }
        Err(error) => Err(error.into()),
    };
    match trace {
        Ok(trace) => Ok(Some(trace.within(blocks_in(memory.size_bytes())))),
        Err(error) => {
            let snapshot = manifest.display_name();
            tracing::warn!(%snapshot, "a trace that cannot be used is left out: {error:#}");
            Ok(None)
        }
    }
}
