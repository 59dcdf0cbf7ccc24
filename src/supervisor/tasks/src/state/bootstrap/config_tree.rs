//! A JSON5 text as a tree in which a few values are looked up.
//!
//! The crate `json5` knows the grammar. It recurses as deep as a text nests, so the seed here counts the levels and
//! stops it. Strings are wiped when the tree is dropped, because an `openclaw.json` is full of keys. Arrays are read
//! and forgotten, because nothing in one is ever looked up.

use std::collections::BTreeMap;
use std::fmt;

use cvm_secrets::secret::Secret;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Real configurations are some ten levels deep.
const DEPTH_MAX: usize = 64;
/// Real configurations are some kilobytes long.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

pub(super) enum Value {
    Text(Secret),
    Number(f64),
    Bool(bool),
    Null,
    Array,
    Object(BTreeMap<String, Value>),
}

impl Value {
    /// `None` is a text that is not JSON5, too long or nested too deeply.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.len() > TEXT_BYTES_MAX {
            return None;
        }
        json5::from_str(text).ok()
    }

    /// The value at a path of keys that are joined with dots.
    pub(super) fn at(&self, path: &str) -> Option<&Self> {
        path.split('.').try_fold(self, |value, key| match value {
            Self::Object(members) => members.get(key),
            _ => None,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Level(0).deserialize(deserializer)
    }
}

/// Reads one value, so many levels below the root.
#[derive(Clone, Copy)]
struct Level(usize);

impl Level {
    fn below<E: Error>(self) -> Result<Self, E> {
        if self.0 < DEPTH_MAX { Ok(Self(self.0 + 1)) } else { Err(E::custom("nested too deeply")) }
    }
}

impl<'de> DeserializeSeed<'de> for Level {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON5 value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(Secret::copy_of(text.as_bytes())))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(Secret::from(text)))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Number(number))
    }

    #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers are no more exact")]
    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Number(number as f64))
    }

    #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers are no more exact")]
    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Number(number as f64))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        while elements.next_element_seed(below)?.is_some() {}
        Ok(Value::Array)
    }

    /// The last of two members with one name counts, as in JavaScript.
    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut object = BTreeMap::new();
        while let Some(key) = members.next_key()? {
            object.insert(key, members.next_value_seed(below)?);
        }
        Ok(Value::Object(object))
    }
}
