//! Whoever takes an image while it comes into being, and has no way back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Takes bytes of an image in the order of their places.
///
/// Contents of streams come like this, as soon as they are read, and so does metadata later, behind
/// its own beginning again. What is in between is zero, or what went there before.
pub trait Sink: Send {
    /// Takes bytes for `offset`, which is not before the end of those before. A run begins and ends
    /// at a whole block, and may come in parts.
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl Sink for &File {
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
}
