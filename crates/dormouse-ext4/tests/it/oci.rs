//! OCI layouts and archives: layers in all packings, digests, tags and platforms.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use dormouse_ext4::error::{Error, ErrorKind};
use dormouse_ext4::input::Limits;
use dormouse_ext4::input::oci::manifest::Wanted;
use dormouse_ext4::input::oci::{Blobs, Image, LayoutArchive, LayoutFolder, host_platform, read};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Stage;
use dormouse_ext4::tree::Tree;
use dormouse_ext4::write::{Unwatched, write};
use sha2::{Digest, Sha256};

use crate::hostile::{file, folder, tar};
use crate::judge::{fsck, said};
use crate::sink;

pub(crate) fn put(layout: &Path, bytes: &[u8]) -> (String, usize) {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(&hex), bytes).unwrap();
    (format!("sha256:{hex}"), bytes.len())
}

/// A layout with one image of three layers, each packed in its own way. Returns their digests.
fn layout(at: &Path) -> Vec<String> {
    let first = tar(&[folder("etc"), file("etc/a", "1"), file("etc/b", "1")]);
    let second = tar(&[file("etc/.wh.a", ""), file("c", "2")]);
    let third = tar(&[file("etc/b", "three")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&second).unwrap();
    let blobs = [
        ("application/vnd.oci.image.layer.v1.tar", first),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.finish().unwrap()),
        ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::encode_all(&third[..], 3).unwrap()),
    ];
    let mut digests = Vec::new();
    let mut layers = Vec::new();
    for (kind, bytes) in blobs {
        let (digest, size) = put(at, &bytes);
        layers.push(format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{size}}}"#));
        digests.push(digest);
    }
    let manifest = format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
    let (digest, size) = put(at, manifest.as_bytes());
    let platform = host_platform();
    let inner = format!(
        r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",
        "digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"{}"}}}},
        {{"digest":"{digest}","size":{size},"platform":{{"os":"plan9","architecture":"mips"}}}}]}}"#,
        platform.architecture
    );
    let (digest, size) = put(at, inner.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json",
        "digest":"{digest}","size":{size},
        "annotations":{{"org.opencontainers.image.ref.name":"v1"}}}}]}}"#
    );
    fs::write(at.join("index.json"), index).unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    digests
}

/// Applies an image and writes it; e2fsck looks at what was made.
fn apply(blobs: Arc<dyn Blobs>, tag: Option<&str>) -> Result<(Tree, Image), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ext4");
    let made = make(blobs, tag, &path, &Options::new(Size::Slack(0)))?;
    fsck(&path);
    Ok(made)
}

fn make(
    blobs: Arc<dyn Blobs>,
    tag: Option<&str>,
    path: &Path,
    options: &Options,
) -> Result<(Tree, Image), Error> {
    let file = fs::File::options().read(true).write(true).create_new(true).open(path);
    let file = Arc::new(file.unwrap());
    let mut stage = Stage::new(Arc::clone(&file), options.size);
    let mut tree = Tree::new();
    let wanted = Wanted { tag: tag.map(str::to_owned), platform: host_platform() };
    let image = read(&mut tree, &mut stage, &blobs, &wanted, &Limits::STANDARD, &Unwatched)?;
    let staged = stage.finish()?;
    let layout = Layout::plan(&mut tree, options, &staged)?;
    write(&tree, &layout, &file, &Unwatched)?;
    Ok((tree, image))
}

/// Builds the only image of a layout.
pub(crate) fn build(layout: &Path, path: &Path, options: &Options) -> Result<(), Error> {
    make(Arc::new(LayoutFolder::new(layout)), None, path, options).map(|_| ())
}

/// Builds it as a store would take it.
pub(crate) fn build_through_sink(
    layout: &Path,
    path: &Path,
    options: &Options,
) -> Result<(), Error> {
    let blobs: Arc<dyn Blobs> = Arc::new(LayoutFolder::new(layout));
    let wanted = Wanted { tag: None, platform: host_platform() };
    sink::write(path, options, |stage| {
        let mut tree = Tree::new();
        read(&mut tree, stage, &blobs, &wanted, &Limits::STANDARD, &Unwatched)?;
        Ok(tree)
    })
}

fn check(tree: &Tree) {
    assert!(tree.lookup_path(b"etc/a").is_none());
    assert!(tree.lookup_path(b"etc/b").is_some());
    assert!(tree.lookup_path(b"c").is_some());
    // With the root and `lost+found`.
    assert_eq!(tree.len(), 5);
}

#[test]
fn a_layout_and_an_archive_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let digests = layout(dir.path());
    let (tree, image) = apply(Arc::new(LayoutFolder::new(dir.path())), Some("v1")).unwrap();
    check(&tree);
    let found: Vec<String> = image.layers.iter().map(ToString::to_string).collect();
    assert_eq!(found, digests);

    let archive = dir.path().join("archive.tar");
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(dir.path()).arg("-cf").arg(&archive);
    said(pack.args(["./oci-layout", "./index.json", "blobs"]));
    let blobs = LayoutArchive::open(&archive, &Limits::STANDARD).unwrap();
    check(&apply(Arc::new(blobs), None).unwrap().0);

    let error = apply(Arc::new(LayoutFolder::new(dir.path())), Some("v2")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let nowhere = apply(Arc::new(LayoutFolder::new(Path::new("/nowhere"))), None).unwrap_err();
    assert_eq!(nowhere.kind(), ErrorKind::NotFound);
}

#[test]
fn a_layer_with_another_digest_is_refused_by_its_name() {
    for change in ["flip", "longer", "shorter", "gone"] {
        let dir = tempfile::tempdir().unwrap();
        let digests = layout(dir.path());
        let path = dir.path().join("blobs").join(digests[1].replace(':', "/"));
        let mut bytes = fs::read(&path).unwrap();
        match change {
            // The time in gzip's header, which nothing else checks.
            "flip" => bytes[4] ^= 1,
            "longer" => bytes.extend([0; 100]),
            "shorter" => bytes.truncate(bytes.len() - 1),
            _ => {}
        }
        if change == "gone" {
            fs::remove_file(&path).unwrap();
        } else {
            fs::write(&path, bytes).unwrap();
        }
        let error = apply(Arc::new(LayoutFolder::new(dir.path())), None).unwrap_err();
        assert!(error.to_string().contains("layer 2 of 3"), "{change}: {error}");
        assert!(error.to_string().contains(&digests[1]), "{change}: {error}");
    }
}

/// An image that no index describes tells by its configuration what it is for.
#[test]
fn an_image_for_another_platform_is_refused() {
    for (architecture, is_taken) in [("sparc", false), (&*host_platform().architecture, true)] {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let config = format!(r#"{{"os":"linux","architecture":"{architecture}"}}"#);
        let (config, config_bytes) = put(at, config.as_bytes());
        let manifest = format!(
            r#"{{"config":{{"mediaType":"application/vnd.oci.image.config.v1+json",
            "digest":"{config}","size":{config_bytes}}},"layers":[]}}"#
        );
        let (digest, size) = put(at, manifest.as_bytes());
        let index = format!(r#"{{"manifests":[{{"digest":"{digest}","size":{size}}}]}}"#);
        fs::write(at.join("index.json"), index).unwrap();
        let made = apply(Arc::new(LayoutFolder::new(at)), None);
        match made {
            Ok(_) => assert!(is_taken),
            Err(error) => {
                assert!(!is_taken);
                assert!(error.to_string().contains("linux/sparc"), "{error}");
            }
        }
    }
}
