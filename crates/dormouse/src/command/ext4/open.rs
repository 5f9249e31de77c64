//! An image to read: a file, a disk, or a snapshot's disk through the store.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_ext4::read::{Ext4, ReadAt};
use dormouse_store::name::ImageRef;
use dormouse_store::reader::ImageReader;

use crate::app::App;
use crate::progress::Display;

/// A snapshot's disk, of which blocks are read when they are asked for.
struct StoredImage(ImageReader);

impl ReadAt for StoredImage {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset).map_err(io::Error::other)
    }
}

/// Opens what `text` names: a file that is there, else SNAP:DISK.
pub(in crate::command) fn open(app: &App, text: &str) -> Result<Ext4> {
    let what = || format!("open {text}");
    if !is_stored(text) {
        let file = File::open(text).with_context(what)?;
        return Ext4::open_file(file).with_context(what);
    }
    let image: ImageRef = text.parse()?;
    let image = app.open()?.snapshot(&image.snap)?.image(&image.image)?;
    let bytes = image.size_bytes();
    Ext4::open(std::sync::Arc::new(StoredImage(image)), bytes).with_context(what)
}

/// Whether `text` names an image of the store.
pub(in crate::command) fn is_stored(text: &str) -> bool {
    let is_path = text.starts_with(['/', '.']) || Path::new(text).exists();
    !is_path && text.parse::<ImageRef>().is_ok()
}

/// Tells a display what a build does.
pub(in crate::command) struct Told<'a>(pub(in crate::command) &'a Display);

impl dormouse_ext4::write::Watch for Told<'_> {
    fn entries(&self, count: u64) {
        self.0.count(count);
    }

    fn bytes(&self, count: u64) {
        dormouse_store::progress::Progress::advance(self.0, count);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
