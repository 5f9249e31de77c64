//! The picture: for each phase a bar for each of the guest's mount options, cut by what ext4 keeps in
//! the changed blocks. Stands alone: no font but the reader's, light or dark as the reader has it.

use std::fmt::Write;

use super::layout::Part;
use super::plan::{Cell, Mount, Phase, Recipe};
use super::results::{Results, count, kib};

const WIDTH: usize = 860;
const LEFT: usize = 190;
const BARS: usize = 380;
const TOP: usize = 112;
const ROW: usize = 17;
const BAR: usize = 12;
const GAP: usize = 30;
const MARGIN: usize = 20;

const STYLE: &str = "\
.paper{fill:#fff}.ink{fill:#1c2127}.faint{fill:#5c6670}\
.p0{fill:#2f6fb0}.p1{fill:#d9822b}.p2{fill:#8f6fb8}.p3{fill:#9aa4ae}\
@media(prefers-color-scheme:dark){.paper{fill:#14181d}.ink{fill:#e4e8ec}.faint{fill:#9aa4ae}\
.p0{fill:#5b9bdc}.p1{fill:#e79b4d}.p2{fill:#b195d6}.p3{fill:#67717b}}";

/// The picture of the first runs over the plain image.
pub(super) fn draw(results: &Results) -> String {
    let mounts: Vec<Mount> = Mount::ALL
        .into_iter()
        .filter(|&mount| results.first(cell(mount), Phase::Boot).is_some())
        .collect();
    let height = TOP + Phase::ALL.len() * (mounts.len() * ROW + GAP) + MARGIN;
    let mut svg = String::new();
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif\" font-size=\"12\" role=\"img\">\n\
         <title>What a pause of a guest on ext4 costs, by its mount options</title>\n\
         <style>{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"ink\" x=\"{MARGIN}\" y=\"34\" font-size=\"19\" font-weight=\"600\">\
         What a pause of a guest on ext4 costs, by its mount options</text>\n\
         <text class=\"faint\" x=\"{MARGIN}\" y=\"56\">Bars: 4 KiB blocks that differ from the pause before \
         and are not zero; each phase has a scale of its own. Right: KiB stored.</text>"
    );
    legend(&mut svg);
    let mut y = TOP;
    for phase in Phase::ALL {
        let _ = writeln!(
            svg,
            "<text class=\"ink\" x=\"{MARGIN}\" y=\"{}\" font-weight=\"600\">{}</text>",
            y + 4,
            phase.title()
        );
        y += 12;
        let most = mounts.iter().filter_map(|&mount| total(results, mount, phase)).max();
        for &mount in &mounts {
            bar(&mut svg, results, mount, phase, y, most.unwrap_or(0));
            y += ROW;
        }
        y += GAP - 12;
    }
    svg.push_str("</svg>\n");
    svg
}

fn cell(mount: Mount) -> Cell {
    Cell { mount, recipe: Recipe::PLAIN }
}

fn total(results: &Results, mount: Mount, phase: Phase) -> Option<u64> {
    results.first(cell(mount), phase).map(|measure| measure.filled_blocks().iter().sum())
}

fn legend(svg: &mut String) {
    for (index, (part, x)) in Part::ALL.into_iter().zip([LEFT, 315, 415, 652]).enumerate() {
        let _ = writeln!(
            svg,
            "<rect class=\"p{index}\" x=\"{x}\" y=\"74\" width=\"11\" height=\"11\" rx=\"2\"/>\
             <text class=\"ink\" x=\"{}\" y=\"84\">{}</text>",
            x + 16,
            part.title()
        );
    }
}

fn bar(svg: &mut String, results: &Results, mount: Mount, phase: Phase, y: usize, most: u64) {
    let Some(measure) = results.first(cell(mount), phase) else { return };
    let text_y = y + BAR - 2;
    let _ = write!(
        svg,
        "<text class=\"faint\" x=\"{}\" y=\"{text_y}\" text-anchor=\"end\">{}</text>",
        LEFT - 10,
        mount.title()
    );
    let blocks = measure.filled_blocks();
    let mut x = LEFT as f64;
    for (index, part) in Part::ALL.into_iter().enumerate() {
        let width = blocks[index] as f64 * BARS as f64 / most.max(1) as f64;
        if blocks[index] > 0 {
            let _ = write!(
                svg,
                "<rect class=\"p{index}\" x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\">\
                 <title>{}: {} blocks</title></rect>",
                part.title(),
                blocks[index]
            );
        }
        x += width;
    }
    let changed: u64 = blocks.iter().sum();
    let freed = match measure.freed_blocks {
        0 => String::new(),
        freed => format!(" · {} freed", count(freed)),
    };
    let _ = writeln!(
        svg,
        "<text class=\"ink\" x=\"{}\" y=\"{text_y}\">{} KiB <tspan class=\"faint\">· {} blocks{freed}</tspan></text>",
        LEFT + BARS + 14,
        kib(measure.stored_bytes),
        count(changed)
    );
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn bars_are_to_scale_and_nothing_comes_from_elsewhere() {
        let svg = draw(&sample());
        // Boot: one block of files, two, one and one of the others.
        assert!(svg.contains("x=\"190.0\" y=\"124\" width=\"76.0\""), "{svg}");
        assert!(svg.contains("x=\"266.0\" y=\"124\" width=\"152.0\""), "{svg}");
        assert_eq!(svg.matches("default (relatime)").count(), Phase::ALL.len());
        assert!(svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("http").count(), 1, "only the name of the format");
    }
}
