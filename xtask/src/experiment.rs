//! `cargo xtask experiment ext4-diff-size`: what a pause of a guest on ext4 costs, by the guest's mount
//! options, by mkfs and by how the image was built. `docs/experiments/ext4-diff-size.md` is about it.
//!
//! ```text
//! target/experiment/ext4-diff-size/    work/: images, packages, the store of the run at hand; results of --quick
//! docs/experiments/ext4-diff-size.*    .json: all that was measured; .svg and the tables of .md: drawn from it
//! ```

mod image;
mod layout;
mod picture;
mod plan;
mod results;
mod run;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dormouse_testkit::guest::{Assets, cache_dir};

use self::image::Builder;
use self::plan::{Pace, Recipe, cells};
use self::results::Results;
use self::run::Runner;
use crate::command::{cargo, output_of, run as run_command, target_dir, workspace};
use crate::packages;

const NAME: &str = "ext4-diff-size";
const TABLES_BEGIN: &str = "<!-- tables: cargo xtask experiment ext4-diff-size -->";
const TABLES_END: &str = "<!-- end of tables -->";

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Measures all cells and writes page, picture and JSON under `docs/experiments`.
    Full,
    /// Measures two cells with short pauses, into `target`.
    Quick,
    /// Draws page and picture from the JSON again.
    Draw,
}

impl Mode {
    pub(crate) fn parse(arguments: &[&str]) -> Result<Mode> {
        match arguments {
            [NAME] => Ok(Mode::Full),
            [NAME, "--quick"] => Ok(Mode::Quick),
            [NAME, "--draw"] => Ok(Mode::Draw),
            _ => bail!("experiment takes {NAME}, and --quick or --draw after it"),
        }
    }
}

/// Measures or draws.
pub(crate) fn run(mode: Mode) -> Result<()> {
    let docs = workspace().join("docs/experiments");
    if mode == Mode::Draw {
        let text = fs::read_to_string(docs.join(NAME).with_extension("json"))
            .context("nothing was measured yet")?;
        let results: Results = serde_json::from_str(&text)?;
        fs::write(docs.join(NAME).with_extension("svg"), picture::draw(&results))?;
        return write_tables(&docs, &results);
    }
    let dir = target_dir().join("experiment").join(NAME);
    let work = dir.join("work");
    image::unmount_leftovers(&work)?;
    if dir.exists() {
        fs::remove_dir_all(&dir).context("cannot remove the last experiment's files")?;
    }
    fs::create_dir_all(&work)?;
    let results = measure(&work, mode == Mode::Quick)?;
    fs::remove_dir_all(&work)?;
    // The page is about whole runs.
    let kept = if mode == Mode::Quick { dir } else { docs };
    fs::write(kept.join(NAME).with_extension("json"), json(&results)?)?;
    fs::write(kept.join(NAME).with_extension("svg"), picture::draw(&results))?;
    if mode == Mode::Quick {
        println!("{}", results.markdown());
    } else {
        write_tables(&kept, &results)?;
    }
    println!("experiment: results are in {}", kept.display());
    Ok(())
}

fn measure(dir: &Path, is_quick: bool) -> Result<Results> {
    let begun = Instant::now();
    packages::install()?;
    // What is measured are bytes; they are the same in every profile.
    run_command(&mut cargo(&["build", "--quiet", "-p", "dormouse"]))?;
    let assets = Assets::prepare(&cache_dir(), &mut |line| println!("{line}"))?;
    let builder = Builder::new(dir, &assets)?;
    let cells = cells(is_quick);
    let pace = if is_quick { Pace::QUICK } else { Pace::FULL };
    let runner = Runner {
        dormouse: target_dir().join("debug/dormouse"),
        assets: &assets,
        clock: guest_clock()?,
        pace,
    };
    let (lazy_groups_own_file, lazy_groups_given_file) = builder.lazy_groups()?;
    let mut results = Results {
        qemu: version(Command::new("qemu-system-x86_64").arg("--version"))?,
        mke2fs: version(Command::new("sh").args(["-c", "/usr/sbin/mke2fs -V 2>&1"]))?,
        idle_seconds: pace.idle.as_secs(),
        heartbeats: pace.heartbeats,
        lazy_groups_own_file,
        lazy_groups_given_file,
        bases: Vec::new(),
        runs: Vec::new(),
    };
    let mut images = Vec::new();
    for recipe in Recipe::ALL {
        if cells.iter().any(|cell| cell.recipe == recipe) {
            println!("experiment: making the image {}", recipe.name());
            let image = builder.build(recipe)?;
            results.bases.push((recipe, runner.base(&image, &dir.join("run"))?));
            images.push((recipe, image));
        }
    }
    drop(builder);
    for (index, &cell) in cells.iter().enumerate() {
        println!(
            "experiment: run {} of {}, {} on the image {} ({:.0} s so far)",
            index + 1,
            cells.len(),
            cell.mount.title(),
            cell.recipe.name(),
            begun.elapsed().as_secs_f64(),
        );
        let (_, image) = images
            .iter()
            .find(|(recipe, _)| *recipe == cell.recipe)
            .context("an image that was not made")?;
        let mut progress = |line: &str| println!("    {line}");
        results.runs.push(runner.run(cell, image, &dir.join("run"), &mut progress)?);
    }
    println!("experiment: {:.0} s in all", begun.elapsed().as_secs_f64());
    Ok(results)
}

/// A month from now: relatime looks at the last read of a file only if it was more than a day ago, and
/// an image is older than its guests.
fn guest_clock() -> Result<String> {
    let text = output_of(Command::new("date").args(["-u", "-d", "30 days", "+%Y-%m-%dT00:00:00"]))?;
    Ok(text.trim().to_owned())
}

fn version(command: &mut Command) -> Result<String> {
    let text = output_of(command)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn json(results: &Results) -> Result<String> {
    Ok(serde_json::to_string_pretty(results)? + "\n")
}

/// Puts the tables into the page, between two comments.
fn write_tables(docs: &Path, results: &Results) -> Result<()> {
    let path = docs.join(NAME).with_extension("md");
    let page = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    fs::write(&path, with_tables(&page, results)?)?;
    Ok(())
}

fn with_tables(page: &str, results: &Results) -> Result<String> {
    let parts = page
        .split_once(TABLES_BEGIN)
        .and_then(|(head, rest)| Some((head, rest.split_once(TABLES_END)?.1)));
    let (head, tail) = parts.context("the page has no place for tables")?;
    Ok(format!("{head}{TABLES_BEGIN}\n\n{}\n{TABLES_END}{tail}", results.markdown()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page's tables and its picture are those of the JSON beside it.
    #[test]
    fn page_and_picture_are_drawn_from_the_json() {
        let file = |extension: &str| {
            let path = workspace().join("docs/experiments").join(NAME).with_extension(extension);
            fs::read_to_string(path).unwrap()
        };
        let results: Results = serde_json::from_str(&file("json")).unwrap();
        assert_eq!(json(&results).unwrap(), file("json"));
        assert_eq!(with_tables(&file("md"), &results).unwrap(), file("md"));
        assert_eq!(picture::draw(&results), file("svg"));
    }

    #[test]
    fn modes_are_parsed() {
        assert_eq!(Mode::parse(&[NAME, "--quick"]).unwrap(), Mode::Quick);
        assert_eq!(Mode::parse(&[NAME]).unwrap(), Mode::Full);
        for wrong in [&[][..], &["other"], &[NAME, "--slow"]] {
            assert!(Mode::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
