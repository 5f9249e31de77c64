//! An index and a manifest of an OCI image: what is chosen has a digest that is no path.
#![no_main]

use dormouse_ext4::input::oci::host_platform;
use dormouse_ext4::input::oci::manifest::{Wanted, parse_index, parse_manifest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(index) = parse_index(data) {
        for tag in [None, Some("v1".to_owned())] {
            let wanted = Wanted { tag, platform: host_platform() };
            if let Ok(found) = wanted.choose(&index, true) {
                assert!(index.manifests.contains(&found));
                assert!(found.digest.hex().bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
        }
    }
    if let Ok(manifest) = parse_manifest(data) {
        for layer in manifest.layers {
            assert!(matches!(layer.digest.algorithm(), "sha256" | "sha512"));
        }
    }
});
