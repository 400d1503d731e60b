//! Half a surrogate pair in a JSON string: JavaScript keeps it, Rust's strings cannot. The recorded
//! server returns it once, then stores U+FFFD in its place.

/// Halves become characters of the private use plane 16, so that the body can be parsed.
pub(super) fn hide(json: &str) -> String {
    let bytes = json.as_bytes();
    let mut hidden = String::with_capacity(json.len());
    let (mut copied, mut at) = (0, 0);
    while at < bytes.len() {
        if bytes[at] != b'\\' {
            at += 1;
            continue;
        }
        let Some(unit) = escaped_unit(bytes, at) else {
            at += 2;
            continue;
        };
        let is_pair =
            is_leading(unit) && escaped_unit(bytes, at + 6).is_some_and(|next| !is_leading(next) && is_half(next));
        if is_pair {
            at += 12;
            continue;
        }
        if let Some(stand_in) = is_half(unit).then(|| char::from_u32(PLANE + u32::from(unit))).flatten() {
            hidden.push_str(&json[copied..at]);
            hidden.push(stand_in);
            copied = at + 6;
        }
        at += 6;
    }
    hidden.push_str(&json[copied.min(json.len())..]);
    hidden
}

/// Turns hidden halves back into their escapes.
pub(super) fn reveal(json: String) -> String {
    // Long answers usually have none: all hidden halves begin with this byte.
    if !json.as_bytes().contains(&0xf4) {
        return json;
    }
    let mut revealed = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hidden(c) {
            revealed.push_str(&format!("\\u{:04x}", u32::from(c) - PLANE));
        } else {
            revealed.push(c);
        }
    }
    revealed
}

/// A string in its stored form: hidden halves are replaced for good.
pub(super) fn replace(text: &str) -> String {
    text.replace(is_hidden, "\u{fffd}")
}

fn escaped_unit(bytes: &[u8], at: usize) -> Option<u16> {
    let escape = bytes.get(at..at + 6)?;
    let digits = std::str::from_utf8(escape.strip_prefix(b"\\u")?).ok()?;
    u16::from_str_radix(digits, 16).ok()
}

fn is_half(unit: u16) -> bool {
    (0xd800..=0xdfff).contains(&unit)
}

fn is_leading(unit: u16) -> bool {
    (0xd800..=0xdbff).contains(&unit)
}

fn is_hidden(c: char) -> bool {
    (PLANE + 0xd800..=PLANE + 0xdfff).contains(&u32::from(c))
}

const PLANE: u32 = 0x10_0000;

/// The first half of a pair, hidden.
pub(super) const HALF: char = '\u{10d800}';

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_half_survives_the_parser_and_is_shown_once() {
        let hidden = hide(r#"{"v":"a\ud800b"}"#);
        let parsed: serde_json::Value = serde_json::from_str(&hidden).unwrap();
        assert_eq!(reveal(parsed.to_string()), r#"{"v":"a\ud800b"}"#);
        assert_eq!(replace(parsed["v"].as_str().unwrap()), "a\u{fffd}b");
    }

    #[test]
    fn pairs_and_escaped_backslashes_are_left_alone() {
        for json in [r#""\ud83d\udd11""#, r#""\\ud800""#, r#""\u00e9""#, "\"\\", "\"\\u12"] {
            assert_eq!(hide(json), json);
        }
    }
}
