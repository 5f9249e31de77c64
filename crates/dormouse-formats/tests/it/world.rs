//! A store, and what tests do with it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use dormouse_formats::detect::look;
use dormouse_formats::error::Error;
use dormouse_formats::export::{ExportReport, ExportRequest, export};
use dormouse_formats::format::Format;
use dormouse_formats::import::{ImportReport, ImportRequest, LookOptions, import};
use dormouse_image::codec::Codec;
use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use dormouse_testkit::foreign::random::PAGE;

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) store: Store,
}

impl World {
    pub(crate) fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::init(&folder.path().join("store"), Config::STANDARD).unwrap();
        World { folder, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Imports and compares with the source.
    pub(crate) fn import(&self, format: Format, path: &Path) -> Result<ImportReport, Error> {
        self.import_over(format, path, &LookOptions::default(), Parent::Auto)
    }

    pub(crate) fn import_over(
        &self,
        format: Format,
        path: &Path,
        options: &LookOptions,
        parent: Parent,
    ) -> Result<ImportReport, Error> {
        self.import_with(format, path, options, parent, true)
    }

    pub(crate) fn import_with(
        &self,
        format: Format,
        path: &Path,
        options: &LookOptions,
        parent: Parent,
        verify: bool,
    ) -> Result<ImportReport, Error> {
        let found = look(format, path, options)?;
        let request =
            ImportRequest { name: Name::new("vm").unwrap(), parent, codec: Codec::Lz4, verify };
        import(&self.store, found, &request, Job::quiet())
    }

    pub(crate) fn commit(&self, images: &[(&str, &[u8])]) -> String {
        let mut request = CommitRequest::new(Name::new("vm").unwrap());
        for (image, bytes) in images {
            request = request.image(image.parse().unwrap(), Source::Bytes((*bytes).into()));
        }
        self.store.commit(request, Job::quiet()).unwrap().manifest.display_name()
    }

    pub(crate) fn export(
        &self,
        snap: &str,
        dir: &Path,
        format: Format,
        request: &ExportRequest,
    ) -> Result<ExportReport, Error> {
        export(&self.store, &snap.parse().unwrap(), dir, format, request, Job::quiet())
    }

    /// All bytes of an image.
    pub(crate) fn bytes(&self, snap: &str, image: &str) -> Vec<u8> {
        let snap: SnapRef = snap.parse().unwrap();
        let image: ImageName = image.parse().unwrap();
        let image = self.store.snapshot(&snap).unwrap().image(&image).unwrap();
        let mut bytes = vec![0; usize::try_from(image.size_bytes()).unwrap()];
        image.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// How many blocks were stored by an import.
    pub(crate) fn stored_blocks(report: &ImportReport) -> u64 {
        let new = report.snapshots.iter().map(|one| one.commit.manifest.figures.new_bytes);
        new.sum::<u64>() / PAGE as u64
    }
}

/// Says where two devices differ, for they are too long to print.
#[track_caller]
pub(crate) fn assert_same(got: &[u8], expected: &[u8], what: &str) {
    assert_eq!(got.len(), expected.len(), "length of {what}");
    let at = got.iter().zip(expected).position(|(got, expected)| got != expected);
    assert_eq!(at.map(|at| at / PAGE), None, "the page of {what} that differs");
}

/// How many different blocks some devices have, zero apart.
pub(crate) fn distinct_blocks(devices: &[&[u8]]) -> u64 {
    let mut seen = HashSet::new();
    for block in devices.iter().flat_map(|device| device.chunks(PAGE)) {
        if block.iter().any(|&byte| byte != 0) {
            let mut block = block.to_vec();
            block.resize(PAGE, 0);
            seen.insert(block);
        }
    }
    seen.len() as u64
}

/// All causes of a failure in one line.
pub(crate) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
