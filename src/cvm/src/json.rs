//! JSON, indented without being understood: order, numbers and unknown fields stay as they came.
//!
//! Refuses to check it: what comes in was parsed before. Imports nothing.

const INDENT: &str = "  ";

pub(crate) fn indented(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth = 0_usize;
    let mut characters = json.chars().filter(Relevant::default().judge()).peekable();
    let mut in_text = false;
    let mut escaped = false;
    while let Some(c) = characters.next() {
        out.push(c);
        let ends_text = in_text && c == '"' && !escaped;
        if in_text && !ends_text {
            escaped = !escaped && c == '\\';
            continue;
        }
        in_text = !in_text && c == '"';
        let closes = matches!(characters.peek(), Some('}' | ']'));
        match c {
            '{' | '[' if closes => continue,
            '{' | '[' => {
                depth += 1;
                new_line(&mut out, depth);
            }
            ',' => new_line(&mut out, depth),
            ':' => out.push(' '),
            _ => {}
        }
        if closes && !in_text {
            depth = depth.saturating_sub(1);
            new_line(&mut out, depth);
        }
    }
    out.push('\n');
    out
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.push_str(&INDENT.repeat(depth));
}

/// Leaves out white space between tokens.
#[derive(Default)]
struct Relevant {
    in_text: bool,
    escaped: bool,
}

impl Relevant {
    fn judge(mut self) -> impl FnMut(&char) -> bool {
        move |&c| {
            if self.in_text {
                (self.in_text, self.escaped) = (self.escaped || c != '"', !self.escaped && c == '\\');
                return true;
            }
            self.in_text = c == '"';
            !c.is_whitespace()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indenting_changes_nothing_but_white_space() {
        let json = r#"{"b":1.50,"a":[],"c":{},"d":[1,{"x":"a \" , {b} \\"},[]],"e":null}"#;
        let expected = r#"{
  "b": 1.50,
  "a": [],
  "c": {},
  "d": [
    1,
    {
      "x": "a \" , {b} \\"
    },
    []
  ],
  "e": null
}
"#;
        assert_eq!(indented(json), expected);
        assert_eq!(indented(expected), expected);
    }
}
