//! `dormouse log`: the lineage of a snapshot as a tree.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use dormouse_store::manifest::Manifest;
use serde::Serialize;
use uuid::Uuid;

use crate::app::App;
use crate::cli::SnapArgs;
use crate::output::colour::Palette;
use crate::output::size::human;
use crate::output::time::utc;

#[derive(Serialize)]
struct LogObject {
    snapshot: String,
    lineage: Vec<LogRow>,
}

#[derive(Serialize)]
struct LogRow {
    snapshot: String,
    uuid: Option<Uuid>,
    parent: Option<String>,
    created: Option<String>,
    is_removed: bool,
    is_ancestor: bool,
    stored_bytes: Option<u64>,
}

pub(super) fn run(app: &mut App, args: &SnapArgs) -> Result<()> {
    let store = app.open()?;
    let wanted = store.manifest(&args.snap)?;
    let family = Family::of(&wanted, store.list(None)?.snapshots);
    if app.json {
        let lineage = family.rows().into_iter().map(|row| family.object(&row)).collect();
        app.out.json(&LogObject { snapshot: wanted.display_name(), lineage })?;
        return Ok(());
    }
    for row in family.rows() {
        let line = family.line(&row, app.palette);
        writeln!(app.out, "{line}")?;
    }
    Ok(())
}

/// The tree that a snapshot belongs to.
#[derive(Debug)]
struct Family {
    wanted: Uuid,
    members: HashMap<Uuid, Manifest>,
    children: HashMap<Uuid, Vec<Uuid>>,
    /// From the root down to the wanted one.
    ancestors: Vec<Uuid>,
    /// The root's parent, if it was removed: its UUID is all that is known of its own lineage.
    removed: Option<(Uuid, String)>,
}

#[derive(Debug, PartialEq, Eq)]
struct Row {
    prefix: String,
    member: Option<Uuid>,
}

impl Family {
    fn of(wanted: &Manifest, snapshots: Vec<Manifest>) -> Family {
        let mut members: HashMap<Uuid, Manifest> =
            snapshots.into_iter().map(|manifest| (manifest.uuid, manifest)).collect();
        // It may have been removed since it was looked up.
        members.entry(wanted.uuid).or_insert_with(|| wanted.clone());
        let mut children: HashMap<Uuid, Vec<Uuid>> = HashMap::new();
        for manifest in members.values() {
            if let Some(parent) = &manifest.parent {
                children.entry(parent.uuid).or_default().push(manifest.uuid);
            }
        }
        for siblings in children.values_mut() {
            // Version 7 UUIDs begin with the time.
            siblings.sort_by_key(|uuid| (members[uuid].created, *uuid));
        }
        let mut ancestors = vec![wanted.uuid];
        let mut removed = None;
        let mut at = wanted;
        while let Some(parent) = &at.parent {
            match members.get(&parent.uuid) {
                // A manifest that was tampered with could make a ring.
                Some(manifest) if !ancestors.contains(&parent.uuid) => at = manifest,
                Some(_) => break,
                None => {
                    let name = format!("{}@{}", parent.name, parent.number);
                    removed = Some((parent.uuid, name));
                    break;
                }
            }
            ancestors.push(at.uuid);
        }
        ancestors.reverse();
        Family { wanted: wanted.uuid, members, children, ancestors, removed }
    }

