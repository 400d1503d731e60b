//! Text that somebody else has chosen, made safe to show: in a log, an error, a table, or an audit
//! record.
//!
//! A terminal obeys control characters, C1 among them; characters that set the direction of writing
//! show a text in another order than it has; and characters without a width are invisible. Each is
//! replaced by its JSON escape (`\u202e`), so that the same function works in plain text and within
//! JSON, where it changes nothing: the text that is read back is the same.

use std::{borrow::Cow, fmt};

/// Whether a character is not simply shown, but obeyed, hidden, or moves others.
#[must_use]
pub fn is_unfit(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            // Soft hyphen, and joiners and fillers that are invisible.
            '\u{ad}' | '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180e}' | '\u{3164}'
            | '\u{ffa0}'
            // The Arabic letter mark, zero-width characters, direction marks, line and paragraph
            // separators, embeddings, overrides, isolates, invisible operators.
            | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            // The byte order mark, annotations, musical formatting, tags.
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// The text as one line.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_unfit)
}

/// The text with its line breaks.
#[must_use]
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_unfit(c))
}

/// The same for bytes that are text; other bytes stay as they are.
#[must_use]
pub fn lines_of(bytes: Vec<u8>) -> Vec<u8> {
    let is_plain = |byte: &u8| matches!(byte, b'\n' | b' '..=b'~');
    if bytes.iter().all(is_plain) {
        return bytes;
    }
    match std::str::from_utf8(&bytes).map(lines) {
        Ok(Cow::Owned(text)) => text.into_bytes(),
        Ok(Cow::Borrowed(_)) | Err(_) => bytes,
    }
}

/// The text as it is, where it can only be read as one word; else in quotes, as JSON writes them.
pub struct Word<'a>(pub &'a str);

impl Word<'_> {
    fn is_plain(&self) -> bool {
        let may_mislead = |c: char| c.is_whitespace() || is_unfit(c) || matches!(c, '"' | '=' | '\\');
        !self.0.is_empty() && !self.0.contains(may_mislead)
    }
}

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_plain() { f.write_str(self.0) } else { f.write_str(&quoted(self.0)) }
    }
}

/// The text in quotes, as JSON writes it.
#[must_use]
pub fn quoted(text: &str) -> String {
    // A text always serialises.
    let quoted = serde_json::to_string(text).unwrap_or_default();
    line(&quoted).into_owned()
}

fn escaped(text: &str, is_unfit: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_unfit) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 32);
    for c in text.chars() {
        if !is_unfit(c) {
            shown.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string never fails.
            let _ = fmt::Write::write_fmt(&mut shown, format_args!("\\u{unit:04x}"));
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_obeyed_or_hidden_is_escaped_and_what_is_read_stays() {
        for (text, shown) in [
            ("a\u{1b}[31m", "a\\u001b[31m"),
            ("a\r\nb\tc\u{7f}", "a\\u000d\\u000ab\\u0009c\\u007f"),
            ("\u{85}\u{9b}2J", "\\u0085\\u009b2J"),
            ("a\u{202e}b\u{2066}c\u{61c}", "a\\u202eb\\u2066c\\u061c"),
            ("a\u{200b}b\u{feff}\u{2028}", "a\\u200bb\\ufeff\\u2028"),
            ("\u{e0041}", "\\udb40\\udc41"),
            ("Zoë, 日本語, K🔑, a\\u202e", "Zoë, 日本語, K🔑, a\\u202e"),
        ] {
            assert_eq!(line(text), shown);
        }
        assert_eq!(lines("a\n\u{9b}b\n"), "a\n\\u009bb\n");
        assert_eq!(lines_of(b"a\xff\x1b".to_vec()), b"a\xff\x1b", "no text");
    }

    #[test]
    fn a_word_that_could_be_taken_for_more_is_quoted() {
        for plain in ["A", "acme-1", "192.0.2.1", "Zoë/🔑", "{a}", "a,b"] {
            assert_eq!(Word(plain).to_string(), plain);
        }
        for (text, shown) in [
            ("", r#""""#),
            ("a b", r#""a b""#),
            ("a=b", r#""a=b""#),
            (r#"x" peer="y"#, r#""x\" peer=\"y""#),
            (r"a\", r#""a\\""#),
            ("a\u{a0}b", "\"a\u{a0}b\""),
            ("a\u{202e}", r#""a\u202e""#),
        ] {
            assert_eq!(Word(text).to_string(), shown);
        }
    }

    proptest! {
        #[test]
        fn no_text_shows_what_is_unfit_and_json_reads_back_as_it_was(text in any::<String>()) {
            prop_assert!(!line(&text).contains(is_unfit));
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(&serde_json::from_str::<String>(&lines(&json)).unwrap(), &text);
            let word = Word(&text).to_string();
            prop_assert!(word == text || serde_json::from_str::<String>(&word).unwrap() == text);
        }
    }
}
