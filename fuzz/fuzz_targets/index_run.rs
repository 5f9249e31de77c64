//! An index run: as it comes, with its checksums made to match, and as the body of a run whose
//! footer fits. Lookups give nothing that the
//! run's own entries do not have, and a run whose entries are in order can be written again.
#![no_main]

use dormouse_fuzz::disk::OneFile;
use dormouse_fuzz::u32_at;
use dormouse_image::digest::{Digest, checksum};
use dormouse_store::index::{IndexHit, IndexRun, RunWriter};
use libfuzzer_sys::fuzz_target;

const FOOTER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 16;

fuzz_target!(|data: &[u8]| {
    open(data);
    let mut signed = data.to_vec();
    sign(&mut signed);
    open(&signed);
    if let [packs, buckets, filter_blocks, body @ ..] = data {
        let shape = [*packs, buckets % 16 + 1, filter_blocks % 16 + 1].map(u32::from);
        open(&with_shape(shape, body));
    }
});

/// A run of the given numbers of packs, buckets and filter blocks, whose entries are the rest.
fn with_shape([packs, buckets, filter_blocks]: [u32; 3], body: &[u8]) -> Vec<u8> {
    let mut run = body.to_vec();
    let meta = packs as usize * 16 + (buckets as usize + 1) * 4 + filter_blocks as usize * 32;
    let entries = run.len().saturating_sub(meta) / ENTRY_BYTES;
    run.resize(entries * ENTRY_BYTES + meta, 0);
    // The last bucket ends with the entries, or nothing else would be looked at.
    let end = entries * ENTRY_BYTES + packs as usize * 16 + buckets as usize * 4;
    let count = u32::try_from(entries).expect("short inputs").to_le_bytes();
    run[end..end + 4].copy_from_slice(&count);
    run.extend(b"\x89DMindx\n\x01\x00\x00\x00");
    run.extend(packs.to_le_bytes());
    run.extend(count);
    run.extend([0; 4]);
    run.extend(buckets.to_le_bytes());
    run.extend(filter_blocks.to_le_bytes());
    run.resize(run.len() + 32, 0);
    sign(&mut run);
    run
}

fn sign(run: &mut [u8]) {
    let Some(footer) = run.len().checked_sub(FOOTER_BYTES) else { return };
    let entries = (u32_at(run, footer + 16) as usize).saturating_mul(ENTRY_BYTES).min(footer);
    let sums = [checksum(&[&run[..entries]]), checksum(&[&run[entries..footer]])];
    run[footer + 32..footer + 40].copy_from_slice(&sums[0].to_le_bytes());
    run[footer + 40..footer + 48].copy_from_slice(&sums[1].to_le_bytes());
    let sum = checksum(&[&run[footer..footer + 56]]);
    run[footer + 56..].copy_from_slice(&sum.to_le_bytes());
}

fn open(data: &[u8]) {
    let disk = OneFile::new(data);
    let runs = [0, u64::MAX].map(|filter_bytes| IndexRun::open(&disk, "run", filter_bytes).ok());
    let [Some(slow), Some(fast)] = runs else { return };
    assert_eq!((slow.packs(), slow.entries()), (fast.packs(), fast.entries()));
    let (entries, _) = data.as_chunks::<ENTRY_BYTES>();
    let entries = &entries[..usize::try_from(slow.entries()).expect("no more than bytes")];
    for entry in entries.iter().take(256) {
        let prefix = u64::from_le_bytes(*entry.first_chunk().expect("16 bytes"));
        let hits = [&slow, &fast].map(|run| lookup(run, prefix));
        assert_eq!(hits[0], hits[1], "with its filter in memory a run answers the same");
        for hit in &hits[0] {
            let is_entry = entries.iter().any(|entry| {
                entry[..8] == prefix.to_le_bytes()
                    && slow.packs().get(u32_at(entry, 8) as usize) == Some(&hit.pack)
                    && u32_at(entry, 12) == hit.slot
            });
            assert!(is_entry, "{hit:?} is in the run");
        }
    }
    let mut scanned = Vec::new();
    let whole = slow.for_each(&mut |prefix, hit| {
        scanned.push((prefix, hit));
        Ok(())
    });
    assert!(scanned.is_sorted_by_key(|(prefix, _)| *prefix));
    if whole.is_err() || scanned.len() > 4096 {
        return;
    }
    assert_eq!(scanned.len(), entries.len());
    let out = OneFile::new(&[]);
    let mut writer = RunWriter::create(&out, "new", slow.entries(), slow.packs()).expect("memory");
    for &(prefix, hit) in &scanned {
        writer.push(prefix, hit).expect("memory");
    }
    writer.finish().expect("memory");
    let again = IndexRun::open(&out, "new", 0).expect("what was written is read");
    for &(prefix, hit) in &scanned {
        assert!(lookup(&again, prefix).contains(&hit));
    }
}

fn lookup(run: &IndexRun, prefix: u64) -> Vec<IndexHit> {
    let mut digest = Digest([0xaa; 16]);
    digest.0[..8].copy_from_slice(&prefix.to_be_bytes());
    assert_eq!(digest.prefix(), prefix);
    let mut hits = Vec::new();
    // A bucket that is too long is an error, and gives nothing.
    drop(run.lookup(&digest, &mut |hit| hits.push(hit)));
    hits
}
