//! Standard output, buffered, which knows whether its reader has gone.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;

use serde::Serialize;

use crate::output::json::Versioned;

/// Large enough that an image on its way to a pipe costs few calls.
const BUFFER_BYTES: usize = 256 << 10;

/// Standard output.
#[derive(Debug)]
pub(crate) struct Out {
    /// Missing if the descriptor was closed before we were started.
    sink: Option<BufWriter<File>>,
    is_closed: bool,
}

impl Out {
    /// Standard output of this process, without the line buffer of the library.
    pub(crate) fn stdout() -> Out {
        let file = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let sink = file.ok().map(|file| BufWriter::with_capacity(BUFFER_BYTES, file));
        Out { sink, is_closed: false }
    }

    /// Whether the reader has gone, which is its right.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Prints an object with its `version`, on one line.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut *self, &Versioned::new(value))?;
        self.write_all(b"\n")
    }

    /// Hands everything over.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.flush()
    }

    fn noting(
        &mut self,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        let sink = self
            .sink
            .as_mut()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "no standard output"))?;
        let result = write(sink);
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            self.is_closed = true;
        }
        result.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))
        })
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.noting(|sink| sink.write_all(bytes)).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.noting(Write::flush)
    }
}
