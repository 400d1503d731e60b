//! An object of JSON, and nothing else.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

/// A struct that JSON must give as an object, by the names of its fields. By default serde also
/// accepts a list, by the order of the fields, which is documented nowhere.
#[derive(Debug, Default)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Named(PhantomData))
    }
}

struct Named<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Named<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Pair {
        one: String,
        other: Option<i64>,
    }

    #[test]
    fn an_object_is_read_by_the_names_of_its_fields_alone() {
        let read = |text: &str| serde_json::from_str::<Object<Pair>>(text).map(|Object(pair)| (pair.one, pair.other));
        assert_eq!(read(r#" {"other":2,"one":"a"} "#).unwrap(), ("a".to_owned(), Some(2)));
        assert_eq!(read(r#"{"one":"a"}"#).unwrap(), ("a".to_owned(), None));
        for wrong in
            [r#"["a",2]"#, r#"["a"]"#, "[]", "null", r#""a""#, "{}", r#"{"one":"a","one":"b"}"#, r#"{"one":"a","x":1}"#]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
