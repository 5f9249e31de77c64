//! What holds of imports of every format: whose files are opened, and what they are taken over.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Mutex};

use dormouse_formats::error::{Error, ErrorKind};
use dormouse_formats::format::Format;
use dormouse_formats::import::{
    Body, Found, Generation, ImportRequest, LookOptions, NewContent, import,
};
use dormouse_image::codec::Codec;
use dormouse_store::commit::{CommitRequest, Parent};
use dormouse_store::manifest::Vmm;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::{Config, Store};
use dormouse_testkit::foreign::{dm_snapshot, random::Random, wrenn};

use crate::world::{World, assert_same, chain};
use crate::wrenn::guest;

/// Changes of which the walk begins with somebody else's commit to the same name.
#[derive(Debug)]
struct Overtaken {
    store: Mutex<Store>,
    device: Vec<u8>,
}

impl LayerSource for Overtaken {
    fn size_bytes(&self) -> u64 {
        self.device.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.device[from..from + buf.len()]);
        Ok(())
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        let other = vec![0xee; self.device.len()];
        let request = CommitRequest::new("vm".parse().unwrap())
            .image(ImageName::Memory, Source::Bytes(other.into()));
        self.store.lock().unwrap().commit(request, Job::quiet()).unwrap();
        visit(0..4096, LayerRun::Data)
    }
}

/// What the parent was was asked twice: for the layers' base, and by the commit. Between the two
/// somebody else could commit, and the changes of one snapshot were said to be of another.
#[test]
fn the_parent_is_settled_once_whoever_commits_meanwhile() {
    let world = World::new();
    let before = Random::new(1).device(50);
    world.commit(&[("memory", &before)]);
    let mut device = before.clone();
    device[..4096].fill(7);
    let path = world.path("store");
    let store = Mutex::new(Store::open(&path, Config::STANDARD).unwrap());
    let layer = Arc::new(Overtaken { store, device: device.clone() });
    let content = NewContent { image: ImageName::Memory, body: Body::Changes(layer), replay: None };
    let found = Found {
        format: Format::Raw,
        version: "test".to_owned(),
        generations: vec![Generation {
            title: "test".to_owned(),
            images: vec![content],
            memory_layout: Vec::new(),
            vmm: Vmm::default(),
            labels: BTreeMap::new(),
            same: Vec::new(),
        }],
        notes: Vec::new(),
        is_whole: false,
        base: None,
    };
    let request = ImportRequest {
        name: "vm".parse().unwrap(),
        parent: Parent::Auto,
        codec: Codec::Lz4,
        verify: false,
    };
    let report = import(&world.store, found, &request, Job::quiet()).unwrap();
    let manifest = &report.snapshots[0].commit.manifest;
    assert_eq!(manifest.display_name(), "vm@3", "vm@2 came in between");
    assert_eq!(manifest.parent.as_ref().unwrap().number, 1, "what it is the changes of");
    assert_same(&world.bytes("vm@3", "memory"), &device, "memory");
}

/// Replaces a file by a link to one with the same bytes outside of the folder.
fn link_out(world: &World, file: &Path) {
    let outside = world.path("outside");
    fs::rename(file, &outside).unwrap();
    symlink(&outside, file).unwrap();
}

fn refused(error: &Error, file: &Path) {
    assert_eq!(error.kind(), ErrorKind::Refused, "{}", chain(error));
    let text = chain(error);
    assert!(text.contains(&format!("{} is a link to", file.display())), "{text}");
    assert!(text.contains("outside of"), "{text}");
}

