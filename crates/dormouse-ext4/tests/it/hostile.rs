//! Archives that lie, escape or explode: an error that names the entry, and nothing to be published.

use std::io::{Cursor, Read, Write};
use std::path::Path;
use std::sync::Arc;

use dormouse_ext4::error::{Error, ErrorKind};
use dormouse_ext4::input::Limits;
use dormouse_ext4::input::layers::{Layer, Whiteouts, apply};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Stage;
use dormouse_ext4::tree::{NodeId, Tree};
use dormouse_ext4::write::{Unwatched, write};

use crate::judge::fsck;

/// A member of a tar that is made by hand.
pub(crate) struct Member<'a> {
    pub(crate) name: &'a str,
    pub(crate) flag: u8,
    pub(crate) link: &'a str,
    pub(crate) content: &'a [u8],
}

pub(crate) fn file<'a>(name: &'a str, content: &'a str) -> Member<'a> {
    Member { name, flag: b'0', link: "", content: content.as_bytes() }
}

pub(crate) fn folder(name: &str) -> Member<'_> {
    Member { name, flag: b'5', link: "", content: b"" }
}

pub(crate) fn link<'a>(name: &'a str, flag: u8, link: &'a str) -> Member<'a> {
    Member { name, flag, link, content: b"" }
}

