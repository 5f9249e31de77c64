//! The map of an image as a picture: cells with tooltips, an address axis, bars of the totals and
//! a legend. Stands alone: no script, no style sheet, no font but the reader's.

use std::fmt::Write;

use crate::output::map::cells::{COLUMNS, Cells, Origin, dominant};
use crate::output::map::{PAPER, look, strength};
use crate::output::size::{human, percent};

/// Distance from cell to cell, and the side of a cell.
const PITCH: usize = 12;
const SIDE: usize = 11;

/// Room for the axis on the left, for the head above, and at the other edges.
const LEFT: usize = 92;
const TOP: usize = 156;
const MARGIN: usize = 28;

/// Rows from tick to tick of the axis.
const TICK_ROWS: usize = 8;

const BAR_HEIGHT: usize = 14;

/// The picture.
pub(crate) fn draw(title: &str, cells: &Cells) -> String {
    let rows = cells.rows().len().max(1);
    let width = LEFT + COLUMNS * PITCH + MARGIN;
    let height = TOP + rows * PITCH + MARGIN;
    let mut svg = String::new();
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif\" role=\"img\">\n\
         <title>{title}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n",
        title = escape(title),
    );
    head(&mut svg, title, cells);
    totals(&mut svg, cells);
    axis(&mut svg, cells, rows);
    for (row, content) in cells.rows().enumerate() {
        for (column, cell) in content.iter().enumerate() {
            square(&mut svg, cells, row, column, cell);
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn head(svg: &mut String, title: &str, cells: &Cells) {
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"42\" font-size=\"21\" font-weight=\"600\" fill=\"#1c2127\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"64\" font-size=\"12.5\" fill=\"#5c6670\">{} · a cell is {}, a row {} · \
         the stronger the colour, the more of the cell it fills</text>",
        escape(title),
        human(cells.size_bytes()),
        human(cells.cell_bytes()),
        human(cells.cell_bytes() * COLUMNS as u64),
    );
}

/// One bar of all bytes, cut by origin, over a legend with as many columns.
fn totals(svg: &mut String, cells: &Cells) {
    let totals = cells.totals();
    let whole = COLUMNS * PITCH - (PITCH - SIDE);
    let mut x = 0.0;
    for origin in Origin::ALL {
        let (colour, words) = look(origin);
        let bytes = totals[origin as usize];
        let width = share(bytes, cells.size_bytes()) * whole as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"80\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{}\">\
             <title>{words}: {}, {}</title></rect>",
            LEFT as f64 + x,
            colour.hex(),
            human(bytes),
            percent(bytes, cells.size_bytes()),
        );
        x += width;
    }
    for (index, origin) in Origin::ALL.into_iter().enumerate() {
        let (colour, words) = look(origin);
        let bytes = totals[origin as usize];
        let left = LEFT + index * whole / Origin::COUNT;
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"108\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{}\" \
             stroke=\"#c3cad1\" stroke-width=\"{}\"/>\
             <text x=\"{}\" y=\"118.5\" font-size=\"12.5\" fill=\"#1c2127\">{words}</text>\
             <text x=\"{}\" y=\"134\" font-size=\"11.5\" fill=\"#5c6670\">{} · {}</text>",
            colour.hex(),
            if origin == Origin::Zero { 1 } else { 0 },
            left + 18,
            left + 18,
            human(bytes),
            percent(bytes, cells.size_bytes()),
        );
    }
}

fn axis(svg: &mut String, cells: &Cells, rows: usize) {
    for row in (0..rows).step_by(TICK_ROWS) {
        let y = TOP + row * PITCH;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" font-size=\"10.5\" fill=\"#5c6670\" text-anchor=\"end\">{}</text>\
             <path d=\"M{} {}.5h6\" stroke=\"#9aa4ae\"/>",
            LEFT - 14,
            y + SIDE / 2 + 4,
            mebibytes((row * COLUMNS) as u64 * cells.cell_bytes()),
            LEFT - 10,
            y + SIDE / 2,
        );
    }
}

fn square(svg: &mut String, cells: &Cells, row: usize, column: usize, cell: &[u64; Origin::COUNT]) {
    let (x, y) = (LEFT + column * PITCH, TOP + row * PITCH);
    let address = (row * COLUMNS + column) as u64 * cells.cell_bytes();
    let fill = match dominant(cell) {
        None => PAPER,
        Some((origin, bytes)) => PAPER.towards(look(origin).0, strength(bytes, cells.cell_bytes())),
    };
    let held: u64 = cell.iter().sum();
    let mut tip = format!("{address:#x} ({})", mebibytes(address));
    for origin in Origin::ALL {
        let bytes = cell[origin as usize];
        if bytes > 0 {
            let _ = write!(tip, "\n{}: {}", look(origin).1, percent(bytes, held));
        }
    }
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" rx=\"1.5\" fill=\"{}\">\
         <title>{tip}</title></rect>",
        fill.hex()
    );
}

/// An address for the axis: whole mebibytes where it is that round.
fn mebibytes(address: u64) -> String {
    if address.is_multiple_of(1 << 20) {
        format!("{} MiB", address >> 20)
    } else {
        format!("{:.3} MiB", address as f64 / f64::from(1 << 20))
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `DORMOUSE_DRAW=FILE` keeps the picture for looking.
    #[test]
    fn a_picture_has_a_cell_for_every_part_of_the_image() {
        let picture = draw("vm@3:memory <&>", &Cells::sample());
        if let Some(path) = std::env::var_os("DORMOUSE_DRAW") {
            std::fs::write(path, &picture).unwrap();
        }
        assert_eq!(picture.matches("rx=\"1.5\"").count(), 4096);
        assert!(picture.contains("vm@3:memory &lt;&amp;&gt;"));
        assert!(picture.contains(">256 MiB<"));
        assert!(draw("empty", &Cells::new(0)).ends_with("</svg>\n"));
    }
}
