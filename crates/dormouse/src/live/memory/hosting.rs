//! A VMM's memory under a pager of this process: as the VMM hands it over, and as a predecessor of
//! this process left it.

use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_live::pages::Pages;
use dormouse_serve::error::{Error as ServeError, ErrorKind as ServeErrorKind};
use dormouse_serve::uffd::handshake::{Layout, check};
use dormouse_serve::uffd::{End, MemorySource, Pager, Vm};
use dormouse_sys::peer::Peer;

use super::door::Arrival;
use super::{Keeping, LiveMemory, Orphan};

/// Has the descriptors of a VMM kept, before a page of it is served.
pub(crate) fn keep(keeping: &Keeping, arrival: &Arrival) -> Result<Pages> {
    let pages = arrival.pages()?;
    keeping
        .keep(&arrival.handshake, &arrival.socket, &pages)
        .context("the VMM's descriptors cannot be kept")?;
    Ok(pages)
}

/// Serves a VMM whose descriptors are kept.
pub(crate) fn serve(
    pager: &Pager,
    memory: &LiveMemory,
    arrival: Arrival,
    pages: Pages,
    on_end: impl FnOnce(&Vm, End) + Send + 'static,
) -> Result<Arc<Vm>> {
    let source = Arc::clone(memory.source()) as Arc<dyn MemorySource>;
    let (handshake, socket) = (arrival.handshake, arrival.socket);
    let vm = pager.serve_with(handshake, socket, source, pages, memory.config(), on_end)?;
    memory.woke(Arc::clone(&vm));
    Ok(vm)
}

/// Serves a VM whose server is gone. After an error its process may still be served by somebody else,
/// unless it [is lost](is_lost).
pub(crate) fn adopt(
    pager: &Pager,
    memory: &LiveMemory,
    orphan: Orphan,
    on_end: impl FnOnce(&Vm, End) + Send + 'static,
) -> std::result::Result<Arc<Vm>, (anyhow::Error, Peer)> {
    let Orphan { handshake, socket, pages, peer } = orphan;
    let source = Arc::clone(memory.source()) as Arc<dyn MemorySource>;
    if let Err(bad) = check(&handshake.regions, source.size_bytes(), Layout::Running) {
        return Err((ServeError::from(bad).into(), peer));
    }
    match pager.take_over(handshake, socket, source, pages, memory.config(), on_end) {
        Ok(vm) => {
            memory.woke(Arc::clone(&vm));
            Ok(vm)
        }
        Err(error) => Err((error.into(), peer)),
    }
}

/// Whether it is the VM that cannot go on; else somebody else may be able to take it over.
pub(crate) fn is_lost(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<ServeError>();
    error.is_some_and(|error| error.kind() == ServeErrorKind::Lost)
}
