//! Random layers, applied here and unpacked by umoci: the kernel sees the same of both.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use dormouse_ext4::layout::{Options, Size};
use proptest::prelude::*;

use crate::hostile::{Member, file, folder, link, tar};
use crate::judge::{Mount, Seen, assert_same, fsck, said, walk};
use crate::oci;

/// What a layer does at a path, if it can be done there.
#[derive(Clone, Debug)]
enum Step {
    Folder(String),
    File(String, u16),
    Symlink(String),
    Link(String, u8),
    Hide(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::Folder),
        3 => (path(), 0u16..9000).prop_map(|(path, len)| Step::File(path, len)),
        1 => path().prop_map(Step::Symlink),
        2 => (path(), any::<u8>()).prop_map(|(path, to)| Step::Link(path, to)),
        2 => path().prop_map(Step::Hide),
        1 => path().prop_map(Step::Opaque),
    ]
}

/// What is where, as far as a layer has to know to be one that every reader takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    Other,
}

type State = BTreeMap<String, Kind>;

fn forget_below(state: &mut State, path: &str) {
    let below = format!("{path}/");
    state.retain(|other, _| !other.starts_with(&below));
}

fn has_parent(state: &State, path: &str) -> bool {
    path.rsplit_once('/').is_none_or(|(parent, _)| state.get(parent) == Some(&Kind::Folder))
}

fn split(path: &str) -> (String, &str) {
    path.rsplit_once('/').map_or((String::new(), path), |(dir, name)| (format!("{dir}/"), name))
}

/// A layer of those steps that can be done: what it hides first, as those who write layers do.
fn layer(steps: &[Step], state: &mut State) -> Vec<u8> {
    let mut names: Vec<(String, u8, String, usize)> = Vec::new();
    for step in steps {
        match step {
            Step::Hide(path) if state.contains_key(path) => {
                let (dir, name) = split(path);
                names.push((format!("{dir}.wh.{name}"), b'0', String::new(), 0));
                state.remove(path);
                forget_below(state, path);
            }
            Step::Opaque(path) if state.get(path) == Some(&Kind::Folder) => {
                names.push((format!("{path}/.wh..wh..opq"), b'0', String::new(), 0));
                forget_below(state, path);
            }
            _ => {}
        }
    }
    for step in steps {
        match step {
            Step::Folder(path) if has_parent(state, path) => {
                names.push((path.clone(), b'5', String::new(), 0));
                state.insert(path.clone(), Kind::Folder);
            }
            Step::File(path, len) if has_parent(state, path) => {
                forget_below(state, path);
                names.push((path.clone(), b'0', String::new(), usize::from(*len)));
                state.insert(path.clone(), Kind::File);
            }
            Step::Symlink(path) if has_parent(state, path) => {
                forget_below(state, path);
                names.push((path.clone(), b'2', "../where/ever".to_owned(), 0));
                state.insert(path.clone(), Kind::Other);
            }
            Step::Link(path, to) if has_parent(state, path) => {
                let below = format!("{path}/");
                let files: Vec<&String> = state
                    .iter()
                    .filter(|(other, kind)| {
                        **kind == Kind::File && *other != path && !other.starts_with(&below)
                    })
                    .map(|(other, _)| other)
                    .collect();
                let Some(&target) = files.get(usize::from(*to) % files.len().max(1)) else {
                    continue;
                };
                let target = target.clone();
                forget_below(state, path);
                names.push((path.clone(), b'1', target, 0));
                state.insert(path.clone(), Kind::File);
            }
            _ => {}
        }
    }
    let content = "0123456789abcdef".repeat(600);
    let members: Vec<Member<'_>> = names
        .iter()
        .map(|(name, flag, target, len)| match flag {
            b'5' => folder(name),
            b'0' => file(name, &content[..*len]),
            flag => link(name, *flag, target),
        })
        .collect();
    tar(&members)
}

/// An OCI layout of plain layers, with all that umoci wants to know.
fn layout(at: &Path, layers: &[Vec<u8>]) {
    let blobs: Vec<(String, usize)> = layers.iter().map(|layer| oci::put(at, layer)).collect();
    let ids: Vec<String> = blobs.iter().map(|(digest, _)| format!("{digest:?}")).collect();
    let architecture = dormouse_ext4::input::oci::host_platform().architecture;
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{}},
        "rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        ids.join(",")
    );
    let (config, config_bytes) = oci::put(at, config.as_bytes());
    let kind = "application/vnd.oci.image";
    let layers: Vec<String> = blobs
        .iter()
        .map(|(digest, size)| {
            format!(r#"{{"mediaType":"{kind}.layer.v1.tar","digest":"{digest}","size":{size}}}"#)
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"{kind}.config.v1+json",
        "digest":"{config}","size":{config_bytes}}},"layers":[{}]}}"#,
        layers.join(",")
    );
    let (digest, size) = oci::put(at, manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{kind}.manifest.v1+json",
        "digest":"{digest}","size":{size},
        "annotations":{{"org.opencontainers.image.ref.name":"v1"}}}}]}}"#
    );
    fs::write(at.join("index.json"), index).unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Without the times of folders, which umoci leaves as unpacking made them.
fn seen(root: &Path) -> Vec<Seen> {
    let mut seen = walk(root);
    for seen in &mut seen {
        seen.mtime = (0, 0);
    }
    // Nobody says whose the root is.
    (seen[0].mode, seen[0].owner) = (0, (0, 0));
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn umoci_unpacks_the_same(
        steps in prop::collection::vec(prop::collection::vec(step(), 1..25), 1..5),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (image, bundle) = (dir.path().join("image"), dir.path().join("bundle"));
        fs::create_dir(&image).unwrap();
        let mut state = State::new();
        let layers: Vec<Vec<u8>> =
            steps.iter().map(|steps| layer(steps, &mut state)).collect();
        layout(&image, &layers);
        let mut umoci = Command::new("umoci");
        umoci.arg("unpack").arg("--image").arg(format!("{}:v1", image.display())).arg(&bundle);
        said(&mut umoci);
        let ext4 = dir.path().join("ext4");
        oci::build(&image, &ext4, &Options::new(Size::Slack(0))).unwrap();
        fsck(&ext4);
        let streamed = dir.path().join("streamed");
        oci::build_through_sink(&image, &streamed, &Options::new(Size::Slack(0))).unwrap();
        prop_assert!(fs::read(&ext4).unwrap() == fs::read(&streamed).unwrap());
        let mount = Mount::new(&ext4, &dir.path().join("mount"), "ro");
        let ours = seen(&mount.0);
        assert_same(&seen(&bundle.join("rootfs")), &ours);
        // The generator's own idea of it, so that it cannot be empty by mistake.
        prop_assert_eq!(ours.len(), state.len() + 1);
    }
}
