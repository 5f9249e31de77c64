//! The map of an image in a terminal: two rows of cells in a line of half blocks, or letters
//! where there are no colours.

use std::fmt::Write;

use crate::output::colour::{Palette, Rgb};
use crate::output::map::cells::{COLUMNS, Cells, Origin, dominant};
use crate::output::map::{look, strength};
use crate::output::size::{human, percent};

/// What faint cells fade to: the black of most terminals, a little lighter.
const BACKGROUND: Rgb = Rgb(0x24, 0x26, 0x2a);

/// The map, with a legend.
pub(crate) fn draw(title: &str, cells: &Cells, palette: Palette) -> String {
    let mut text = format!(
        "{}  {}, {} a cell\n\n",
        palette.bold(title),
        human(cells.size_bytes()),
        human(cells.cell_bytes())
    );
    if palette.is_coloured() {
        half_blocks(&mut text, cells, palette);
    } else {
        letters(&mut text, cells);
    }
    text.push('\n');
    legend(&mut text, cells, palette);
    text
}

fn address(cells: &Cells, row: usize) -> String {
    human((row * COLUMNS) as u64 * cells.cell_bytes())
}

fn half_blocks(text: &mut String, cells: &Cells, palette: Palette) {
    let rows: Vec<_> = cells.rows().collect();
    for (line, pair) in rows.chunks(2).enumerate() {
        // Writing to a string cannot fail, here and below.
        let _ = write!(text, "{:>11} ", address(cells, line * 2));
        for (column, top) in pair[0].iter().enumerate() {
            let below = pair.get(1).and_then(|row| row.get(column));
            let bottom = below.map(|cell| colour(cell, cells));
            text.push_str(&palette.paint("▀", colour(top, cells), bottom));
        }
        text.push('\n');
    }
}

fn colour(cell: &[u64; Origin::COUNT], cells: &Cells) -> Rgb {
    match dominant(cell) {
        None => BACKGROUND,
        Some((origin, bytes)) => {
            let (full, _) = look(origin);
            BACKGROUND.towards(full, strength(bytes, cells.cell_bytes()))
        }
    }
}

/// `.` is zero; `o`, `a` and `d` are its own, an ancestor's and a disk's, large from a half on.
fn letters(text: &mut String, cells: &Cells) {
    for (number, row) in cells.rows().enumerate() {
        let _ = write!(text, "{:>11} ", address(cells, number));
        text.extend(row.iter().map(|cell| match dominant(cell) {
            None => letter(Origin::Zero),
            Some((origin, bytes)) if bytes * 2 >= cells.cell_bytes() => {
                letter(origin).to_ascii_uppercase()
            }
            Some((origin, _)) => letter(origin),
        }));
        text.push('\n');
    }
}

fn letter(origin: Origin) -> char {
    match origin {
        Origin::Zero => '.',
        Origin::Own => 'o',
        Origin::Ancestor => 'a',
        Origin::Disk => 'd',
    }
}

fn legend(text: &mut String, cells: &Cells, palette: Palette) {
    let totals = cells.totals();
    for origin in Origin::ALL {
        let (full, words) = look(origin);
        let mark = if palette.is_coloured() {
            palette.paint("██", if origin == Origin::Zero { BACKGROUND } else { full }, None)
        } else {
            format!("{} ", letter(origin))
        };
        let bytes = totals[origin as usize];
        let share = percent(bytes, cells.size_bytes());
        let _ = writeln!(text, "{:>12}{mark} {words:<17} {:>11} {share:>8}", "", human(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_colours_cells_are_letters() {
        let mut cells = Cells::new(66 * 4096);
        cells.add(0..4096, Origin::Own);
        cells.add(4096..8192, Origin::Disk);
        cells.add(8192..8200, Origin::Ancestor);
        cells.add(8200..66 * 4096, Origin::Zero);
        let mut text = String::new();
        letters(&mut text, &cells);
        assert_eq!(text, format!("        0 B ODa{}\n  256.0 KiB ..\n", ".".repeat(61)));
    }

    /// `DORMOUSE_DRAW_TERMINAL=FILE` keeps the drawing for looking: `cat FILE`.
    #[test]
    fn with_colours_a_line_has_two_rows() {
        let drawing = draw("vm@3:memory", &Cells::sample(), Palette::full());
        if let Some(path) = std::env::var_os("DORMOUSE_DRAW_TERMINAL") {
            std::fs::write(path, &drawing).unwrap();
        }
        assert_eq!(drawing.matches('▀').count(), 4096 / 2);
        assert_eq!(drawing.lines().count(), 2 + 32 + 1 + 4);
    }
}
