//! Commits a file twice, changed in between, and restores both: `cargo run --example
//! commit_and_restore -- FILE`.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::path::PathBuf;

use dormouse_store::commit::CommitRequest;
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::reader::ExportTarget;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = PathBuf::from(std::env::args_os().nth(1).ok_or("which FILE?")?);
    let folder = tempfile::tempdir()?;
    let store = Store::init(&folder.path().join("store"), Config::STANDARD)?;
    let disk = ImageName::Disk(Name::new("root")?);

    let original = std::fs::read(&source)?;
    let mut changed = original.clone();
    changed.iter_mut().step_by(1 << 20).for_each(|byte| *byte ^= 1);
    for bytes in [&original, &changed] {
        let image = Source::Bytes(bytes.as_slice().into());
        let request = CommitRequest::new(Name::new("example")?).image(disk.clone(), image);
        let report = store.commit(request, Job::quiet())?;
        println!("{}: {} bytes new", report.manifest.display_name(), report.written_bytes);
    }
    for (number, bytes) in [(1, &original), (2, &changed)] {
        let snap = SnapRef { name: Name::new("example")?, number: Some(number) };
        let restored = folder.path().join(format!("restored-{number}"));
        store.snapshot(&snap)?.image(&disk)?.export(&restored, ExportTarget::New, Job::quiet())?;
        assert!(std::fs::read(&restored)? == **bytes, "every byte is as it was");
        println!("{snap}: restored");
    }
    Ok(())
}
