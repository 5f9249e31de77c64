//! What users type: snapshots, images, rules and codecs print as what they are read from.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use dormouse_image::codec::Codec;
use dormouse_store::gc::KeepRules;
use dormouse_store::name::{ImageName, ImageRef, NAME_BYTES_MAX, Name, SnapRef};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some(name) = round_trip::<Name>(text) {
        assert!(name.as_str() == text && (1..=NAME_BYTES_MAX).contains(&text.len()));
        assert!(!text.contains(['/', '@', ':']) && !text.starts_with('.'));
    }
    if let Some(snap) = round_trip::<SnapRef>(text) {
        assert_eq!(snap.to_string(), text);
        assert_ne!(snap.number, Some(0));
    }
    if let Some(image) = round_trip::<ImageName>(text) {
        let full = image.to_string();
        assert!(full == text || full == format!("disk/{text}"));
    }
    if let Some(image) = round_trip::<ImageRef>(text) {
        assert!(text.starts_with(&format!("{}:", image.snap)));
    }
    round_trip::<Codec>(text);
    if let Ok(rules) = text.parse::<KeepRules>() {
        assert_ne!(rules, KeepRules::default());
    }
});

fn round_trip<T: FromStr + Display + Debug + PartialEq>(text: &str) -> Option<T> {
    let read = text.parse::<T>().ok()?;
    let again = read.to_string().parse::<T>().ok();
    assert_eq!(again.as_ref(), Some(&read));
    Some(read)
}