pub(crate) fn tar(members: &[Member<'_>]) -> Vec<u8> {
    let mut tar = Vec::new();
    for member in members {
        tar.extend(header(member, member.content.len() as u64));
        tar.extend_from_slice(member.content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn header(member: &Member<'_>, bytes: u64) -> [u8; 512] {
    let mut header = [0; 512];
    header[..member.name.len()].copy_from_slice(member.name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{bytes:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000001\0");
    header[156] = member.flag;
    header[157..157 + member.link.len()].copy_from_slice(member.link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut header);
    header
}

fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Applies layers and, if all goes well, writes an image that e2fsck likes.
pub(crate) fn layers(layers: &[Vec<u8>], limits: &Limits) -> Result<Tree, Error> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&image);
    let file = Arc::new(file.unwrap());
    let size = Size::Slack(0);
    let mut stage = Stage::new(Arc::clone(&file), size);
    let mut tree = Tree::new();
    for (number, bytes) in (0u16..).zip(layers.iter().cloned()) {
        let label = format!("layer {}", number + 1);
        let layer = Layer { label: &label, number, whiteouts: Whiteouts::Apply };
        let open = move || Ok(Box::new(Cursor::new(bytes)) as Box<dyn Read + Send>);
        apply(&mut tree, &mut stage, open, layer, limits, &Unwatched)?;
    }
    let staged = stage.finish()?;
    let layout = Layout::plan(&mut tree, &Options::new(size), &staged)?;
    write(&tree, &layout, &file, &Unwatched)?;
    fsck(&image);
    assert_freed_is_punched(&image);
    Ok(tree)
}

/// What later layers removed takes no space.
fn assert_freed_is_punched(image: &Path) {
    let read = dormouse_ext4::read::Ext4::open_file(std::fs::File::open(image).unwrap()).unwrap();
    let file = std::fs::File::open(image).unwrap();
    for range in read.free_ranges().unwrap() {
        let data = dormouse_sys::sparse::data_extents(&file, range.clone()).next();
        assert!(data.is_none(), "{data:?} in {range:?}");
    }
}

fn story(error: &Error) -> String {
    let mut text = error.to_string();
    let mut at: &dyn std::error::Error = error;
    while let Some(source) = at.source() {
        text = format!("{text}: {source}");
        at = source;
    }
    text
}

#[test]
fn what_breaks_a_rule_is_told_with_layer_and_entry() {
    let long = Member { name: "huge", flag: b'0', link: "", content: b"" };
    let mut lying = header(&long, 1 << 32).to_vec();
    lying.extend([1; 4096]);
    let mut device = header(&link("bomb", b'3', ""), 0);
    device[329..337].copy_from_slice(b"7777777\0");
    seal(&mut device);
    let mut damaged = tar(&[file("a", "b")]);
    damaged[0] = b'x';
    let mut cut = tar(&[file("whole", "content"), file("second", "x")]);
    cut.truncate(512 + 300);
    let no_end = tar(&[file("whole", "content")])[..1024].to_vec();

    let mut owner = header(&file("owned", ""), 0);
    owner[108..116].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xfb");
    seal(&mut owner);
    let mut later = tar(&[file("whole", "content"), file("second", "x")]);
    later[1024] = b'x';
    let pax = |lines: &str, member: Member<'_>| {
        let head = Member { name: "PaxHeaders/0", flag: b'x', link: "", content: lines.as_bytes() };
        tar(&[head, member])
    };
    let line = |text: &str| {
        let mut len = text.len() + 3;
        while format!("{len} {text}\n").len() != len {
            len += 1;
        }
        format!("{len} {text}\n")
    };
    let long_name = "n".repeat(256);
    let long_target = line(&format!("linkpath={}", "t".repeat(5000)));
    let long_value = line(&format!("SCHILY.xattr.user.a={}", "v".repeat(5000)));
    let noise: Vec<u8> =
        (0..4096u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let mut cut_padding = tar(&[file("padded", "content")]);
    cut_padding.truncate(512 + 20);

    let cases: [(&str, Vec<u8>, &[&str]); 25] = [
        ("owner", owner.to_vec(), &["layer 1", "entry \"owned\"", "-5"]),
        ("time", pax(&line("mtime=nan"), file("timed", "")), &["entry \"timed\"", "mtime"]),
        (
            "time at the end",
            tar(&[Member {
                name: "PaxHeaders/0",
                flag: b'x',
                link: "",
                content: line("mtime=nan").as_bytes(),
            }]),
            &["layer 1", "mtime"],
        ),
        ("damaged later", later, &["layer 1", "at byte 1024", "wrong sum"]),
        (
            "long name",
            pax(&line(&format!("path=d/{long_name}")), file("x", "")),
            &["entry \"d/nnn", "256 bytes"],
        ),
        ("zero in a name", pax(&line("path=a\0b"), file("x", "")), &["entry", "a zero byte"]),
        ("long target", pax(&long_target, link("s", b'2', "t")), &["entry \"s\"", "5000 bytes"]),
        ("large attribute", pax(&long_value, file("x", "")), &["entry \"x\"", "4 KiB"]),
        ("noise", noise, &["layer 1", "no tar"]),
        ("cut padding", cut_padding, &["entry \"padded\"", "ends within"]),
        ("dots", tar(&[file("a/../../b", "")]), &["layer 1", "a/../../b", ".."]),
        ("absolute", tar(&[file("/etc/passwd", "")]), &["/etc/passwd", "absolute"]),
        ("link out", tar(&[link("h", b'1', "../../etc/passwd")]), &["\"h\"", ".."]),
        ("link absolute", tar(&[link("h", b'1', "/etc/passwd")]), &["\"h\"", "absolute"]),
        ("link to nothing", tar(&[link("h", b'1', "no")]), &["\"h\"", "\"no\"", "not there"]),
        ("link to folder", tar(&[folder("d"), link("h", b'1', "d")]), &["\"h\"", "a folder"]),
        (
            "below a link",
            tar(&[link("s", b'2', "/etc"), file("s/passwd", "x")]),
            &["s/passwd", "/s", "a link"],
        ),
        ("below a file", tar(&[file("f", ""), file("f/x", "")]), &["f/x", "no folder"]),
        ("lying length", lying, &["huge", "ends within a file's content"]),
        ("device", device.to_vec(), &["layer 1", "device number"]),
        ("damaged", damaged, &["at byte 0", "wrong sum"]),
        ("cut", cut, &["ends within"]),
        ("no end", no_end, &["its end is missing"]),
        ("not a tar", b"hello".to_vec(), &["ends within"]),
        ("empty", Vec::new(), &["its end is missing"]),
    ];
    for (name, bytes, expected) in cases {
        let error = layers(&[bytes], &Limits::STANDARD).unwrap_err();
        let story = story(&error);
        for expected in expected {
            assert!(story.contains(expected), "{name}: {story} without {expected:?}");
        }
        assert_eq!(error.kind(), ErrorKind::BadArchive, "{name}: {story}");
    }
}

#[test]
fn bombs_end_at_the_limit() {
    let limits = Limits { entries: 100, unpacked_bytes: 10 << 20 };
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let bomb = Member { name: "bomb", flag: b'0', link: "", content: b"" };
    encoder.write_all(&header(&bomb, 1 << 30)).unwrap();
    encoder.write_all(&vec![0; 64 << 20]).unwrap();
    let error = layers(&[encoder.finish().unwrap()], &limits).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{}", story(&error));
    assert!(story(&error).contains("bomb"), "{}", story(&error));

    // Zeros without end, after the end of the archive.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![0; 64 << 20]).unwrap();
    let error = layers(&[encoder.finish().unwrap()], &limits).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{}", story(&error));

    let names: Vec<String> = (0..200).map(|index| format!("device-{index}")).collect();
    let many: Vec<Member<'_>> = names.iter().map(|name| link(name, b'6', "")).collect();
    let error = layers(&[tar(&many)], &limits).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(story(&error).contains("device-"), "{}", story(&error));
}

fn paths(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending: Vec<(NodeId, String)> = vec![(dormouse_ext4::tree::ROOT, String::new())];
    while let Some((folder, path)) = pending.pop() {
        for entry in tree.entries(folder) {
            let below = format!("{path}/{}", String::from_utf8_lossy(entry.name));
            pending.push((entry.node, below.clone()));
            found.push(below);
        }
    }
    found.retain(|path| path != "/lost+found");
    found.sort();
    found
}

#[test]
fn layers_hide_replace_and_link() {
    let long = "x".repeat(20_000);
    let first = tar(&[
        folder("d"),
        file("d/old", &long),
        file("d/keep", &long),
        folder("opaque"),
        file("opaque/below", "1"),
        folder("opaque/sub"),
        file("opaque/sub/below", &long),
        file("gone", &long),
        file("becomes-folder", "1"),
        folder("becomes-file"),
        file("becomes-file/below", "1"),
        file("linked", &long),
    ]);
    let second = tar(&[
        file("d/.wh.old", ""),
        file("opaque/new", "2"),
        file("opaque/sub/new", "2"),
        file("opaque/.wh..wh..opq", ""),
        file(".wh.gone", ""),
        folder("becomes-folder"),
        file("becomes-folder/x", "2"),
        file("becomes-file", "2"),
        link("second-name", b'1', "linked"),
        file(".wh.not-there", ""),
        file("twice", "first"),
        file("twice", "second and last"),
    ]);
    let third = tar(&[file(".wh.linked", ""), file("d/keep", "3")]);
    let tree = layers(&[first, second, third], &Limits::STANDARD).unwrap();
    let expected = [
        "/becomes-file",
        "/becomes-folder",
        "/becomes-folder/x",
        "/d",
        "/d/keep",
        "/opaque",
        "/opaque/new",
        "/opaque/sub",
        "/opaque/sub/new",
        "/second-name",
        "/twice",
    ];
    assert_eq!(paths(&tree), expected);
}

#[test]
fn a_whiteout_in_its_own_layer_hides_only_what_lies_below() {
    let first = tar(&[folder("d"), file("d/old", "1")]);
    let second = tar(&[folder("d"), file("d/new", "2"), file(".wh.d", "")]);
    let tree = layers(&[first, second], &Limits::STANDARD).unwrap();
    assert_eq!(paths(&tree), ["/d", "/d/new"]);
}

/// A layer that hid something in a folder and then the folder kept the folder: naming it in a
/// whiteout's own path counted as having it.
#[test]
fn a_folder_in_which_something_is_hidden_can_be_hidden_after() {
    let lower = tar(&[folder("c"), folder("c/d"), file("c/d/a", "1"), file("kept", "2")]);
    let upper = tar(&[file("c/d/.wh.a", ""), file("c/.wh.d", ""), file(".wh.c", "")]);
    let tree = layers(&[lower.clone(), upper], &Limits::STANDARD).unwrap();
    assert!(tree.lookup_path(b"c").is_none());
    assert!(tree.lookup_path(b"kept").is_some());
    // What the same layer has is not hidden by it.
    let upper = tar(&[file("c/d/.wh.a", ""), file("c/new", ""), file(".wh.c", "")]);
    let tree = layers(&[lower, upper], &Limits::STANDARD).unwrap();
    assert!(tree.lookup_path(b"c/d").is_none());
    assert!(tree.lookup_path(b"c/new").is_some());
}
