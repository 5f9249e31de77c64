//! Colours, where there is a terminal that wants them.

use std::io::{IsTerminal, stderr, stdout};

/// How many colours a stream shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    None,
    Palette256,
    True,
}

/// A colour as red, green and blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rgb(pub(crate) u8, pub(crate) u8, pub(crate) u8);

impl Rgb {
    /// The colour `part` thousandths of the way to `other`.
    pub(crate) fn towards(self, other: Rgb, part: u32) -> Rgb {
        let mix = |from: u8, to: u8| {
            let part = part.min(1000);
            let sum = u32::from(from) * (1000 - part) + u32::from(to) * part;
            u8::try_from((sum + 500) / 1000).unwrap_or(u8::MAX)
        };
        Rgb(mix(self.0, other.0), mix(self.1, other.1), mix(self.2, other.2))
    }

    /// `#rrggbb`.
    pub(crate) fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }

    /// The nearest colour of the 6 × 6 × 6 cube that terminals have from 16 on.
    fn index_256(self) -> u32 {
        const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
        let nearest = |value: u8| {
            (0..6u32).zip(STEPS).min_by_key(|(_, step)| step.abs_diff(value)).map_or(0, |(i, _)| i)
        };
        16 + 36 * nearest(self.0) + 6 * nearest(self.1) + nearest(self.2)
    }
}

/// The colours of a stream: none unless it is a terminal, `TERM` is not `dumb` and `NO_COLOR` is
/// not set (<https://no-color.org>).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Palette {
    depth: Depth,
}

impl Palette {
    /// Those of standard output.
    pub(crate) fn of_stdout() -> Palette {
        Palette::of(stdout().is_terminal())
    }

    /// Those of standard error.
    pub(crate) fn of_stderr() -> Palette {
        Palette::of(stderr().is_terminal())
    }

    fn of(is_terminal: bool) -> Palette {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let unwanted = !variable("NO_COLOR").is_empty() || variable("TERM") == "dumb";
        let depth = if !is_terminal || unwanted {
            Depth::None
        } else if ["truecolor", "24bit"].contains(&variable("COLORTERM").as_str()) {
            Depth::True
        } else {
            Depth::Palette256
        };
        Palette { depth }
    }

    /// All colours, whatever standard output is.
    #[cfg(test)]
    pub(crate) fn full() -> Palette {
        Palette { depth: Depth::True }
    }

    /// No colours, whatever standard output is.
    #[cfg(test)]
    pub(crate) fn none() -> Palette {
        Palette { depth: Depth::None }
    }

    /// Whether there are colours at all.
    pub(crate) fn is_coloured(self) -> bool {
        self.depth != Depth::None
    }

    /// `text` in bold.
    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// `text` stepping back.
    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// `text` on a background, in a colour.
    pub(crate) fn paint(self, text: &str, front: Rgb, back: Option<Rgb>) -> String {
        let mut codes = self.code("38", front);
        if let Some(back) = back {
            codes = format!("{codes};{}", self.code("48", back));
        }
        self.wrap(&codes, text)
    }

    fn code(self, plane: &str, colour: Rgb) -> String {
        match self.depth {
            Depth::True => format!("{plane};2;{};{};{}", colour.0, colour.1, colour.2),
            _ => format!("{plane};5;{}", colour.index_256()),
        }
    }

    fn wrap(self, codes: &str, text: &str) -> String {
        if self.is_coloured() { format!("\x1b[{codes}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_blend_and_round() {
        let (black, white) = (Rgb(0, 0, 0), Rgb(255, 255, 255));
        assert_eq!(black.towards(white, 0), black);
        assert_eq!(black.towards(white, 5000), white);
        assert_eq!(black.towards(white, 500).hex(), "#808080");
        assert_eq!(black.index_256(), 16);
        assert_eq!(white.index_256(), 231);
    }

    #[test]
    fn without_colours_text_stays_as_it_is() {
        assert_eq!(Palette::none().paint("x", Rgb(1, 2, 3), None), "x");
        assert_eq!(Palette::full().paint("x", Rgb(1, 2, 3), None), "\x1b[38;2;1;2;3mx\x1b[0m");
    }
}
