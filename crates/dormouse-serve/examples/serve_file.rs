//! Serves a raw file over NBD: `serve_file FILE SOCKET`, until standard input ends.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dormouse_serve::nbd::{
    BlockDevice, DeviceErrorKind, DeviceResult, Durability, Export, Limits, Server, ZeroMode,
};
use rustix::fs::{FallocateFlags, fallocate};

struct RawFile {
    file: File,
    size_bytes: u64,
}

impl RawFile {
    fn settle(&self, durability: Durability) -> DeviceResult<()> {
        match durability {
            Durability::Now => self.flush(),
            Durability::Later => Ok(()),
        }
    }
}

impl BlockDevice for RawFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        Ok(self.file.read_exact_at(buffer, offset)?)
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> DeviceResult<()> {
        self.file.write_all_at(data, offset)?;
        self.settle(durability)
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode, durability: Durability) -> DeviceResult<()> {
        if mode.may_punch {
            return self.trim(range, durability);
        }
        if mode.fast_only {
            return Err(DeviceErrorKind::NotSupported.into());
        }
        let zeros = vec![0; 1 << 20];
        let mut at = range.start;
        while at < range.end {
            let length = zeros.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
            self.file.write_all_at(&zeros[..length], at)?;
            at += length as u64;
        }
        self.settle(durability)
    }

    fn trim(&self, range: Range<u64>, durability: Durability) -> DeviceResult<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, range.start, range.end - range.start)
            .map_err(io::Error::from)?;
        self.settle(durability)
    }

    fn flush(&self) -> DeviceResult<()> {
        Ok(self.file.sync_data()?)
    }
}

#[expect(clippy::print_stderr, reason = "a command tells its figures")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [path, socket] = std::env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "serve_file FILE SOCKET")?;
    let file = File::options().read(true).write(true).open(&path)?;
    let size_bytes = fs::metadata(&path)?.len();
    let server = Server::builder(Limits::STANDARD)
        .export(Export::new("file", Arc::new(RawFile { file, size_bytes })).description(path))
        .listen_unix(socket)
        .start()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    eprintln!("{:#?}", server.stats());
    server.stop()?;
    Ok(())
}
