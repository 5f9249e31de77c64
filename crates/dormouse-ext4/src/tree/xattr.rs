//! Extended attributes: the names that ext4 shortens, and its own form of POSIX ACLs.

/// An extended attribute as `getxattr(2)` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xattr {
    /// The name with its namespace, such as `user.note`.
    pub name: Vec<u8>,

    /// The value.
    pub value: Vec<u8>,
}

/// Namespaces by number; the longest match comes first.
const PREFIXES: [(u8, &[u8]); 7] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
    (8, b"system.richacl"),
    (7, b"system."),
];

/// The namespace's number and the rest of a name, if ext4 has the namespace.
pub(crate) fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.into_iter().find_map(|(number, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        // Some prefixes are whole names, the others need a rest.
        (prefix.ends_with(b".") != rest.is_empty()).then_some((number, rest))
    })
}

/// The full name of what lies in an image, if the namespace is one we know.
pub(crate) fn join_name(number: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (_, prefix) = PREFIXES.into_iter().find(|&(known, _)| known == number)?;
    Some([prefix, rest].concat())
}

/// Whether the namespace holds ACLs.
pub(crate) fn is_acl(number: u8) -> bool {
    number == 2 || number == 3
}

const ACL_VERSION_XATTR: u32 = 2;
const ACL_VERSION_DISK: u32 = 1;
const ACL_USER: u16 = 2;
const ACL_GROUP: u16 = 8;

/// Rewrites an ACL from the form of `getxattr(2)`, where every entry has an id, to that of ext4,
/// where only named users and groups have one.
pub(crate) fn acl_to_disk(value: &[u8]) -> Option<Vec<u8>> {
    let rest = value.strip_prefix(&ACL_VERSION_XATTR.to_le_bytes())?;
    let (entries, rest) = rest.as_chunks::<8>();
    if !rest.is_empty() {
        return None;
    }
    let mut disk = ACL_VERSION_DISK.to_le_bytes().to_vec();
    for entry in entries {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let named = matches!(tag, ACL_USER | ACL_GROUP);
        disk.extend_from_slice(if named { entry } else { &entry[..4] });
    }
    Some(disk)
}

/// The other way round.
pub(crate) fn acl_from_disk(disk: &[u8]) -> Option<Vec<u8>> {
    let mut rest = disk.strip_prefix(&ACL_VERSION_DISK.to_le_bytes())?;
    let mut value = ACL_VERSION_XATTR.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let tag = u16::from_le_bytes([*rest.first()?, *rest.get(1)?]);
        let named = matches!(tag, ACL_USER | ACL_GROUP);
        let (entry, after) = rest.split_at_checked(if named { 8 } else { 4 })?;
        value.extend_from_slice(entry);
        if !named {
            value.extend_from_slice(&[0xff; 4]);
        }
        rest = after;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_and_joined() {
        type Split = Option<(u8, &'static [u8])>;
        let cases: [(&[u8], Split); 7] = [
            (b"user.a.b", Some((1, b"a.b"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.data", Some((7, b"data"))),
            (b"user.", None),
            (b"com.apple.what", None),
            (b"", None),
        ];
        for (name, expected) in cases {
            assert_eq!(split_name(name), expected, "{}", name.escape_ascii());
            if let Some((number, rest)) = expected {
                assert_eq!(join_name(number, rest).unwrap(), name);
            }
        }
    }

    #[test]
    fn acls_change_their_form_and_back() {
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let entries = [
            entry(1, 7, u32::MAX),
            entry(2, 6, 1000),
            entry(4, 5, u32::MAX),
            entry(8, 4, 70_000),
            entry(16, 7, u32::MAX),
            entry(32, 0, u32::MAX),
        ];
        let value = [&2u32.to_le_bytes()[..], &entries.concat()].concat();
        let disk = acl_to_disk(&value).unwrap();
        assert_eq!(disk.len(), 4 + 4 * 4 + 2 * 8);
        assert_eq!(acl_from_disk(&disk).unwrap(), value);
        assert_eq!(acl_to_disk(&value[..value.len() - 1]), None);
        assert_eq!(acl_from_disk(&disk[..disk.len() - 1]), None);
    }
}
