//! What a path of the tree means.

use dormouse_store::name::{ImageName, Name, SnapRef};

/// The folder of all live VMs.
pub(super) const LIVE: &str = "live";

/// The folder whose files keep nothing but their sizes.
pub(super) const DISCARD: &str = "discard";

/// The folder of captures.
pub(super) const CAPTURE: &str = "capture";

/// The file with a snapshot's manifest.
pub(super) const MANIFEST: &str = "manifest.json";

/// A place in the tree. That a path means something does not mean that it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Root,
    /// The snapshots of a name.
    Name(Name),
    Snapshot(SnapRef),
    /// `disk` or `state` of a snapshot.
    Images(SnapRef, Group),
    Image(SnapRef, ImageName),
    Manifest(SnapRef),
    /// All live VMs.
    Lives,
    Live(Name),
    /// The writable memory of a live VM.
    LiveMemory(Name),
    LiveDisks(Name),
    LiveDisk(Name, Name),
    /// All captures.
    Captures,
    Capture(Name),
    /// A file of a capture; any name.
    Captured(Name, String),
    /// What lies below `discard`; the folder itself is the empty path.
    Discard(String),
}

/// Images that lie in a folder of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Disks,
    States,
}

impl Group {
    pub(super) const ALL: [Group; 2] = [Group::Disks, Group::States];

    pub(super) fn name(self) -> &'static str {
        match self {
            Group::Disks => "disk",
            Group::States => "state",
        }
    }

    fn named(name: &str) -> Option<Group> {
        Group::ALL.into_iter().find(|group| group.name() == name)
    }

    /// The name of an image in the group's folder, if it belongs there.
    pub(super) fn member(self, image: &ImageName) -> Option<&Name> {
        match (self, image) {
            (Group::Disks, ImageName::Disk(name)) | (Group::States, ImageName::State(name)) => {
                Some(name)
            }
            _ => None,
        }
    }

    fn image(self, name: Name) -> ImageName {
        match self {
            Group::Disks => ImageName::Disk(name),
            Group::States => ImageName::State(name),
        }
    }
}

impl Place {
    /// What a path means, if anything.
    pub(super) fn parse(path: &str) -> Option<Place> {
        let parts: Vec<&str> = path.split('/').collect();
        let name = |text: &str| Name::new(text).ok();
        Some(match parts[..] {
            [""] => Place::Root,
            [LIVE] => Place::Lives,
            [LIVE, live] => Place::Live(name(live)?),
            [LIVE, live, "memory"] => Place::LiveMemory(name(live)?),
            [LIVE, live, "disk"] => Place::LiveDisks(name(live)?),
            [LIVE, live, "disk", id] => Place::LiveDisk(name(live)?, name(id)?),
            [CAPTURE] => Place::Captures,
            [CAPTURE, id] => Place::Capture(name(id)?),
            [CAPTURE, id, file] if !file.is_empty() => Place::Captured(name(id)?, file.to_owned()),
            [DISCARD, ref rest @ ..] if !rest.contains(&"") => Place::Discard(rest.join("/")),
            [snap] => Place::Name(name(snap)?),
            [snap, number, ref rest @ ..] => {
                let snap = SnapRef { name: name(snap)?, number: Some(number_of(number)?) };
                match *rest {
                    [] => Place::Snapshot(snap),
                    ["memory"] => Place::Image(snap, ImageName::Memory),
                    [MANIFEST] => Place::Manifest(snap),
                    [group] => Place::Images(snap, Group::named(group)?),
                    [group, member] => {
                        Place::Image(snap, Group::named(group)?.image(name(member)?))
                    }
                    _ => return None,
                }
            }
            [] => return None,
        })
    }
}

/// A snapshot's number as it is printed, and no other way.
fn number_of(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number: &u64| *number > 0 && number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_mean_one_thing_or_nothing() {
        let name = |text: &str| Name::new(text).unwrap();
        let snap = || SnapRef { name: name("vm"), number: Some(12) };
        for (path, place) in [
            ("", Place::Root),
            ("vm", Place::Name(name("vm"))),
            ("vm/12", Place::Snapshot(snap())),
            ("vm/12/memory", Place::Image(snap(), ImageName::Memory)),
            ("vm/12/manifest.json", Place::Manifest(snap())),
            ("vm/12/disk", Place::Images(snap(), Group::Disks)),
            ("vm/12/disk/root", Place::Image(snap(), ImageName::Disk(name("root")))),
            ("vm/12/state/config.json", {
                Place::Image(snap(), ImageName::State(name("config.json")))
            }),
            ("live", Place::Lives),
            ("live/box", Place::Live(name("box"))),
            ("live/box/memory", Place::LiveMemory(name("box"))),
            ("live/box/disk", Place::LiveDisks(name("box"))),
            ("live/box/disk/root", Place::LiveDisk(name("box"), name("root"))),
            ("capture", Place::Captures),
            ("capture/box", Place::Capture(name("box"))),
            ("capture/box/memory", Place::Captured(name("box"), "memory".to_owned())),
            ("discard", Place::Discard(String::new())),
            ("discard/any/.thing at all", Place::Discard("any/.thing at all".to_owned())),
        ] {
            assert_eq!(Place::parse(path), Some(place), "{path}");
        }
        for path in [
            "/",
            "vm/",
            "vm/0",
            "vm/012",
            "vm/x",
            "vm/12/",
            "vm/12/disks",
            "vm/12/memory/x",
            "vm/12/disk/root/x",
            "vm/12/disk/",
            "vm/12/state/a/b",
            "live/",
            "live/box/memory/x",
            "live/box/disk/root/x",
            "live/box/x",
            "..",
            "vm/12/..",
            ".hidden",
            "vm/12/disk/live",
            "discard/",
            "capture/",
            "capture/.box",
            "capture/box/",
            "capture/box/a/b",
        ] {
            assert_eq!(Place::parse(path), None, "{path}");
        }
    }
}
