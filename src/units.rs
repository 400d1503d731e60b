//! Durations and sizes as people write them in a configuration: `"15m"`, `"64MiB"`.
//!
//! For fields: `#[serde(with = "crate::units::duration")]` on a [`Duration`](std::time::Duration),
//! `optional_duration` on an `Option` of one, `#[serde(with = "crate::units::size")]` on a `u64` of
//! bytes.

/// A duration as text: `"500ms"`, `"2s"`, `"15m"`, `"1h 30m"`.
pub mod duration {
    use std::{fmt, time::Duration};

    use serde::{Deserializer, Serializer, de};

    /// Reads a duration from its text.
    ///
    /// # Errors
    /// Anything but a text that is a duration; the error shows how to write one.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        deserializer.deserialize_str(Text)
    }

    /// Writes the text that reads as this duration.
    ///
    /// # Errors
    /// None of its own.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    struct Text;

    impl de::Visitor<'_> for Text {
        type Value = Duration;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a duration: a number and its unit, in quotes, as in \"500ms\", \"2s\", \"15m\" or \"24h\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            humantime::parse_duration(text.trim()).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
}

/// A duration that may be left out.
pub mod optional_duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Given(#[serde(with = "super::duration")] Duration);

    /// Reads a duration from its text, if there is one.
    ///
    /// # Errors
    /// Anything but a text that is a duration; the error shows how to write one.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Given>::deserialize(deserializer)?.map(|Given(duration)| duration))
    }

    /// Writes the text that reads as this duration.
    ///
    /// # Errors
    /// None of its own.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => super::duration::serialize(duration, serializer),
            None => serializer.serialize_none(),
        }
    }
}

/// A size in bytes as text: `"512KiB"`, `"64MiB"`, `"1GB"`.
pub mod size {
    use std::fmt;

    use bytesize::ByteSize;
    use serde::{Deserializer, Serializer, de};

    const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

    /// Reads a size from its text, or from a plain number of bytes.
    ///
    /// # Errors
    /// Anything else; the error shows how to write a size.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_any(Text)
    }

    /// Writes the text that reads as exactly this size.
    ///
    /// # Errors
    /// None of its own.
    pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        match UNITS.iter().find(|(_, unit)| *bytes >= *unit && bytes.is_multiple_of(*unit)) {
            Some((name, unit)) => serializer.collect_str(&format_args!("{}{name}", bytes / unit)),
            None => serializer.collect_str(&format_args!("{bytes}B")),
        }
    }

    struct Text;

    impl de::Visitor<'_> for Text {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size: a number and its unit, in quotes, as in \"512KiB\", \"64MiB\" or \"1GB\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            let size: Result<ByteSize, _> = text.trim().parse();
            size.map(|size| size.as_u64()).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Settings {
        #[serde(with = "super::duration")]
        ttl: Duration,
        #[serde(with = "super::size")]
        capacity: u64,
    }

    fn read(ttl: &str, capacity: &str) -> Result<Settings, String> {
        toml::from_str(&format!("ttl = {ttl}\ncapacity = {capacity}")).map_err(|error| error.to_string())
    }

    #[test]
    fn durations_and_sizes_are_read_as_people_write_them() {
        for (text, ttl) in [("\"500ms\"", 500), ("\"2s\"", 2_000), ("\"15m\"", 900_000), ("\"1h 30m\"", 5_400_000)] {
            assert_eq!(read(text, "1").unwrap().ttl, Duration::from_millis(ttl));
        }
        for (text, capacity) in [("\"64MiB\"", 64 << 20), ("\"1GB\"", 1_000_000_000), ("\"12B\"", 12), ("77", 77)] {
            assert_eq!(read("\"1s\"", text).unwrap().capacity, capacity);
        }
    }

    #[test]
    fn what_is_shown_reads_as_the_same() {
        for (ttl, capacity) in [(0, 0), (1_500, 1023), (900_000, 1 << 20), (86_400_000, 3 << 40), (61_001, 1_000_000)] {
            let settings = Settings { ttl: Duration::from_millis(ttl), capacity };
            let shown = toml::to_string(&settings).unwrap();
            assert_eq!(toml::from_str::<Settings>(&shown).unwrap(), settings, "{shown}");
        }
    }

    #[test]
    fn a_wrong_unit_is_an_error_that_shows_how_to_write_it() {
        for (ttl, capacity, hint) in [
            ("15", "1", "\"15m\""),
            ("\"15\"", "1", "\"15m\""),
            ("\"soon\"", "1", "\"15m\""),
            ("\"-1s\"", "1", "\"15m\""),
            ("\"1s\"", "\"many\"", "\"64MiB\""),
            ("\"1s\"", "-1", "\"64MiB\""),
            ("\"1s\"", "true", "\"64MiB\""),
        ] {
            let error = read(ttl, capacity).expect_err("not a setting");
            assert!(error.contains(hint), "{error}");
        }
    }
}
