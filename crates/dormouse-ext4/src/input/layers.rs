//! Archives applied to a tree: one, or the layers of an image one over the other.
//!
//! Rules: names are relative and stay inside; parents are folders, never links; of two entries of
//! one name the later wins, and folders keep what is in them. In layers, `.wh.NAME` hides what
//! lower layers put at `NAME`, and `.wh..wh..opq` what they put into the folder it lies in (OCI image
//! specification, "Representing Changes"). What breaks a rule is an error that names layer and entry.

use std::io::{self, Read};

use crate::disk::{BLOCK, NAME_BYTES_MAX, SYMLINK_BYTES_MAX};
use crate::error::{Error, ErrorKind, Result};
use crate::input::Limits;
use crate::input::decode::{ReadAhead, unpacked};
use crate::input::tar::{Member, MemberKind, Tar, shown};
use crate::stage::Stage;
use crate::tree::content::FileId;
use crate::tree::{Attributes, Kind, NodeId, ROOT, Time, Tree};
use crate::write::Watch;
use crate::write::xattr::XattrPlan;

/// What whiteouts begin with.
const WHITEOUT: &[u8] = b".wh.";

/// What other marks of AUFS begin with.
const MARK: &[u8] = b".wh..wh.";

/// Hides what lower layers put into the folder.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// How an archive is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// Names that begin with `.wh.` are names like others.
    Plain,

    /// They hide what lower layers have.
    Apply,
}

/// An archive in its place among others.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// What messages call it.
    pub label: &'a str,

    /// How many lie below it.
    pub number: u16,

    /// What names that begin with `.wh.` mean.
    pub whiteouts: Whiteouts,
}

/// Applies a stream, packed or not, to `tree`; contents go to `stage`.
pub fn apply(
    tree: &mut Tree,
    stage: &mut Stage<'_>,
    input: impl FnOnce() -> io::Result<Box<dyn Read + Send>> + Send + 'static,
    layer: Layer<'_>,
    limits: &Limits,
    watch: &dyn Watch,
) -> Result<()> {
    let input = ReadAhead::new(move || unpacked(input()?));
    let mut tar = Tar::new(input, limits.unpacked_bytes);
    let mut target = Target { tree, stage, layer, limits, entries: 0 };
    let told = |error: Error| {
        // A read error tells its own story; its first words are ours.
        error.within(layer.label.to_owned())
    };
    while let Some(member) = tar.next().map_err(told)? {
        if watch.is_cancelled() {
            return Err(Error::cancelled());
        }
        watch.entries(1);
        target.member(&mut tar, &member, watch).map_err(|error| match error.kind() {
            ErrorKind::Cancelled => error,
            // What a tree refuses is the archive's fault.
            ErrorKind::InvalidInput => {
                told(within_entry(error.of_kind(ErrorKind::BadArchive), &member))
            }
            _ => told(within_entry(error, &member)),
        })?;
    }
    target.stage.release(target.tree)
}

fn within_entry(error: Error, member: &Member) -> Error {
    error.within(format!("entry {}", shown(&member.name)))
}

struct Target<'a, 's> {
    tree: &'a mut Tree,
    stage: &'a mut Stage<'s>,
    layer: Layer<'a>,
    limits: &'a Limits,
    entries: u64,
}

