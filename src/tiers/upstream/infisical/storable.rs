//! Checks before each write for names and values that Infisical would alter, or cannot accept.

use std::io;

use serde::Serialize;

use crate::{secret::SecretValue, tiers::upstream::Unstorable};

/// The longest request body that the server accepts.
const LARGEST_BODY: usize = 1 << 20;

/// Infisical trims names, so a write to `"KEY "` would change `KEY`.
pub(super) fn check_name(name: &str) -> Result<(), Unstorable> {
    if trim(name).len() != name.len() {
        return Err(Unstorable::Name(
            "Infisical would trim this name, and write another secret: remove the blanks at both ends",
        ));
    }
    if OBJECT_MEMBERS.contains(&name) {
        return Err(Unstorable::Name(
            "Infisical's server fails on names that JavaScript objects inherit; choose another name",
        ));
    }
    Ok(())
}

/// Whether a route of its own leads to a secret of this name; the others are written by a batch.
///
/// The server's router accepts names up to 100 UTF-16 units. `.` and `..`, encoded or not, are
/// parts of a path that every URL library resolves (WHATWG URL, 4.4), so the request would go to
/// another route. It would also do so for a name that is a route of v4.
pub(super) fn has_route(name: &str) -> bool {
    !matches!(name, "." | ".." | "batch" | "move") && name.encode_utf16().count() <= 100
}

/// Infisical trims values too, and keeps one line feed at the end.
pub(super) fn check_value(value: &SecretValue) -> Result<(), Unstorable> {
    let value = value.expose();
    let kept = value.strip_suffix('\n').unwrap_or(value);
    if trim(kept).len() == kept.len() {
        Ok(())
    } else {
        Err(Unstorable::Value(
            "Infisical would trim this value: remove blanks and line breaks at both ends (one line feed at the end may stay), or encode it, as base64 say",
        ))
    }
}

/// Older servers answer a body that is too long with 413, newer ones with a 500 that looks as if
/// they were broken.
pub(super) fn check_size(body: &impl Serialize) -> Result<(), Unstorable> {
    let mut length = Length(0);
    match serde_json::to_writer(&mut length, body) {
        Ok(()) if length.0 <= LARGEST_BODY => Ok(()),
        _ => Err(Unstorable::Size),
    }
}

/// Trims as JavaScript's `String.prototype.trim` does (ECMA-262, 22.1.3.32), which differs from
/// Rust's in two characters.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\u{feff}' || (c.is_whitespace() && c != '\u{85}'))
}

/// The members of `Object.prototype` (ECMA-262, 20.1.3). The server groups secrets in a plain
/// object by name and answers 500 to these names, which would count as its failure: anybody who may
/// write could open the breaker of the upstream tier for everybody.
const OBJECT_MEMBERS: [&str; 12] = [
    "__defineGetter__",
    "__defineSetter__",
    "__lookupGetter__",
    "__lookupSetter__",
    "__proto__",
    "constructor",
    "hasOwnProperty",
    "isPrototypeOf",
    "propertyIsEnumerable",
    "toLocaleString",
    "toString",
    "valueOf",
];

/// Counts the bytes written to it, and keeps none of them: they may be a secret.
struct Length(usize);

impl io::Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_or_a_value_that_would_be_trimmed_is_told() {
        // Every white space character of JavaScript, and characters that are none there.
        let blanks = "\t\u{b}\u{c} \u{a0}\u{1680}\u{2000}\u{2001}\u{2002}\u{2003}\u{2004}\u{2005}\u{2006}\u{2007}\u{2008}\u{2009}\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}\u{feff}";
        for blank in blanks.chars() {
            for name in [format!("{blank}KEY"), format!("KEY{blank}"), blank.to_string()] {
                assert!(matches!(check_name(&name), Err(Unstorable::Name(_))), "{name:?}");
                assert!(matches!(check_value(&SecretValue::new(name.clone())), Err(Unstorable::Value(_))), "{name:?}");
            }
            assert_eq!(check_name(&format!("A{blank}B")), Ok(()), "{blank:?}");
        }
        for kept in ["KEY", "\u{200b}KEY", "KEY\u{180e}", "\u{2060}"] {
            assert_eq!(check_name(kept), Ok(()), "{kept:?}");
        }
        for value in ["", "a", "a\n", "\n", "a\r\nb\n", "\u{85}a", "a\0"] {
            assert_eq!(check_value(&SecretValue::new(value.to_owned())), Ok(()), "{value:?}");
        }
        for value in [" a", "a ", "a\n\n", "a\r\n", "\ta", "a \n", " ", "\n\n"] {
            assert!(check_value(&SecretValue::new(value.to_owned())).is_err(), "{value:?}");
        }
    }

    #[test]
    fn a_body_counts_as_it_is_sent() {
        // Two quotes, and each of these characters as an escape of six.
        assert_eq!(check_size(&"x".repeat(LARGEST_BODY - 2)), Ok(()));
        assert_eq!(check_size(&"x".repeat(LARGEST_BODY - 1)), Err(Unstorable::Size));
        assert_eq!(check_size(&"\u{1}".repeat(LARGEST_BODY / 6)), Ok(()));
        assert_eq!(check_size(&"\u{1}".repeat(LARGEST_BODY / 6 + 1)), Err(Unstorable::Size));
    }
}
