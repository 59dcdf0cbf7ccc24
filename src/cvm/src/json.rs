//! JSON of other programs, for people and for pipes: order, unknown fields and large numbers stay.

use crate::style::Style;
use serde_json::{Deserializer, Serializer};

/// Indented on a terminal, in one line elsewhere.
pub(crate) fn shown(json: &str, style: Style) -> String {
    let text = if style.is_terminal { indented(json) } else { json.to_owned() };
    text + "\n"
}

/// Token by token, because a [`serde_json::Value`] would sort the fields, or reorder them in every
/// program of the workspace if it were built with `preserve_order`.
fn indented(json: &str) -> String {
    let mut out = Vec::with_capacity(json.len() * 2);
    let copied =
        serde_transcode::transcode(&mut Deserializer::from_str(json), &mut Serializer::pretty(&mut out));
    match copied {
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        Err(_) => json.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indenting_changes_nothing_but_white_space() {
        let json = r#"{"b":18446744073709551615,"a":[],"c":{},"d":[1.5,{"x":"a \" , {b} \\"},[]],"e":null}"#;
        let expected = r#"{
  "b": 18446744073709551615,
  "a": [],
  "c": {},
  "d": [
    1.5,
    {
      "x": "a \" , {b} \\"
    },
    []
  ],
  "e": null
}"#;
        assert_eq!(indented(json), expected);
        assert_eq!(indented(expected), expected);
    }
}
