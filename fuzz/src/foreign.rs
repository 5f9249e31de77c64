//! What holds of every map of a foreign device.

use dormouse_formats::page_map::PageMap;

/// The runs lie one behind the other from the first page to the last, and each page is found in its
/// run.
pub fn check_map(map: &PageMap) {
    let mut end = 0;
    for run in map.runs().take(10_000) {
        assert_eq!(run.start, end);
        assert!(run.pages > 0);
        end += run.pages;
        assert_eq!(map.lookup(run.start), Some(run));
        let last = map.lookup(end - 1).expect("inside");
        assert_eq!(last.pages, 1);
        assert_eq!(last.place.is_some(), run.place.is_some());
    }
    if map.len() <= 10_000 {
        assert_eq!(end, map.pages());
    }
    assert_eq!(map.lookup(map.pages()), None);
}
