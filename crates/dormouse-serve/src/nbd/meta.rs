//! Metadata contexts: what a device offers, what a client asked for, and the runs in between.
//!
//! The id of a context is its place in the device's list, counted from 1.

use super::option::MetaRequest;
use crate::device::{BlockDevice, Context, FlagsWidth};

/// A context that a client selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Selected {
    pub(crate) id: u32,
    pub(crate) context: Context,
}

/// What a query set matched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// These contexts, each once, in the device's order.
    Contexts(Vec<Selected>),

    /// A context was asked for by name whose flags do not fit compact headers.
    NeedsExtendedHeaders,
}

/// Contexts for LIST: all without queries, all of a namespace for `namespace:`.
pub(crate) fn list(device: &dyn BlockDevice, request: &MetaRequest<'_>, extended: bool) -> Match {
    matching(device, request, extended, |name, query| {
        name == query || (query.ends_with(':') && name.starts_with(query))
    })
}

/// Contexts for SET: those named exactly, others are passed over.
pub(crate) fn select(device: &dyn BlockDevice, request: &MetaRequest<'_>, extended: bool) -> Match {
    if request.query_count == 0 {
        return Match::Contexts(Vec::new());
    }
    matching(device, request, extended, |name, query| name == query)
}

fn matching(
    device: &dyn BlockDevice,
    request: &MetaRequest<'_>,
    extended: bool,
    matches: impl Fn(&str, &str) -> bool,
) -> Match {
    let mut found = Vec::new();
    for (id, &context) in (1..).zip(device.contexts()) {
        let all = request.query_count == 0;
        if !all && !request.queries().any(|query| matches(context.name, query)) {
            continue;
        }
        if context.flags == FlagsWidth::U64 && !extended {
            if request.queries().any(|query| query == context.name) {
                return Match::NeedsExtendedHeaders;
            }
            continue;
        }
        found.push(Selected { id, context });
    }
    Match::Contexts(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{BASE_ALLOCATION, DIRTY_CONTEXT, DeviceResult, SOURCE_CONTEXT};

    struct Device;

    impl BlockDevice for Device {
        fn size_bytes(&self) -> u64 {
            0
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> DeviceResult<()> {
            Ok(())
        }
        fn contexts(&self) -> &[Context] {
            &[
                Context::ALLOCATION,
                Context { name: DIRTY_CONTEXT, flags: FlagsWidth::U32 },
                Context { name: SOURCE_CONTEXT, flags: FlagsWidth::U64 },
            ]
        }
    }

    fn ask(queries: &[&str], extended: bool) -> (Option<Vec<u32>>, Option<Vec<u32>>) {
        let mut data = vec![0; 4];
        data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        for query in queries {
            data.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
            data.extend(query.as_bytes());
        }
        let request = MetaRequest::parse(&data).unwrap();
        let ids = |found| match found {
            Match::Contexts(found) => {
                Some(found.iter().map(|selected: &Selected| selected.id).collect())
            }
            Match::NeedsExtendedHeaders => None,
        };
        (ids(list(&Device, &request, extended)), ids(select(&Device, &request, extended)))
    }

    #[test]
    fn listing_knows_namespaces_and_setting_only_names() {
        let some = |ids: &[u32]| Some(ids.to_vec());
        for (queries, extended, listed, set) in [
            (&[][..], true, some(&[1, 2, 3]), some(&[])),
            (&[], false, some(&[1, 2]), some(&[])),
            (&["base:"], true, some(&[1]), some(&[])),
            (&["dormouse:"], true, some(&[2, 3]), some(&[])),
            (&["dormouse:"], false, some(&[2]), some(&[])),
            (&[BASE_ALLOCATION, BASE_ALLOCATION], false, some(&[1]), some(&[1])),
            (&[SOURCE_CONTEXT, "x:y", ""], true, some(&[3]), some(&[3])),
            (&[SOURCE_CONTEXT], false, None, None),
            (&["base"], true, some(&[]), some(&[])),
        ] {
            assert_eq!(ask(queries, extended), (listed, set), "{queries:?} {extended}");
        }
    }
}
