//! QEMU's migration streams: what is split once has nothing to split any more, and no page is beyond
//! the memory that the stream told of.
#![no_main]

use std::io;

use dormouse_vmm::qemu::stream::{Pages, split};
use dormouse_vmm::vmm::{PAGE_BYTES, PageSink};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Default)]
struct Last(u64, u64);

impl PageSink for Last {
    fn page(&mut self, offset: u64, _: &[u8; PAGE_BYTES]) -> io::Result<()> {
        *self = Last(self.0.max(offset + 1), self.1 + 1);
        Ok(())
    }

    fn zero(&mut self, offset: u64) -> io::Result<()> {
        *self = Last(self.0.max(offset + 1), self.1 + 1);
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let (mut rest, mut last) = (Vec::new(), Last::default());
    let Ok(summary) = split(&mut &*data, &mut rest, "m", Pages::Take(&mut last)) else { return };
    assert!(rest.len() <= data.len());
    let pages = summary.pages;
    assert_eq!(pages.data + pages.zero, last.1);
    assert!(last.0 <= pages.total * PAGE_BYTES as u64 && summary.distinct_pages <= last.1);
    let mut again = Vec::new();
    let second =
        split(&mut &*rest, &mut again, "m", Pages::Drop).expect("what was left is a stream");
    assert_eq!((again, second.distinct_pages), (rest, 0));
    assert_eq!(second.blocks, summary.blocks);
    let mut kept = Vec::new();
    split(&mut &*data, &mut kept, "m", Pages::Keep).expect("it was a stream");
    assert_eq!(kept, data);
});
