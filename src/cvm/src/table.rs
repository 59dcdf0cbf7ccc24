//! A table that fits: columns that do not find room move below their row, with their title,
//! and columns that say nothing in any row are left out.
//!
//! Refuses to cut text off; what is too long is wrapped. May import: `look`, `words`.

use crate::look::{Look, Tone};
use crate::words::{clean, width, wrap};

/// Between two columns.
const GAP: usize = 2;
/// Lines below a row begin here.
const INDENT: usize = 4;
/// Less room than this beside a label is none.
const TEXT_MIN: usize = 8;

pub(crate) struct Column {
    pub title: &'static str,
    pub right: bool,
    /// The lowest moves below first; [`STAYS`] never does.
    pub keep: u8,
}

pub(crate) const STAYS: u8 = u8::MAX;
/// A cell that says nothing, and is not worth a line below.
pub(crate) const NONE: &str = "-";

pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: &str, tone: Tone) -> Self {
        Self { text: clean(text), tone }
    }

    pub(crate) fn plain(text: &str) -> Self {
        Self::new(text, if text == NONE { Tone::Quiet } else { Tone::Plain })
    }
}

#[derive(Default)]
pub(crate) struct Row {
    pub cells: Vec<Cell>,
    /// Label, text: lines of their own.
    pub below: Vec<(&'static str, String, Tone)>,
}

pub(crate) fn render(columns: &[Column], rows: &[Row], look: Look) -> String {
    let widths: Vec<usize> = (0..columns.len()).map(|i| natural(columns, rows, i)).collect();
    let says = |i: usize| rows.iter().any(|row| row.cells.get(i).is_some_and(|cell| cell.text != NONE));
    let said = (0..columns.len()).filter(|&i| columns[i].keep == STAYS || says(i)).collect();
    let shown = fitting(columns, &widths, said, look.width);
    let mut text =
        line(shown.iter().map(|&i| (columns[i].title, Tone::Strong, widths[i], columns[i].right)), look);
    for row in rows {
        let cells = shown.iter().filter_map(|&i| Some((row.cells.get(i)?, i)));
        text +=
            &line(cells.map(|(cell, i)| (cell.text.as_str(), cell.tone, widths[i], columns[i].right)), look);
        for (i, cell) in row.cells.iter().enumerate() {
            if !shown.contains(&i) && cell.text != NONE {
                text += &labelled(&columns[i].title.to_lowercase(), &cell.text, cell.tone, INDENT, look);
            }
        }
        for (label, words, tone) in &row.below {
            text += &labelled(label, words, *tone, INDENT, look);
        }
    }
    text
}

fn natural(columns: &[Column], rows: &[Row], index: usize) -> usize {
    let cells = rows.iter().filter_map(|row| row.cells.get(index)).map(|cell| width(&cell.text));
    cells.chain([width(columns[index].title)]).max().unwrap_or(0)
}

/// Those of the columns `shown` that stay in their line.
fn fitting(columns: &[Column], widths: &[usize], mut shown: Vec<usize>, room: usize) -> Vec<usize> {
    loop {
        let total: usize = shown.iter().map(|&i| widths[i] + GAP).sum();
        if total.saturating_sub(GAP) <= room {
            return shown;
        }
        let Some(&victim) =
            shown.iter().filter(|&&i| columns[i].keep != STAYS).min_by_key(|&&i| columns[i].keep)
        else {
            return shown;
        };
        shown.retain(|&i| i != victim);
    }
}

fn line<'a>(cells: impl Iterator<Item = (&'a str, Tone, usize, bool)>, look: Look) -> String {
    let mut text = String::new();
    // Blanks are held back until something follows them: no line ends with any.
    let mut blanks = 0;
    for (words, tone, room, right) in cells {
        let pad = room.saturating_sub(width(words));
        text.push_str(&" ".repeat(blanks + if right { pad } else { 0 }));
        text.push_str(&look.paint(words, tone));
        blanks = GAP + if right { 0 } else { pad };
    }
    text.push('\n');
    text
}

/// `    label: text`, wrapped under the beginning of the text.
pub(crate) fn labelled(label: &str, text: &str, tone: Tone, indent: usize, look: Look) -> String {
    let head = format!("{}{label}: ", " ".repeat(indent));
    if width(&head) + TEXT_MIN > look.width {
        return below(label, text, tone, indent, look);
    }
    // On a very narrow terminal a hanging indent would leave no room for the text.
    let hang = width(&head).min(look.width / 3);
    let shown = hanging(&head, text, hang, tone, look);
    format!("{}{}", look.paint(&head, Tone::Quiet), shown)
}

/// For a label that takes the whole line: it is wrapped itself, and the text begins below it.
fn below(label: &str, text: &str, tone: Tone, indent: usize, look: Look) -> String {
    let hang = (indent + GAP).min(look.width / 3);
    let mut block = String::new();
    for (words, blanks, tone) in [(format!("{label}:"), indent, Tone::Quiet), (clean(text), hang, tone)] {
        for line in wrap(&words, look.width.saturating_sub(blanks)) {
            block.extend([&*" ".repeat(blanks), &look.paint(&line, tone), "\n"]);
        }
    }
    block
}

/// What follows `head` in its line, and the lines below it, `hang` characters in.
pub(crate) fn hanging(head: &str, text: &str, hang: usize, tone: Tone, look: Look) -> String {
    let text = clean(text);
    let mut lines = wrap(&text, look.width.saturating_sub(width(head)).max(1));
    let rest = lines.split_off(1).join(" ");
    if !rest.is_empty() {
        lines.extend(wrap(&rest, look.width.saturating_sub(hang)));
    }
    let painted: Vec<String> = lines.iter().map(|line| look.paint(line, tone)).collect();
    painted.join(&format!("\n{}", " ".repeat(hang))) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column { title: "NAME", right: false, keep: STAYS },
        Column { title: "SIZE", right: true, keep: 2 },
        Column { title: "STORY", right: false, keep: 1 },
    ];

    fn rows() -> Vec<Row> {
        let row = |cells: [&str; 3], below| Row { cells: cells.map(Cell::plain).into(), below };
        vec![
            row(
                ["größe", "12", "the long story of a thing"],
                vec![("why", "because".to_owned(), Tone::Plain)],
            ),
            row(["b", "3", "-"], vec![]),
        ]
    }

    #[test]
    fn columns_line_up_by_characters_and_no_line_ends_with_blanks() {
        let expected = "\
NAME   SIZE  STORY
größe    12  the long story of a thing
    why: because
b         3  -
";
        assert_eq!(render(&COLUMNS, &rows(), Look::plain(80)), expected);
    }

    #[test]
    fn what_finds_no_room_moves_below_with_its_title() {
        let expected = "\
NAME   SIZE
größe    12
    story: the long
       story of a
       thing
    why: because
b         3
";
        assert_eq!(render(&COLUMNS, &rows(), Look::plain(21)), expected);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 12..100 {
            let text = render(&COLUMNS, &rows(), Look::plain(width));
            assert!(text.lines().all(|l| super::width(l) <= width), "{width}:\n{text}");
        }
    }
}