impl Target<'_, '_> {
    fn member(&mut self, tar: &mut Tar, member: &Member, watch: &dyn Watch) -> Result<()> {
        self.entries += 1;
        if self.tree.len().max(self.entries) > self.limits.entries {
            let what = format!("more than {} entries", self.limits.entries);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let parts = parts(&member.name)?;
        if let Some(part) = parts.iter().find(|part| part.len() > NAME_BYTES_MAX) {
            let (len, part) = (part.len(), shown(part));
            return Err(bad(&format!("a name of {len} bytes, of which ext4 has 255: {part}")));
        }
        XattrPlan::of(&member.xattrs).check().map_err(|error| match error.kind() {
            ErrorKind::DoesNotFit => error.of_kind(ErrorKind::BadArchive),
            _ => error,
        })?;
        let Some((&name, parents)) = parts.split_last() else {
            if member.kind != MemberKind::Folder {
                return Err(bad("the root folder, as something else"));
            }
            self.tree.set_attributes(ROOT, &member.attributes);
            self.tree.set_xattrs(ROOT, member.xattrs.clone())?;
            return Ok(());
        };
        if self.layer.whiteouts == Whiteouts::Apply && name.starts_with(WHITEOUT) {
            return self.whiteout(parents, name);
        }
        let folder = self.folder(parents, member.attributes.mtime)?;
        if member.kind == MemberKind::Folder {
            return self.add_folder(folder, name, member);
        }
        if member.kind == MemberKind::HardLink {
            return self.add_link(folder, name, member);
        }
        self.tree.remove(folder, name);
        if member.kind == MemberKind::Symlink && member.link.is_empty() {
            return Err(bad("a symlink to nothing"));
        }
        if member.kind == MemberKind::Symlink && member.link.len() > SYMLINK_BYTES_MAX {
            let len = member.link.len();
            return Err(bad(&format!("a symlink to {len} bytes; {SYMLINK_BYTES_MAX} can be")));
        }
        let (major, minor) = member.device;
        let kind = match member.kind {
            MemberKind::Symlink => Kind::Symlink(&member.link),
            MemberKind::CharDevice => Kind::CharDevice { major, minor },
            MemberKind::BlockDevice => Kind::BlockDevice { major, minor },
            MemberKind::Fifo => Kind::Fifo,
            _ => {
                let (content, data) = self.content(tar, member, watch)?;
                Kind::File { bytes: member.bytes, content, data }
            }
        };
        let mut attributes = member.attributes;
        if member.kind == MemberKind::Symlink {
            // Linux has no others, whatever an archive says.
            attributes.mode = 0o777;
        }
        let node = self.tree.add(folder, name, self.layer.number, &attributes, kind)?;
        self.tree.set_xattrs(node, member.xattrs.clone())?;
        Ok(())
    }

    fn content(
        &mut self,
        tar: &mut Tar,
        member: &Member,
        watch: &dyn Watch,
    ) -> Result<(FileId, Option<Vec<std::ops::Range<u64>>>)> {
        let Some(sparse) = &member.sparse else {
            if member.bytes == 0 {
                return Ok((FileId::empty(), None));
            }
            let (id, mut placing) = self.stage.begin(member.bytes.div_ceil(BLOCK))?;
            tar.content(member.bytes, &mut |piece| {
                watch.bytes(piece.len() as u64);
                if watch.is_cancelled() {
                    return Err(Error::cancelled());
                }
                placing.write(piece)
            })?;
            placing.finish()?;
            return Ok((id, None));
        };
        let blocks = sparse.blocks();
        let count = blocks.iter().map(|range| range.end - range.start).sum();
        if count == 0 {
            return Ok((FileId::empty(), Some(blocks)));
        }
        let (id, mut placing) = self.stage.begin(count)?;
        let mut parts = sparse.data.iter().peekable();
        for range in &blocks {
            let (mut at, end) = (range.start * BLOCK, range.end * BLOCK);
            while let Some(part) = parts.next_if(|part| part.start < end) {
                zeros(&mut placing, part.start - at)?;
                tar.content(part.end - part.start, &mut |piece| {
                    watch.bytes(piece.len() as u64);
                    placing.write(piece)
                })?;
                at = part.end;
            }
            zeros(&mut placing, end - at)?;
        }
        placing.finish()?;
        Ok((id, Some(blocks)))
    }

    fn add_folder(&mut self, folder: NodeId, name: &[u8], member: &Member) -> Result<()> {
        let layer = self.layer.number;
        let node = match self.tree.lookup(folder, name) {
            Some(node) if self.tree.node(node).is_folder() => {
                self.tree.touch(folder, name, layer);
                self.tree.set_attributes(node, &member.attributes);
                node
            }
            found => {
                if found.is_some() {
                    self.tree.remove(folder, name);
                }
                self.tree.add(folder, name, layer, &member.attributes, Kind::Folder)?
            }
        };
        self.tree.set_xattrs(node, member.xattrs.clone())?;
        Ok(())
    }

    fn add_link(&mut self, folder: NodeId, name: &[u8], member: &Member) -> Result<()> {
        let target = || shown(&member.link);
        let mut at = ROOT;
        for part in parts(&member.link)? {
            let kind = self.tree.node(at);
            if kind.is_symlink() {
                return Err(bad(&format!("a hard link to {}, through a symlink", target())));
            }
            at = self
                .tree
                .lookup(at, part)
                .ok_or_else(|| bad(&format!("a hard link to {}, which is not there", target())))?;
        }
        if self.tree.node(at).is_folder() {
            return Err(bad(&format!("a hard link to {}, a folder", target())));
        }
        match self.tree.lookup(folder, name) {
            // A link to itself, as tars of changed trees have them.
            Some(found) if found == at => {
                self.tree.touch(folder, name, self.layer.number);
                return Ok(());
            }
            Some(_) => {
                self.tree.remove(folder, name);
            }
            None => {}
        }
        if self.tree.node(at).links == 0 {
            return Err(bad(&format!("a hard link to {}, which it replaces", target())));
        }
        self.tree.link(folder, name, self.layer.number, at)
    }

    /// The folder at a path, of which this layer speaks.
    fn folder(&mut self, parents: &[&[u8]], mtime: Time) -> Result<NodeId> {
        parents.iter().try_fold(ROOT, |at, part| {
            let found = self.below(at, part, mtime)?;
            self.tree.touch(at, part, self.layer.number);
            Ok(found)
        })
    }

    /// The folder of a name. One that is missing is made; a link or a file in its place is an error.
    fn below(&mut self, at: NodeId, part: &[u8], mtime: Time) -> Result<NodeId> {
        match self.tree.lookup(at, part) {
            Some(found) if self.tree.node(found).is_folder() => Ok(found),
            Some(found) => {
                let path = self.tree.path_of(found);
                let what = if self.tree.node(found).is_symlink() { "a link" } else { "no folder" };
                Err(bad(&format!("below {path}, which is {what}")))
            }
            None => {
                let attributes = Attributes { mode: 0o755, uid: 0, gid: 0, mtime };
                self.tree.add(at, part, self.layer.number, &attributes, Kind::Folder)
            }
        }
    }

    fn whiteout(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<()> {
        // That something is hidden in it does not make a folder one of this layer: a whiteout of the
        // folder itself, which may follow, hides it.
        let mut parents = parents.iter();
        let folder = parents.try_fold(ROOT, |at, part| self.below(at, part, Time::default()))?;
        if name == OPAQUE {
            self.tree.hide_lower(folder, self.layer.number);
            return Ok(());
        }
        if name.starts_with(MARK) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(bad("a whiteout of no name"));
        }
        let Some(node) = self.tree.lookup(folder, hidden) else { return Ok(()) };
        if self.tree.layer_of(folder, hidden).is_some_and(|layer| layer < self.layer.number) {
            self.tree.remove(folder, hidden);
        } else if self.tree.node(node).is_folder() {
            // This layer made it anew, over what it hides.
            self.tree.hide_lower(node, self.layer.number);
        }
        Ok(())
    }
}

/// The components of a name that stays inside.
fn parts(name: &[u8]) -> Result<Vec<&[u8]>> {
    if name.starts_with(b"/") {
        return Err(bad("an absolute name"));
    }
    let parts = name.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<&[u8]> = parts.collect();
    if parts.contains(&&b".."[..]) {
        return Err(bad("a name with .. in it"));
    }
    Ok(parts)
}

fn zeros(placing: &mut crate::stage::Placing<'_, '_>, mut count: u64) -> Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    while count > 0 {
        let now = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
        placing.write(&ZEROS[..now])?;
        count -= now as u64;
    }
    Ok(())
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::BadArchive, what)
}
