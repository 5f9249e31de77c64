//! What a registry says before it lets anybody in, and names of images: a name that is taken holds
//! nothing that could lead a URL elsewhere.
#![no_main]

use dormouse_ext4::input::registry::challenge::parse;
use dormouse_ext4::input::registry::reference::Reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    assert!(parse(text).iter().all(|challenge| !challenge.scheme.is_empty()));
    if let Ok(reference) = text.parse::<Reference>() {
        let (host, repository) = (reference.host(), reference.repository());
        assert!(!host.contains(['/', '@', '?', '#', ' ', '%', '\\']));
        assert!(repository.split('/').all(|part| !part.is_empty() && !part.starts_with('.')));
        assert!(!repository.contains(['@', '?', '#', ' ', '%', '\\', ':']));
        assert_eq!(
            reference
                .to_string()
                .parse::<Reference>()
                .ok()
                .map(|again| { (again.host().to_owned(), again.repository().to_owned()) }),
            Some((host.to_owned(), repository.to_owned()))
        );
    }
});
