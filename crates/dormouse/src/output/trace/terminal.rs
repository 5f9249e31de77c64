//! A trace in a terminal: a character for each cell.

use std::fmt::Write;

use dormouse_image::block::BLOCK_BYTES_U64;

use super::Plot;
use crate::output::colour::Palette;
use crate::output::size::human;

/// Columns and rows of a plot for a terminal.
pub(crate) const COLUMNS: usize = 64;
/// See [`COLUMNS`].
pub(crate) const ROWS: usize = 24;

/// Rows from one address at the edge to the next.
const TICK_ROWS: usize = 4;

/// From few of a column's touches to nearly all of them.
const MARKS: [char; 4] = ['.', ':', '+', '#'];

/// The plot, under a line that says what it is.
pub(crate) fn draw(title: &str, what: &str, plot: &Plot, palette: Palette) -> String {
    let mut text = format!("{}  {what}\n\n", palette.bold(title));
    for row in 0..plot.rows {
        let address = match row % TICK_ROWS {
            0 => human(plot.first_block(row) * BLOCK_BYTES_U64),
            _ => String::new(),
        };
        let cells = (0..plot.columns).map(|column| mark(plot.cell(row, column)));
        let line = format!("{address:>11} {}", cells.collect::<String>());
        text.push_str(line.trim_end());
        text.push('\n');
    }
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{:>11} {:<32}{:>32}", "", "first touches", "last touches");
    text
}

fn mark((touches, of_column): (u64, u64)) -> char {
    if touches == 0 {
        return ' ';
    }
    let quarter = (touches * 4).div_ceil(of_column.max(1)).clamp(1, 4);
    MARKS[usize::try_from(quarter).unwrap_or(4) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_is_a_slope() {
        let order: Vec<_> = (0..16).map(|n| n * 16..n * 16 + 1).collect();
        let plot = Plot::new(4, 4, &order, 256);
        let drawing = draw("vm@1", "16 blocks", &plot, Palette::none());
        let lines: Vec<&str> = drawing.lines().collect();
        assert_eq!(lines[0], "vm@1  16 blocks");
        assert_eq!(lines[2], "        0 B #");
        assert_eq!(lines[5], "               #");
    }

    /// `DORMOUSE_DRAW_TERMINAL=FILE` keeps the drawing for looking.
    #[test]
    fn a_drawing_has_a_line_for_each_row() {
        let drawing = draw("vm@1", "a boot", &Plot::sample(), Palette::none());
        if let Some(path) = std::env::var_os("DORMOUSE_DRAW_TERMINAL") {
            std::fs::write(path, &drawing).unwrap();
        }
        assert_eq!(drawing.lines().count(), 2 + ROWS + 1);
    }
}
