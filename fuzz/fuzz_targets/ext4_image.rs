//! An image: superblock, descriptors, journal, inodes, maps, folders, attributes and bitmaps are read
//! without a panic, a circle or memory without bound.
#![no_main]

use std::sync::Arc;

use dormouse_ext4::input::{Limits, image};
use dormouse_ext4::read::{Ext4, FileKind};
use dormouse_ext4::tree::{ROOT, Tree};
use dormouse_ext4::write::Unwatched;
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { entries: 2000, unpacked_bytes: 4 << 20 };

fuzz_target!(|data: &[u8]| {
    let bytes: Arc<Vec<u8>> = Arc::new(data.to_vec());
    let Ok(found) = Ext4::open(bytes, data.len() as u64) else { return };
    if let Ok(free) = found.free_ranges() {
        assert!(free.iter().all(|range| range.start < range.end));
        assert!(free.is_sorted_by(|a, b| a.end <= b.start));
        assert!(free.last().is_none_or(|last| last.end <= data.len() as u64));
    }
    for number in 1..32 {
        let Ok(inode) = found.inode(number) else { continue };
        // What is found is not of interest, only that it is found or refused.
        let _ = found.xattrs(&inode);
        let _ = found.target(&inode);
        if inode.kind == FileKind::File && inode.bytes > 0 {
            let len = inode.bytes.min(65_536);
            let mut buffer = vec![0; usize::try_from(len).expect("64 KiB at most")];
            let _ = found.read(&inode, &mut buffer, 0);
            let _ = found.read(&inode, &mut buffer, inode.bytes - len);
        }
    }
    let mut tree = Tree::new();
    let _ = image::read(&mut tree, ROOT, &Arc::new(found), b"/", &LIMITS, &Unwatched);
});
