//! A trace as a picture: cells with tooltips over an address axis. Stands alone, as the map does.

use std::fmt::Write;

use dormouse_image::block::BLOCK_BYTES_U64;

use super::Plot;
use crate::output::colour::Rgb;
use crate::output::map::{PAPER, strength};
use crate::output::size::human;

/// Columns and rows of a plot for a picture.
pub(crate) const COLUMNS: usize = 160;
/// See [`COLUMNS`].
pub(crate) const ROWS: usize = 96;

/// The side of a cell; there is nothing between them.
const SIDE: usize = 5;

/// Room for the axis on the left, for the head above, and at the other edges.
const LEFT: usize = 92;
const TOP: usize = 86;
const MARGIN: usize = 36;

/// Rows from tick to tick of the axis.
const TICK_ROWS: usize = 12;

/// Blue of the Okabe-Ito palette, as in the map.
const TOUCHED: Rgb = Rgb(0x00, 0x72, 0xb2);

/// The picture.
pub(crate) fn draw(title: &str, what: &str, plot: &Plot) -> String {
    let (plot_width, plot_height) = (plot.columns * SIDE, plot.rows * SIDE);
    let (width, height) = (LEFT + plot_width + MARGIN, TOP + plot_height + MARGIN);
    let mut svg = String::new();
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif\" role=\"img\">\n\
         <title>{title}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"42\" font-size=\"21\" font-weight=\"600\" fill=\"#1c2127\">{title}</text>\n\
         <text x=\"{LEFT}\" y=\"64\" font-size=\"12.5\" fill=\"#5c6670\">{what}</text>\n\
         <rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{plot_width}\" height=\"{plot_height}\" fill=\"{}\"/>\n",
        PAPER.hex(),
    );
    axes(&mut svg, plot);
    for row in 0..plot.rows {
        for column in 0..plot.columns {
            cell(&mut svg, plot, row, column);
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn axes(svg: &mut String, plot: &Plot) {
    for row in (0..plot.rows).step_by(TICK_ROWS) {
        let y = TOP + row * SIDE;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" font-size=\"10.5\" fill=\"#5c6670\" text-anchor=\"end\">{}</text>\
             <path d=\"M{} {y}.5h6\" stroke=\"#9aa4ae\"/>",
            LEFT - 14,
            y + 4,
            human(plot.first_block(row) * BLOCK_BYTES_U64),
            LEFT - 10,
        );
    }
    let y = TOP + plot.rows * SIDE + 18;
    let ends = [("start", 0, "first touches"), ("end", plot.columns * SIDE, "last touches")];
    for (anchor, x, words) in ends {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{y}\" font-size=\"10.5\" fill=\"#5c6670\" \
             text-anchor=\"{anchor}\">{words}</text>",
            LEFT + x
        );
    }
}

fn cell(svg: &mut String, plot: &Plot, row: usize, column: usize) {
    let (touches, of_column) = plot.cell(row, column);
    if touches == 0 {
        return;
    }
    let (x, y) = (LEFT + column * SIDE, TOP + row * SIDE);
    let address = plot.first_block(row) * BLOCK_BYTES_U64;
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"{}\">\
         <title>from {address:#x}, from touch {}: {touches} blocks</title></rect>",
        PAPER.towards(TOUCHED, strength(touches, of_column)).hex(),
        plot.first_touch(column),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `DORMOUSE_DRAW=FILE` keeps the picture for looking.
    #[test]
    fn a_picture_has_a_mark_for_every_cell_that_was_touched() {
        let plot = Plot::sample();
        let picture = draw("vm@3", "a boot", &plot);
        if let Some(path) = std::env::var_os("DORMOUSE_DRAW") {
            std::fs::write(path, &picture).unwrap();
        }
        let touched = plot.cells.iter().filter(|&&cell| cell > 0).count();
        assert_eq!(picture.matches(" blocks</title>").count(), touched);
        assert!(picture.ends_with("</svg>\n"));
    }
}
