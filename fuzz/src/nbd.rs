//! An NBD client that is a string of bytes, and a small device for it to harm.

use std::io::{self, Cursor, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use dormouse_serve::nbd::{
    BlockDevice, DeviceResult, Durability, Export, Limits, ZeroMode, serve_stream,
};

const SIZE_BYTES: usize = 8 << 20;

/// Checks what the trait promises of every call.
struct Device(Mutex<Vec<u8>>);

impl Device {
    fn within(&self, range: &Range<u64>) -> Range<usize> {
        assert!(range.start < range.end && range.end <= SIZE_BYTES as u64, "{range:?}");
        range.start as usize..range.end as usize
    }
}

impl BlockDevice for Device {
    fn size_bytes(&self) -> u64 {
        SIZE_BYTES as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        let range = self.within(&(offset..offset + buffer.len() as u64));
        buffer.copy_from_slice(&self.0.lock().expect("never poisoned")[range]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64, _: Durability) -> DeviceResult<()> {
        let range = self.within(&(offset..offset + data.len() as u64));
        self.0.lock().expect("never poisoned")[range].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, range: Range<u64>, _: ZeroMode, _: Durability) -> DeviceResult<()> {
        let range = self.within(&range);
        self.0.lock().expect("never poisoned")[range].fill(0);
        Ok(())
    }

    fn trim(&self, range: Range<u64>, _: Durability) -> DeviceResult<()> {
        self.within(&range);
        Ok(())
    }

    fn prefetch(&self, range: Range<u64>) -> DeviceResult<()> {
        self.within(&range);
        Ok(())
    }
}

/// Takes replies up to a bound, then hangs up.
struct Sink(usize);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.0.checked_sub(data.len()) {
            Some(left) => self.0 = left,
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves `client` until it ends; panics where the server does.
pub fn serve(client: Vec<u8>) {
    let device = Arc::new(Device(Mutex::new(vec![0; SIZE_BYTES])));
    let exports = vec![Export::new("a", device.clone()), Export::new("b", device.clone())];
    // One worker: what it does depends on the input alone.
    let limits = Limits { workers: 1, ..Limits::STANDARD };
    let result = serve_stream(exports, &limits, Cursor::new(client), Sink(64 << 20));
    if let Err(error) = result {
        assert!(!error.to_string().contains("panicked"), "{error}");
    }
    assert!(!device.0.is_poisoned());
}
