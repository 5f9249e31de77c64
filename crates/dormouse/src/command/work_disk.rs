//! `dormouse work-disk`: seeds with a home folder, and disks made of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use dormouse_ext4::error::ErrorKind;
use dormouse_ext4::input::{Limits, image};
use dormouse_ext4::layout::{Options, Size};
use dormouse_ext4::stage::Staged;
use dormouse_ext4::tree::owner::Ownership;
use dormouse_ext4::tree::{Attributes, ROOT, Tree};
use dormouse_store::progress::Progress;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::{MakeArgs, SeedArgs, Sizing, WorkDiskCommand};
use crate::command::ext4::build::epoch;
use crate::command::ext4::image::{NewImage, Target};
use crate::command::ext4::open::{Told, is_stored, open};
use crate::exit::Fault;
use crate::output::size::human;

const MIB: u64 = 1 << 20;

/// What a seed has free that is only as large as it has to be.
const SEED_SLACK_BYTES: u64 = 4 * MIB;

/// The roomy rule: the least, what is added to twice the used bytes, and the step.
const ROOMY_BYTES_MIN: u64 = 512 * MIB;
const ROOMY_BYTES_MORE: u64 = 256 * MIB;
const ROOMY_STEP_BYTES: u64 = 64 * MIB;

#[derive(Serialize)]
struct WorkDiskObject {
    image: String,
    entries: u64,
    size_bytes: u64,
    seconds: f64,
}

pub(super) fn run(app: &mut App, command: &WorkDiskCommand) -> Result<()> {
    match command {
        WorkDiskCommand::Seed(args) => seed(app, args),
        WorkDiskCommand::Make(args) => make(app, args),
    }
}

fn seed(app: &mut App, args: &SeedArgs) -> Result<()> {
    if args.path.is_empty() {
        return Err(Fault::usage("--path is empty; / is the whole image").into());
    }
    let output = match &args.output {
        Some(path) => path.clone(),
        None if is_stored(&args.root) => {
            return Err(Fault::usage("a snapshot's seed needs a place: --output").into());
        }
        None => seed_path(&args.root),
    };
    let root = Arc::new(open(app, &args.root)?);
    let size = |tree: &Tree| match args.sizing {
        Sizing::Need => Size::Slack(SEED_SLACK_BYTES),
        Sizing::Roomy => Size::Exactly(roomy(tree.content_bytes())),
    };
    disk(app, &output, size, |tree, told| {
        let read = image::read(tree, ROOT, &root, args.path.as_bytes(), &Limits::STANDARD, told);
        match read {
            // No home folder: a disk with none in it.
            Err(error) if error.kind() == ErrorKind::NotFound && tree.is_empty() => {}
            read => read?,
        }
        // The folder itself becomes the disk's root, which is root's.
        let attributes = Attributes { uid: 0, gid: 0, ..tree.attributes(ROOT) };
        tree.set_attributes(ROOT, &attributes);
        Ok(())
    })
}

fn make(app: &mut App, args: &MakeArgs) -> Result<()> {
    let seed = Arc::new(open(app, &args.seed)?);
    disk(
        app,
        &args.output,
        |_| Size::Exactly(args.size),
        |tree, told| {
            image::read(tree, ROOT, &seed, b"/", &Limits::STANDARD, told)?;
            if let Some(owner) = args.owner {
                Ownership::All(owner).apply(tree)?;
            }
            Ok(())
        },
    )
}

fn disk(
    app: &mut App,
    output: &Path,
    size: impl FnOnce(&Tree) -> Size,
    fill: impl FnOnce(&mut Tree, &Told<'_>) -> Result<()>,
) -> Result<()> {
    let begun = Instant::now();
    let work = app.work()?;
    work.begin("work disk", None);
    let target = Target::File(output);
    let file = NewImage::begin(app, &target)?;
    let mut tree = Tree::new();
    fill(&mut tree, &Told(&work))?;
    let options = Options { epoch: epoch()?, ..Options::new(size(&tree)) };
    let built = file.finish(tree, &options, &Staged::nothing(), &work)?;
    drop(work);
    let object = WorkDiskObject {
        image: output.display().to_string(),
        entries: built.report.entries,
        size_bytes: built.report.size_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    };
    if app.json {
        app.out.json(&object)?;
    } else {
        app.say(&format!(
            "wrote {} files to {}, {}, in {:.3} s",
            object.entries,
            object.image,
            human(object.size_bytes),
            object.seconds
        ));
    }
    Ok(())
}

/// `X.work-seed.ext4` beside `X.ext4`, else `X.work-seed`.
fn seed_path(root: &str) -> PathBuf {
    match root.strip_suffix(".ext4") {
        _ if root.is_empty() => PathBuf::new(),
        Some(stem) => format!("{stem}.work-seed.ext4").into(),
        None => format!("{root}.work-seed").into(),
    }
}

fn roomy(used_bytes: u64) -> u64 {
    (used_bytes * 2 + ROOMY_BYTES_MORE).max(ROOMY_BYTES_MIN).next_multiple_of(ROOMY_STEP_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_lies_beside_its_root() {
        for (root, expected) in
            [("a/root.ext4", "a/root.work-seed.ext4"), ("root", "root.work-seed"), ("", "")]
        {
            assert_eq!(seed_path(root), Path::new(expected));
        }
    }

    #[test]
    fn roomy_seeds_follow_the_rule() {
        for (used, expected) in [(0, 512), (127, 512), (128, 512), (129, 576), (1000, 2304)] {
            assert_eq!(roomy(used * MIB), expected * MIB, "{used}");
        }
    }
}