    /// The tree from its root on: a chain stays in its column, and forks stand right of it.
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut seen = std::collections::HashSet::new();
        // What is to be drawn next is on top.
        let mut pending: Vec<(Uuid, String, String)> = Vec::new();
        let forks = |children: &[Uuid], trunk: Option<Uuid>, prefix: &str| {
            let mut pending = Vec::new();
            pending.extend(trunk.map(|uuid| (uuid, prefix.to_owned(), prefix.to_owned())));
            let forks: Vec<Uuid> =
                children.iter().copied().filter(|uuid| Some(*uuid) != trunk).collect();
            for (index, uuid) in forks.iter().enumerate().rev() {
                let is_end = trunk.is_none() && index + 1 == forks.len();
                let (corner, line) = if is_end { ("└─", "  ") } else { ("├─", "│ ") };
                pending.push((*uuid, format!("{prefix}{corner}"), format!("{prefix}{line}")));
            }
            pending
        };
        match &self.removed {
            Some((uuid, name)) => {
                rows.push(Row { prefix: String::new(), member: None });
                let children = self.children.get(uuid).map_or(&[][..], Vec::as_slice);
                let name = name.split_once('@').map_or(name.as_str(), |(name, _)| name);
                pending.extend(forks(children, self.trunk(children, name), ""));
            }
            None => pending.push((self.ancestors[0], String::new(), String::new())),
        }
        while let Some((uuid, prefix, below)) = pending.pop() {
            if !seen.insert(uuid) {
                continue;
            }
            rows.push(Row { prefix, member: Some(uuid) });
            let children = self.children.get(&uuid).map_or(&[][..], Vec::as_slice);
            let name = self.members[&uuid].name.as_str();
            pending.extend(forks(children, self.trunk(children, name), &below));
        }
        rows
    }

    /// The child that goes on in the same column: the newest of the same name.
    fn trunk(&self, children: &[Uuid], name: &str) -> Option<Uuid> {
        let same = |uuid: &&Uuid| self.members[*uuid].name.as_str() == name;
        children.iter().rev().find(same).copied()
    }

    fn line(&self, row: &Row, palette: Palette) -> String {
        let Some(manifest) = row.member.map(|uuid| &self.members[&uuid]) else {
            let name = self.removed.as_ref().map_or("", |(_, name)| name);
            return palette.dim(&format!("○ {name} (removed)"));
        };
        let name = manifest.display_name();
        let mut figures =
            format!("{}  {} stored", utc(manifest.created), human(manifest.figures.stored_bytes));
        for (key, value) in &manifest.labels {
            figures.push_str(&format!("  {key}={value:?}"));
        }
        let (mark, name) =
            if manifest.uuid == self.wanted { ("◉", palette.bold(&name)) } else { ("●", name) };
        format!("{}{mark} {name}  {}", row.prefix, palette.dim(&figures))
    }

    fn object(&self, row: &Row) -> LogRow {
        match row.member.map(|uuid| &self.members[&uuid]) {
            None => LogRow {
                snapshot: self.removed.as_ref().map_or_else(String::new, |(_, name)| name.clone()),
                uuid: self.removed.as_ref().map(|(uuid, _)| *uuid),
                parent: None,
                created: None,
                is_removed: true,
                is_ancestor: true,
                stored_bytes: None,
            },
            Some(manifest) => LogRow {
                snapshot: manifest.display_name(),
                uuid: Some(manifest.uuid),
                parent: manifest
                    .parent
                    .as_ref()
                    .map(|parent| format!("{}@{}", parent.name, parent.number)),
                created: Some(manifest.created.to_string()),
                is_removed: false,
                is_ancestor: manifest.uuid != self.wanted
                    && self.ancestors.contains(&manifest.uuid),
                stored_bytes: Some(manifest.figures.stored_bytes),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use dormouse_store::manifest::{Figures, ParentRef, Vmm};
    use dormouse_store::name::SnapRef;
    use jiff::Timestamp;

    use super::*;

    fn snapshot(id: u128, name: &str, parent: Option<(u128, &str)>) -> Manifest {
        let snap: SnapRef = name.parse().unwrap();
        Manifest {
            uuid: Uuid::from_u128(id),
            name: snap.name,
            number: snap.number.unwrap(),
            parent: parent.map(|(id, name)| {
                let snap: SnapRef = name.parse().unwrap();
                let number = snap.number.unwrap();
                ParentRef { uuid: Uuid::from_u128(id), name: snap.name, number }
            }),
            created: Timestamp::from_second(i64::try_from(id).unwrap()).unwrap(),
            key_id: String::new(),
            pack: None,
            images: Vec::new(),
            memory_layout: Vec::new(),
            vmm: Vmm::default(),
            labels: std::collections::BTreeMap::new(),
            figures: Figures::default(),
        }
    }

    fn drawing(wanted: &Manifest, snapshots: &[Manifest]) -> Vec<String> {
        let family = Family::of(wanted, snapshots.to_vec());
        let name = |row: &Row| {
            row.member.map_or("○".to_owned(), |uuid| family.members[&uuid].display_name())
        };
        family.rows().iter().map(|row| format!("{}{}", row.prefix, name(row))).collect()
    }

    #[test]
    fn a_chain_stays_in_its_column_and_forks_stand_beside_it() {
        let snapshots = [
            snapshot(1, "vm@1", None),
            snapshot(2, "vm@2", Some((1, "vm@1"))),
            snapshot(3, "fork@1", Some((1, "vm@1"))),
            snapshot(4, "fork@2", Some((3, "fork@1"))),
            snapshot(5, "x@1", Some((4, "fork@2"))),
            snapshot(6, "y@1", Some((4, "fork@2"))),
            snapshot(7, "vm@3", Some((2, "vm@2"))),
            snapshot(8, "other@1", None),
        ];
        assert_eq!(
            drawing(&snapshots[1], &snapshots),
            ["vm@1", "├─fork@1", "│ fork@2", "│ ├─x@1", "│ └─y@1", "vm@2", "vm@3"]
        );
        assert_eq!(drawing(&snapshots[7], &snapshots), ["other@1"]);
    }

    #[test]
    fn a_removed_parent_holds_its_children_together() {
        let snapshots =
            [snapshot(2, "vm@2", Some((1, "vm@1"))), snapshot(3, "fork@1", Some((1, "vm@1")))];
        assert_eq!(drawing(&snapshots[0], &snapshots), ["○", "├─fork@1", "vm@2"]);
    }

    #[test]
    fn a_ring_ends() {
        let snapshots =
            [snapshot(1, "vm@1", Some((2, "vm@2"))), snapshot(2, "vm@2", Some((1, "vm@1")))];
        assert_eq!(drawing(&snapshots[0], &snapshots).len(), 2);
    }
}
