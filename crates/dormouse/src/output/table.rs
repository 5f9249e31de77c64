//! Tables without lines: columns a terminal's user reads and `awk` splits.
//!
//! Set by hand: `ls` of 10,000 snapshots has 100 ms for everything, and the crates that draw
//! tables took half of it for this alone.

use crate::output::colour::Palette;

/// Spaces between two columns.
const GAP: usize = 2;

/// How a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Text, from the left.
    Text(&'static str),

    /// Numbers, to the right.
    Number(&'static str),
}

impl Column {
    fn title(self) -> &'static str {
        let (Column::Text(title) | Column::Number(title)) = self;
        title
    }
}

/// A table being filled.
#[derive(Debug)]
pub(crate) struct Table {
    palette: Palette,
    columns: Vec<Column>,
    widths: Vec<usize>,
    /// Row by row, as many as there are columns.
    cells: Vec<String>,
}

impl Table {
    /// A table with a header and no rows.
    pub(crate) fn new(palette: Palette, columns: &[Column]) -> Table {
        Table {
            palette,
            columns: columns.to_vec(),
            widths: columns.iter().map(|column| column.title().len()).collect(),
            cells: Vec::new(),
        }
    }

    /// Adds a row with as many cells as there are columns.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len(), "a cell for every column");
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
        self.cells.extend(cells);
    }

    /// The lines, each with its end; only a header's if there are no rows.
    pub(crate) fn render(&self) -> String {
        let titles: Vec<&str> = self.columns.iter().map(|column| column.title()).collect();
        let mut header = String::new();
        self.line(&mut header, titles.into_iter());
        let mut text = format!("{}\n", self.palette.bold(header.trim_end()));
        for row in self.cells.chunks(self.columns.len()) {
            self.line(&mut text, row.iter().map(String::as_str));
        }
        text
    }

    fn line<'a>(&self, text: &mut String, cells: impl Iterator<Item = &'a str>) {
        for ((cell, column), width) in cells.zip(&self.columns).zip(&self.widths) {
            let pad = width - cell.chars().count();
            let (before, after) = match column {
                Column::Text(_) => (0, pad),
                Column::Number(_) => (pad, 0),
            };
            text.extend(std::iter::repeat_n(' ', before));
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', after + GAP));
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let columns = [Column::Text("NAME"), Column::Number("SIZE"), Column::Text("LABELS")];
        let mut table = Table::new(Palette::none(), &columns);
        assert_eq!(table.render(), "NAME  SIZE  LABELS\n");
        table.row(["ä".to_owned(), "100 B".to_owned(), String::new()]);
        table.row(["longer".to_owned(), "1 B".to_owned(), "x=\"y\"".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME     SIZE  LABELS\nä       100 B\nlonger    1 B  x=\"y\"\n"
        );
    }

    #[test]
    fn only_the_header_is_bold() {
        let mut table = Table::new(Palette::full(), &[Column::Text("NAME")]);
        table.row(["vm".to_owned()]);
        assert_eq!(table.render(), "\x1b[1mNAME\x1b[0m\nvm\n");
    }
}
