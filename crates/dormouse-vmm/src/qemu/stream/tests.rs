//! Streams made by hand: what is split, what is refused, and what is cut anywhere.

use std::io;

use super::*;
use crate::vmm::PAGE_BYTES;

/// A stream as QEMU writes one.
struct Stream(Vec<u8>);

const MEMORY: &str = "dormouse-memory";
const FLAGS: &[(u64, &str)] =
    &[(0x40, "XBZRLE"), (0x80, "RDMA"), (0x100, "compression"), (0x200, "multifd")];

impl Stream {
    fn new(capabilities: &[&str]) -> Stream {
        let mut stream = Stream(b"QEVM\0\0\0\x03\x07".to_vec());
        stream.u32(7);
        stream.0.extend(b"microvm");
        if !capabilities.is_empty() {
            stream.0.push(0x05);
            stream.name("configuration/capabilities");
            stream.u32(1);
            stream.u32(u32::try_from(capabilities.len()).unwrap());
            capabilities.iter().for_each(|name| stream.name(name));
        }
        stream
    }

    fn u32(&mut self, number: u32) {
        self.0.extend(number.to_be_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.0.extend(number.to_be_bytes());
    }

    fn name(&mut self, name: &str) {
        self.0.push(u8::try_from(name.len()).unwrap());
        self.0.extend(name.as_bytes());
    }

    fn start(&mut self, blocks: &[(&str, u64)], has_addresses: bool) {
        self.0.push(SECTION_START);
        self.u32(2);
        self.name("ram");
        self.u32(0);
        self.u32(4);
        self.u64(blocks.iter().map(|block| block.1).sum::<u64>() | 0x04);
        for (name, bytes) in blocks {
            self.name(name);
            self.u64(*bytes);
            if has_addresses {
                self.u64(0);
            }
        }
        self.end_section(2);
    }

    fn end_section(&mut self, id: u32) {
        self.u64(0x10);
        self.0.push(FOOTER);
        self.u32(id);
    }

    fn part(&mut self, kind: u8) {
        self.0.push(kind);
        self.u32(2);
    }

    /// A page; none is zeros.
    fn page(&mut self, block: Option<&str>, offset: u64, content: Option<u8>) {
        let kind = if content.is_some() { 0x08 } else { 0x02 };
        self.u64(offset | kind | if block.is_none() { 0x20 } else { 0 });
        if let Some(name) = block {
            self.name(name);
        }
        match content {
            Some(byte) => self.0.extend([byte; PAGE_BYTES]),
            None => self.0.push(0),
        }
    }

    fn devices(&mut self) {
        self.0.push(SECTION_FULL);
        self.0.extend(b"whatever devices have\x00\x06 to the end");
    }

    /// Memory of four pages, firmware of one, over two parts.
    fn whole() -> Stream {
        let mut stream = Stream::new(&["x-ignore-shared"]);
        stream.start(&[(MEMORY, 4 << 12), ("pc.bios", 1 << 12)], true);
        stream.part(SECTION_PART);
        stream.page(Some(MEMORY), 0, Some(1));
        stream.page(None, 1 << 12, None);
        stream.page(Some("pc.bios"), 0, Some(9));
        stream.page(Some(MEMORY), 2 << 12, Some(2));
        stream.end_section(2);
        stream.0.push(COMMAND);
        stream.0.extend([0, 11, 0, 0]);
        stream.part(SECTION_END);
        stream.page(None, 3 << 12, Some(3));
        stream.page(None, 0, Some(7));
        stream.end_section(2);
        stream.devices();
        stream
    }

    /// The same without the pages of memory.
    fn without_memory() -> Stream {
        let mut stream = Stream::new(&["x-ignore-shared"]);
        stream.start(&[(MEMORY, 4 << 12), ("pc.bios", 1 << 12)], true);
        stream.part(SECTION_PART);
        stream.page(Some("pc.bios"), 0, Some(9));
        stream.end_section(2);
        stream.0.push(COMMAND);
        stream.0.extend([0, 11, 0, 0]);
        stream.part(SECTION_END);
        stream.end_section(2);
        stream.devices();
        stream
    }
}

#[derive(Debug, Default)]
struct Memory(std::collections::BTreeMap<u64, u8>);

impl PageSink for Memory {
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_BYTES]) -> io::Result<()> {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        self.0.insert(offset, bytes[0]);
        Ok(())
    }

    fn zero(&mut self, offset: u64) -> io::Result<()> {
        self.0.insert(offset, 0);
        Ok(())
    }
}

/// Gives a byte at a time.
struct Slow<'a>(&'a [u8]);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.len().min(buffer.len()).min(1);
        buffer[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        Ok(count)
    }
}

fn dropped(bytes: &[u8]) -> Result<(Vec<u8>, Summary)> {
    let mut rest = Vec::new();
    let summary = split(&mut &*bytes, &mut rest, MEMORY, Pages::Drop)?;
    Ok((rest, summary))
}

