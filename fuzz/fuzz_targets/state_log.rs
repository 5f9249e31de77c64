//! A state log and a description: as they come, and with their checksums made to match.
#![no_main]

use dormouse_image::digest::checksum;
use dormouse_live::description::Description;
use dormouse_live::state_log::{
    BATCH_HEADER_BYTES, BatchWriter, KnownStates, LOG_HEADER_BYTES, LogHeader, replay,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    open(data);
    let mut signed = data.to_vec();
    sign(&mut signed);
    open(&signed);
    describe(data);
    if let Some(body) = data.len().checked_sub(8) {
        let mut signed = data.to_vec();
        let sum = checksum(&[&data[..body]]);
        signed[body..].copy_from_slice(&sum.to_le_bytes());
        describe(&signed);
    }
});

/// Signs the header and every batch that follows another.
fn sign(log: &mut [u8]) {
    if log.len() < LOG_HEADER_BYTES {
        return;
    }
    let sum = checksum(&[&log[..40]]);
    log[40..48].copy_from_slice(&sum.to_le_bytes());
    let layer = log[16..24].to_vec();
    let mut at = LOG_HEADER_BYTES;
    while let Some(head) = log.get(at..at + BATCH_HEADER_BYTES) {
        let len = u32::from_le_bytes([head[16], head[17], head[18], head[19]]) as usize;
        let body = at + BATCH_HEADER_BYTES;
        let Some(payload) = log.get(body..body + len) else { return };
        let sum = checksum(&[&layer, &log[at..at + 24], payload]);
        log[at + 24..at + 32].copy_from_slice(&sum.to_le_bytes());
        at = body + len;
    }
}

fn open(log: &[u8]) {
    let Ok((header, states, end)) = read(log) else { return };
    assert!(end.offset <= log.len() as u64 && end.offset >= header.settled_bytes);
    states.for_each_run(&mut |run, _| assert!(run.start < run.end && run.end <= header.blocks));
    // What was read can be written, and reads back as the same.
    let mut writer = BatchWriter::default();
    writer.begin(header.layer, 1);
    writer.push_full(&states, header.blocks).expect("memory takes all");
    let batches = writer.finish();
    let settled_bytes = (LOG_HEADER_BYTES + batches.len()) as u64;
    let mut again = LogHeader { settled_bytes, ..header }.encode().to_vec();
    again.extend(batches);
    let (_, same, _) = read(&again).expect("a log of ours opens");
    assert!(same == states);
}

fn read(
    log: &[u8],
) -> dormouse_live::error::Result<(LogHeader, KnownStates, dormouse_live::state_log::LogEnd)> {
    let read = |buf: &mut [u8], offset: u64| {
        let bytes =
            usize::try_from(offset).ok().and_then(|start| log.get(start..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    };
    replay(&read, log.len() as u64)
}

fn describe(data: &[u8]) {
    if let Ok(description) = Description::parse(data) {
        let again = description.encode().expect("a sound description is written");
        assert_eq!(again, data);
    }
}
