//! What holds of whatever a parser accepts; the fuzzers check the same.

use std::io::{self, Read, Write};

use dormouse_formats::disk::runs_of_map;
use dormouse_formats::page_map::PageMap;

/// The runs lie one behind the other from the first page to the last, and each page is found in its
/// run.
pub fn check_map(map: &PageMap) {
    let mut end = 0;
    for run in map.runs().take(10_000) {
        assert_eq!(run.start, end);
        assert!(run.pages > 0);
        end += run.pages;
        assert_eq!(map.lookup(run.start), Some(run));
        let last = map.lookup(end - 1).expect("inside");
        assert_eq!(last.pages, 1);
        assert_eq!(last.place.is_some(), run.place.is_some());
    }
    if map.len() <= 10_000 {
        assert_eq!(end, map.pages());
    }
    assert_eq!(map.lookup(map.pages()), None);
}

/// The runs of a disk that `qemu-img map` tells are whole blocks, in order, and inside the disk. Whether
/// they are accepted.
pub fn check_disk_runs(text: &[u8], size_bytes: u64, has_lower: bool) -> bool {
    let Ok(runs) = runs_of_map(text, size_bytes, has_lower) else { return false };
    let mut end = 0;
    for (range, _) in runs {
        assert!(range.start >= end && range.start < range.end && range.end <= size_bytes);
        assert_eq!(range.start % 4096, 0);
        assert!(range.end % 4096 == 0 || range.end == size_bytes);
        end = range.end;
    }
    true
}

/// A server that says these bytes, whatever it is asked.
pub struct Server<'a>(pub &'a [u8]);

impl Read for Server<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