/// Any file of the host, its key too, came in as a state or disk of whoever made the folder.
#[test]
fn a_link_that_leaves_the_folder_is_not_followed() {
    for file in ["snapfile", "memfile", "memfile.header", "rootfs.ext4"] {
        let world = World::new();
        let dir = world.path("wrenn");
        wrenn::write(&dir, &guest(31, 1)).unwrap();
        fs::write(dir.join("rootfs.ext4"), [1; 8192]).unwrap();
        world.import(Format::Wrenn, &dir).unwrap();
        link_out(&world, &dir.join(file));
        let error = world.import(Format::Wrenn, &dir).unwrap_err();
        refused(&error, &dir.join(file));
    }
    // A folder of the chain.
    let world = World::new();
    let generations = guest(32, 2);
    wrenn::write(&world.path("chain").join("1"), &generations[..1]).unwrap();
    wrenn::write(&world.path("elsewhere"), &generations).unwrap();
    symlink(world.path("elsewhere"), world.path("chain").join("2")).unwrap();
    let error = world.import(Format::Wrenn, &world.path("chain")).unwrap_err();
    refused(&error, &world.path("chain").join("2").join("memfile.header"));
}

/// The same of the folders of VMMs, which have few files.
#[test]
fn a_link_out_of_a_vmms_folder_is_not_followed() {
    use dormouse_testkit::foreign::firecracker;
    let world = World::new();
    let dir = world.path("fc");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("memory"), vec![3; 1 << 20]).unwrap();
    fs::write(dir.join("vmstate"), firecracker::vmstate((6, 0, 0), b"state")).unwrap();
    world.import(Format::Firecracker, &dir).unwrap();
    link_out(&world, &dir.join("memory"));
    refused(&world.import(Format::Firecracker, &dir).unwrap_err(), &dir.join("memory"));
    // What the user names may be a link.
    let options = LookOptions { state: Some(dir.join("vmstate")), ..LookOptions::default() };
    world.import_over(Format::Firecracker, &dir.join("memory"), &options, Parent::Auto).unwrap();
}

/// `rootfs.meta` names the disk below by its path on the host that wrote it, and an import read
/// whatever file of this host that was.
#[test]
fn a_base_image_is_opened_only_where_the_user_says() {
    let world = World::new();
    let dir = world.path("snap");
    wrenn::write(&dir, &guest(33, 1)).unwrap();
    let mut random = Random::new(34);
    let origin = random.device(100);
    let mut disk = origin.clone();
    random.work(&mut disk, 9);
    let images = world.path("images");
    fs::create_dir_all(&images).unwrap();
    let named = images.join("base.ext4");
    fs::write(&named, &origin).unwrap();
    dm_snapshot::write(&dir.join("rootfs.cow"), &origin, &disk, 8, 9).unwrap();
    let meta = |path: &Path| {
        fs::write(dir.join("rootfs.meta"), format!(r#"{{"base_template":{path:?}}}"#)).unwrap();
    };
    meta(&named);
    let error = world.import(Format::Wrenn, &dir).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let text = chain(&error);
    assert!(text.contains(&named.display().to_string()) && text.contains("--origin"), "{text}");
    let with = |options: LookOptions| {
        world.import_over(Format::Wrenn, &dir, &options, Parent::None).map(|report| {
            let snap = report.snapshots[0].commit.manifest.display_name();
            assert_same(&world.bytes(&snap, "root"), &disk, "disk");
        })
    };
    with(LookOptions { origin: Some(named.clone()), ..LookOptions::default() }).unwrap();
    with(LookOptions { builds: Some(images.clone()), ..LookOptions::default() }).unwrap();
    // Not by a link, nor by dots.
    let secret = world.path("secret");
    fs::write(&secret, &origin).unwrap();
    symlink(&secret, images.join("link")).unwrap();
    for path in [images.join("link"), images.join("../secret"), images.join("none")] {
        meta(&path);
        let options = LookOptions { builds: Some(images.clone()), ..LookOptions::default() };
        assert_eq!(with(options).unwrap_err().kind(), ErrorKind::Refused, "{}", path.display());
    }
    fs::rename(&named, dir.join("base.ext4")).unwrap();
    meta(&dir.join("base.ext4"));
    with(LookOptions::default()).unwrap();
}
