//! A setting that is a secret: written in place, or read from a file or a variable.

use std::{env, fmt, fs, io, path::PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use crate::secret::SecretValue;

/// The place of a secret that configures this program: `"..."`, `{ file = "..." }` or
/// `{ env = "..." }`. Its printed form names the place, never the content.
#[derive(Clone)]
pub enum SecretSetting {
    /// In place.
    Inline(SecretValue),
    /// In a file; a line break at its end is ignored.
    File(PathBuf),
    /// In an environment variable.
    Env(String),
}

impl SecretSetting {
    /// Reads the secret from its place.
    ///
    /// # Errors
    /// [`SettingError`] where there is none; it names the place, never the content.
    pub fn resolve(&self) -> Result<SecretValue, SettingError> {
        let secret = match self {
            Self::Inline(value) => value.clone(),
            Self::File(path) => {
                let bytes = fs::read(path).map(Zeroizing::new);
                let bytes = bytes.map_err(|source| SettingError::File { path: path.clone(), source })?;
                let text = std::str::from_utf8(&bytes).map_err(|_| SettingError::NotText(self.to_string()))?;
                let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
                SecretValue::new(text.to_owned())
            }
            Self::Env(name) => match env::var(name) {
                Ok(text) => SecretValue::new(text),
                Err(env::VarError::NotPresent) => return Err(SettingError::Unset(name.clone())),
                Err(env::VarError::NotUnicode(_)) => return Err(SettingError::NotText(self.to_string())),
            },
        };
        if secret.is_empty() { Err(SettingError::Empty(self.to_string())) } else { Ok(secret) }
    }
}

impl SecretSetting {
    /// Whether both are the same inline secret, or name the same place.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Inline(one), Self::Inline(other)) => one.same_as(other),
            (Self::File(one), Self::File(other)) => one == other,
            (Self::Env(one), Self::Env(other)) => one == other,
            (Self::Inline(_) | Self::File(_) | Self::Env(_), _) => false,
        }
    }
}

/// Why a secret setting cannot be read. It never contains the content.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// The file cannot be read.
    #[error("the file {} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The variable is not set.
    #[error("the environment variable {0} is not set")]
    Unset(String),
    /// The content is not UTF-8.
    #[error("the content of {0} is not text (UTF-8)")]
    NotText(String),
    /// The content is empty.
    #[error("{0} is empty")]
    Empty(String),
}

/// Names the place of the secret.
impl fmt::Display for SecretSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("(redacted)"),
            Self::File(path) => write!(f, "the file {}", path.display()),
            Self::Env(name) => write!(f, "the environment variable {name}"),
        }
    }
}

impl fmt::Debug for SecretSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretSetting({self})")
    }
}

impl Serialize for SecretSetting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Inline(_) => serializer.serialize_str("(redacted)"),
            Self::File(path) => serializer.collect_map([("file", path.to_string_lossy().as_ref())]),
            Self::Env(name) => serializer.collect_map([("env", name)]),
        }
    }
}

impl<'de> Deserialize<'de> for SecretSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Form)
    }
}

struct Form;

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Place {
    File,
    Env,
}

// serde's own errors repeat a value of the wrong type, which here may be the secret itself without
// its quotes. So this visitor handles every type that can be written.
impl<'de> de::Visitor<'de> for Form {
    type Value = SecretSetting;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text in quotes, { file = \"...\" } or { env = \"...\" }")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<SecretSetting, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<SecretSetting, E> {
        Ok(SecretSetting::Inline(SecretValue::new(text)))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut places: A) -> Result<SecretSetting, A::Error> {
        let setting = match places.next_key()? {
            Some(Place::File) => SecretSetting::File(places.next_value()?),
            Some(Place::Env) => SecretSetting::Env(places.next_value()?),
            None => return Err(wrong()),
        };
        if places.next_key::<Place>()?.is_some() { Err(wrong()) } else { Ok(setting) }
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<SecretSetting, E> {
        Err(wrong())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<SecretSetting, E> {
        Err(wrong())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<SecretSetting, E> {
        Err(wrong())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<SecretSetting, E> {
        Err(wrong())
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, _: A) -> Result<SecretSetting, A::Error> {
        Err(wrong())
    }
}

fn wrong<E: de::Error>() -> E {
    E::custom("a secret is a text in quotes, { file = \"...\" } or { env = \"...\" }")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Settings {
        secret: SecretSetting,
    }

    fn read(secret: &str) -> Result<SecretSetting, String> {
        let settings: Result<Settings, _> = toml::from_str(&format!("secret = {secret}"));
        settings.map(|settings| settings.secret).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_secret_is_read_from_its_place_or_a_file_or_a_variable() {
        assert_eq!(read("\"hunter2\"").unwrap().resolve().unwrap().expose(), "hunter2");
        for (content, secret) in [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), (" a ", " a ")] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content.as_bytes()).unwrap();
            let setting = SecretSetting::File(file.path().to_owned());
            assert_eq!(setting.resolve().unwrap().expose(), secret, "{content:?}");
        }
        let path = env::var("PATH").unwrap();
        assert_eq!(read("{ env = \"PATH\" }").unwrap().resolve().unwrap().expose(), path);
    }

    #[test]
    fn an_unreadable_secret_names_its_place_and_not_its_content() {
        let error = read("{ file = \"/nowhere/at/all\" }").unwrap().resolve().expect_err("no such file");
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
        let error = read("{ env = \"SECRETIER_NOT_SET\" }").unwrap().resolve().expect_err("not set");
        assert!(error.to_string().contains("SECRETIER_NOT_SET"), "{error}");
        assert!(matches!(read("\"\"").unwrap().resolve(), Err(SettingError::Empty(_))));

        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"hunter2\xff").unwrap();
        let error = SecretSetting::File(file.path().to_owned()).resolve().expect_err("not text");
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    #[test]
    fn anything_else_is_an_error_that_says_what_is_allowed_without_repeating_it() {
        for wrong in ["4711", "4711.5", "true", "[\"4711\"]", "{}", "{ file = \"4711\", env = \"B\" }"] {
            let error = read(wrong).expect_err(wrong);
            assert!(error.contains("{ file = \"...\" }") && !error.contains("4711"), "{error}");
        }
        assert!(read("{ path = \"a\" }").is_err());
    }

    #[test]
    fn what_is_shown_tells_where_from_and_not_what() {
        let settings = Settings { secret: read("\"hunter2\"").unwrap() };
        let shown = format!("{settings:?} {}", toml::to_string(&settings).unwrap());
        assert!(!shown.contains("hunter2") && shown.contains("(redacted)"), "{shown}");

        let settings = Settings { secret: read("{ file = \"/run/secret\" }").unwrap() };
        let shown = toml::to_string(&settings).unwrap();
        assert!(shown.contains("/run/secret"), "{shown}");
        assert!(matches!(toml::from_str::<Settings>(&shown).unwrap().secret, SecretSetting::File(_)));
    }
}