#[test]
fn memory_goes_to_one_side_and_the_rest_to_the_other() {
    let whole = Stream::whole().0;
    let mut memory = Memory::default();
    let mut rest = Vec::new();
    let summary = split(&mut Slow(&whole), &mut rest, MEMORY, Pages::Take(&mut memory)).unwrap();
    assert_eq!(rest, Stream::without_memory().0);
    assert_eq!(
        memory.0.into_iter().collect::<Vec<_>>(),
        [(0, 7), (1 << 12, 0), (2 << 12, 2), (3 << 12, 3)]
    );
    assert_eq!(summary.machine, "microvm");
    assert_eq!(summary.pages, PagesPassed { data: 4, zero: 1, total: 4 });
    assert_eq!((summary.distinct_pages, summary.blocks.len()), (4, 2));
    assert_eq!(dropped(&whole).unwrap(), (rest.clone(), summary));
    // Once more: nothing of memory is in it, and all of the rest.
    let (again, summary) = dropped(&rest).unwrap();
    assert_eq!((again, summary.pages.data), (rest, 0));
    let mut kept = Vec::new();
    let summary = split(&mut &*whole, &mut kept, MEMORY, Pages::Keep).unwrap();
    assert_eq!((kept, summary.distinct_pages), (whole, 4));
}

#[test]
fn a_block_may_have_the_path_of_its_object() {
    let mut stream = Stream::new(&[]);
    stream.start(&[("/objects/dormouse-memory", 1 << 12)], false);
    stream.part(SECTION_END);
    stream.page(Some("/objects/dormouse-memory"), 0, Some(5));
    stream.end_section(2);
    stream.devices();
    assert_eq!(dropped(&stream.0).unwrap().1.pages.data, 1);
}

#[test]
fn a_stream_that_is_cut_anywhere_before_its_devices_is_an_error() {
    let whole = Stream::whole().0;
    let devices = whole.windows(8).position(|part| part == b"whatever").unwrap();
    for end in 0..devices {
        let error = dropped(&whole[..end]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "cut at {end}: {error}");
    }
}

#[test]
fn what_cannot_be_split_is_refused_by_its_name() {
    let refused = |stream: Stream, what: &str| {
        let error = dropped(&stream.0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    };
    for capability in CANNOT_SPLIT {
        refused(Stream::new(&[capability]), capability);
    }
    for (flag, what) in FLAGS {
        let mut stream = Stream::new(&[]);
        stream.start(&[(MEMORY, 1 << 12)], false);
        stream.part(SECTION_PART);
        stream.u64(*flag);
        refused(stream, what);
    }
    let mut early = Stream::new(&[]);
    early.0.push(SECTION_FULL);
    early.u32(1);
    early.name("virtio-mem-device-early");
    refused(early, "virtio-mem-device-early");
    let mut live = Stream::new(&[]);
    live.0.push(SECTION_START);
    live.u32(3);
    live.name("dirty-bitmap");
    live.u32(0);
    live.u32(1);
    refused(live, "dirty-bitmap");
    let mut postcopy = Stream::new(&[]);
    postcopy.0.push(COMMAND);
    postcopy.0.extend([0, 3, 0, 16]);
    refused(postcopy, "command 3");
    let mut other = Stream::new(&[]);
    other.start(&[("pc.ram", 1 << 12)], false);
    refused(other, "pc.ram");
    refused(Stream(b"QEVM\0\0\0\x03\x01".to_vec()), "2.4");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |build: &dyn Fn(&mut Stream)| {
        let mut stream = Stream::new(&[]);
        build(&mut stream);
        stream.0.extend([0; 8192]);
        let error = dropped(&stream.0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{error}");
    };
    assert_eq!(dropped(b"something else").unwrap_err().kind(), ErrorKind::InvalidFile);
    // Sizes that are too large, are none, or come twice.
    refused(&|stream| stream.start(&[(MEMORY, 1 << 60)], false));
    refused(&|stream| stream.start(&[(MEMORY, 4096), ("rom", 0)], false));
    refused(&|stream| stream.start(&[(MEMORY, 5 << 10)], false));
    refused(&|stream| {
        stream.start(&[(MEMORY, 4096)], false);
        stream.part(SECTION_PART);
        stream.u64(4096 | 0x04);
    });
    let in_part = |build: &dyn Fn(&mut Stream)| {
        refused(&|stream| {
            stream.start(&[(MEMORY, 4096)], false);
            stream.part(SECTION_PART);
            build(stream);
        });
    };
    // Pages beyond their block, of no block, of one that is not listed; a flag alone.
    in_part(&|stream| stream.page(Some(MEMORY), 4096, None));
    in_part(&|stream| stream.page(None, 0, None));
    in_part(&|stream| stream.page(Some("other"), 0, Some(1)));
    in_part(&|stream| stream.u64(0x20));
    // Footers of other sections, parts of sections that are not open.
    in_part(&|stream| stream.end_section(3));
    refused(&|stream| stream.part(SECTION_PART));
    refused(&|stream| {
        stream.start(&[(MEMORY, 4096)], false);
        stream.part(SECTION_END);
        stream.end_section(2);
        stream.part(SECTION_PART);
    });
}
