//! A tar, applied as a layer over a small tree: what is taken in can be planned and written, and
//! nothing lies outside the tree.
#![no_main]

use std::io::{Cursor, Read};
use std::sync::Arc;

use dormouse_ext4::input::Limits;
use dormouse_ext4::input::layers::{Layer, Whiteouts, apply};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Stage;
use dormouse_ext4::tree::{Attributes, Kind, ROOT, Time, Tree};
use dormouse_ext4::write::{LazyImage, Unwatched};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { entries: 2000, unpacked_bytes: 4 << 20 };

fuzz_target!(|data: &[u8]| {
    let file = dormouse_fuzz::memory_file();
    let mut stage =
        Stage::new(Arc::new(file.try_clone().expect("a second descriptor")), Size::Slack(0));
    let mut tree = Tree::new();
    let plain = Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time::default() };
    let lower = tree.add(ROOT, b"a", 0, &plain, Kind::Folder).expect("a new name");
    tree.add(lower, b"b", 0, &plain, Kind::Symlink(b"/")).expect("a new name");
    let bytes = data.to_vec();
    let open = move || Ok(Box::new(Cursor::new(bytes)) as Box<dyn Read + Send>);
    let layer = Layer { label: "fuzz", number: 1, whiteouts: Whiteouts::Apply };
    if apply(&mut tree, &mut stage, open, layer, &LIMITS, &Unwatched).is_err() {
        return;
    }
    let staged = stage.finish().expect("memory can be written");
    let Ok(layout) = Layout::plan(&mut tree, &Options::new(Size::Slack(0)), &staged) else {
        return;
    };
    LazyImage::new(tree, &layout, &mut &file, &Unwatched).expect("what has a plan can be written");
});
