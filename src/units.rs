//! Durations and sizes as people write them in a configuration: `"15m"`, `"64MiB"`.

/// A duration such as `"500ms"`, `"15m"` or `"1h 30m"`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    /// Writes a duration as it is read.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    /// Reads a duration.
    ///
    /// # Errors
    /// The text is no duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }

    pub(super) fn parse(text: &str) -> Result<Duration, String> {
        humantime::parse_duration(text).map_err(|_| {
            format!("{text:?} is no duration; write a number and a unit, as in \"500ms\", \"30s\", \"15m\", \"24h\"")
        })
    }
}

/// A duration that may be left out.
pub mod optional_duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    /// Writes a duration as it is read.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => super::duration::serialize(duration, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a duration.
    ///
    /// # Errors
    /// The text is no duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| super::duration::parse(&text).map_err(D::Error::custom)).transpose()
    }
}

/// A size such as `"64MiB"` or `"1GB"`; a bare number is bytes.
pub mod size {
    use bytesize::ByteSize;
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Bytes(u64),
        Text(String),
    }

    /// Writes a size as it is read.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = size.as_u64();
        let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
            Some((name, unit)) => serializer.collect_str(&format_args!("{}{name}", bytes / unit)),
            None => serializer.collect_str(&format_args!("{bytes}B")),
        }
    }

    /// Reads a size.
    ///
    /// # Errors
    /// The text is no size.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        let wrong = |text: &dyn std::fmt::Display| {
            D::Error::custom(format!(
                "{text} is no size; write a number and a unit, as in \"64KiB\", \"256MiB\", \"1GiB\""
            ))
        };
        match Written::deserialize(deserializer) {
            Ok(Written::Bytes(bytes)) => Ok(ByteSize::b(bytes)),
            Ok(Written::Text(text)) => text.parse().map_err(|_| wrong(&format_args!("{text:?}"))),
            Err(_) => Err(wrong(&"that")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytesize::ByteSize;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Settings {
        #[serde(with = "super::duration")]
        after: Duration,
        #[serde(default, with = "super::optional_duration", skip_serializing_if = "Option::is_none")]
        maybe: Option<Duration>,
        #[serde(with = "super::size")]
        size: ByteSize,
    }

    #[test]
    fn settings_are_written_as_they_are_read() {
        let settings = Settings { after: Duration::from_secs(900), maybe: None, size: ByteSize::mib(64) };
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(text, "after = \"15m\"\nsize = \"64MiB\"\n");
        assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings);
        let bare: Settings = toml::from_str("after = \"500ms\"\nmaybe = \"1h 30m\"\nsize = 1000").unwrap();
        assert_eq!(bare.maybe, Some(Duration::from_secs(5400)));
        assert_eq!(bare.size, ByteSize::b(1000));
    }

    #[test]
    fn a_wrong_unit_is_told_with_the_allowed_form() {
        for wrong in
            ["after = \"soon\"\nsize = \"1MiB\"", "after = \"1s\"\nsize = \"big\"", "after = \"1s\"\nsize = true"]
        {
            let message = toml::from_str::<Settings>(wrong).unwrap_err().to_string();
            assert!(message.contains("write a number and a unit"), "{message}");
        }
    }
}
