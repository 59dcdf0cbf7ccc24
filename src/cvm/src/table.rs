//! A table that fits its terminal: columns for which the width is too small move below their row, with
//! their title, and columns that are empty in every row are left out. No text is cut off: long text is
//! wrapped.

use crate::style::{Style, Tone};
use crate::text::{clean, width, wrap};

/// Columns of blanks between two cells.
const GAP: usize = 2;
/// Columns of blanks before the lines below a row.
const INDENT: usize = 4;
/// A text begins on the next line if fewer columns are left beside its label.
const TEXT_MIN: usize = 8;

pub(crate) struct Column {
    pub title: &'static str,
    pub right: bool,
    /// The column with the lowest number moves below first; [`STAYS`] never moves.
    pub keep: u8,
}

pub(crate) const STAYS: u8 = u8::MAX;
/// The text of an empty cell, which gets no line below.
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
    /// Label, text and tone of the lines below.
    pub below: Vec<(&'static str, String, Tone)>,
}

pub(crate) fn render(columns: &[Column], rows: &[Row], style: Style) -> String {
    let widths: Vec<usize> = (0..columns.len()).map(|i| natural(columns, rows, i)).collect();
    let is_filled = |i: usize| rows.iter().any(|row| row.cells.get(i).is_some_and(|cell| cell.text != NONE));
    let filled = (0..columns.len()).filter(|&i| columns[i].keep == STAYS || is_filled(i)).collect();
    let shown = fitting(columns, &widths, filled, style.width);
    let mut text =
        line(shown.iter().map(|&i| (columns[i].title, Tone::Strong, widths[i], columns[i].right)), style);
    for row in rows {
        let cells = shown.iter().filter_map(|&i| Some((row.cells.get(i)?, i)));
        text +=
            &line(cells.map(|(cell, i)| (cell.text.as_str(), cell.tone, widths[i], columns[i].right)), style);
        for (i, cell) in row.cells.iter().enumerate() {
            if !shown.contains(&i) && cell.text != NONE {
                text += &labelled(&columns[i].title.to_lowercase(), &cell.text, cell.tone, INDENT, style);
            }
        }
        for (label, below, tone) in &row.below {
            text += &labelled(label, below, *tone, INDENT, style);
        }
    }
    text
}

fn natural(columns: &[Column], rows: &[Row], index: usize) -> usize {
    let cells = rows.iter().filter_map(|row| row.cells.get(index)).map(|cell| width(&cell.text));
    cells.chain([width(columns[index].title)]).max().unwrap_or(0)
}

/// The columns of `shown` that stay in a line of `total_max` columns.
fn fitting(columns: &[Column], widths: &[usize], mut shown: Vec<usize>, total_max: usize) -> Vec<usize> {
    loop {
        let total: usize = shown.iter().map(|&i| widths[i] + GAP).sum();
        if total.saturating_sub(GAP) <= total_max {
            return shown;
        }
        let Some(&lowest) =
            shown.iter().filter(|&&i| columns[i].keep != STAYS).min_by_key(|&&i| columns[i].keep)
        else {
            return shown;
        };
        shown.retain(|&i| i != lowest);
    }
}

fn line<'a>(cells: impl Iterator<Item = (&'a str, Tone, usize, bool)>, style: Style) -> String {
    let mut text = String::new();
    // Blanks are held back until a text follows, so that no line ends with blanks.
    let mut blanks = 0;
    for (cell, tone, column_width, right) in cells {
        let pad = column_width.saturating_sub(width(cell));
        text.push_str(&" ".repeat(blanks + if right { pad } else { 0 }));
        text.push_str(&style.paint(cell, tone));
        blanks = GAP + if right { 0 } else { pad };
    }
    text.push('\n');
    text
}

/// `    label: text`, with the following lines under the beginning of the text.
pub(crate) fn labelled(label: &str, text: &str, tone: Tone, indent: usize, style: Style) -> String {
    let head = format!("{}{label}: ", " ".repeat(indent));
    if width(&head) + TEXT_MIN > style.width {
        return below(label, text, tone, indent, style);
    }
    // On a very narrow terminal a full indent would leave no columns for the text.
    let hang = width(&head).min(style.width / 3);
    let shown = hanging(&head, text, hang, tone, style);
    format!("{}{}", style.paint(&head, Tone::Quiet), shown)
}

/// A label that takes the whole line is wrapped itself, and the text begins below it.
fn below(label: &str, text: &str, tone: Tone, indent: usize, style: Style) -> String {
    let hang = (indent + GAP).min(style.width / 3);
    let mut block = String::new();
    for (part, blanks, tone) in [(format!("{label}:"), indent, Tone::Quiet), (clean(text), hang, tone)] {
        for line in wrap(&part, style.width.saturating_sub(blanks)) {
            block.extend([&*" ".repeat(blanks), &style.paint(&line, tone), "\n"]);
        }
    }
    block
}

/// The rest of the line that begins with `head`, and the lines below it, indented by `hang` columns.
pub(crate) fn hanging(head: &str, text: &str, hang: usize, tone: Tone, style: Style) -> String {
    let text = clean(text);
    let mut lines = wrap(&text, style.width.saturating_sub(width(head)).max(1));
    let rest = lines.split_off(1).join(" ");
    if !rest.is_empty() {
        lines.extend(wrap(&rest, style.width.saturating_sub(hang)));
    }
    let painted: Vec<String> = lines.iter().map(|line| style.paint(line, tone)).collect();
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
    fn columns_line_up_and_no_line_ends_with_blanks() {
        let expected = "\
NAME   SIZE  STORY
größe    12  the long story of a thing
    why: because
b         3  -
";
        assert_eq!(render(&COLUMNS, &rows(), Style::plain(80)), expected);
    }

    #[test]
    fn a_column_that_does_not_fit_moves_below_with_its_title() {
        let expected = "\
NAME   SIZE
größe    12
    story: the long
       story of a
       thing
    why: because
b         3
";
        assert_eq!(render(&COLUMNS, &rows(), Style::plain(21)), expected);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 12..100 {
            let text = render(&COLUMNS, &rows(), Style::plain(width));
            assert!(text.lines().all(|l| super::width(l) <= width), "{width}:\n{text}");
        }
    }
}
