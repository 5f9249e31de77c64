//! Writing whole images to files in memory, from a store in page cache with nothing in its caches.

use anyhow::Result;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::reader::ExportTarget;
use dormouse_testkit::baseline::qemu_qcow2;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, median, medians, processor_seconds, seconds};
use crate::scratch::{FIVE, Scratch, in_memory, pauses, root_disk};

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    scratch.five_pauses()?;
    let files = pauses()?;
    let target = in_memory()?;
    let (ours_to, theirs_to) = (target.path().join("ours"), target.path().join("theirs"));
    let qcow2 = scratch.path("qcow2");
    let cases = [
        ("memory of pause 2", "vm@2", ImageName::Memory, &files[1].memory),
        ("memory of pause 3", "vm@3", ImageName::Memory, &files[2].memory),
        ("disk of pause 3", "vm@3", root_disk()?, &files[2].disk),
    ];
    for (title, snap, image, original) in cases {
        qemu_qcow2::compress(original, &qcow2)?;
        let mut exported = Default::default();
        let mut processor = Vec::new();
        let [ours, qemu] = medians(
            FEW_ROUNDS,
            [
                &mut || {
                    let image = scratch.reopen(FIVE)?.snapshot(&snap.parse()?)?.image(&image)?;
                    let before = processor_seconds();
                    let time = seconds(|| {
                        exported = image.export(&ours_to, ExportTarget::Replace, Job::quiet())?;
                        Ok(())
                    })?;
                    processor.push(processor_seconds() - before);
                    Ok(time)
                },
                &mut || seconds(|| qemu_qcow2::expand(&qcow2, &theirs_to)),
            ],
        )?;
        let rate = |bytes: u64, time: f64| Value::BytesPerSecond(bytes as f64 / time);
        report.row(
            Row::new(format!("export, {title}"), rate(exported.size_bytes, ours))
                .beside("qemu-img from zstd", rate(exported.size_bytes, qemu))
                .bar(Bar::AtLeast(1e9)),
        );
        report.row(Row::new(
            format!("  its {} MiB that are not zero", exported.written_bytes >> 20),
            rate(exported.written_bytes, ours),
        ));
        report.row(Row::new("  its processor time", Value::Seconds(median(processor))));
        std::fs::remove_file(&qcow2)?;
        std::fs::remove_file(&ours_to)?;
        std::fs::remove_file(&theirs_to)?;
    }
    Ok(())
}
