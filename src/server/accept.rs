//! `Accept` (RFC 9110, section 12.5.1): which of a secret's two forms its reader prefers.

/// Whether the bare value is preferred to JSON, by the header's lines.
///
/// Each form has the weight of the range that fits it most closely: its name, then `text/*`, then `*/*`. The
/// heavier form is answered. Of two that weigh the same it is the bare value only where `text/plain` is named,
/// and `application/json` is not, or later. A reader that takes neither is answered with JSON. Parameters other
/// than `q` do not count, and neither does a range whose `q` is no weight.
pub(super) fn prefers_text<'a>(lines: impl Iterator<Item = &'a str>) -> bool {
    let (mut text, mut json) = (Form::new("text", "plain"), Form::new("application", "json"));
    for (place, range) in lines.flat_map(|line| split(line, ',')).enumerate() {
        text.consider(range, place);
        json.consider(range, place);
    }
    let is_named_first = text.is_named() && (!json.is_named() || text.place < json.place);
    text.weight > 0 && (text.weight > json.weight || (text.weight == json.weight && is_named_first))
}

/// A form that can be answered, and the range that fits it best so far.
struct Form {
    kind: &'static str,
    subtype: &'static str,
    /// In thousandths; zero where no range fits.
    weight: u16,
    /// How closely the range fits; zero where none does.
    closeness: u8,
    place: usize,
}

impl Form {
    const NAMED: u8 = 3;

    fn new(kind: &'static str, subtype: &'static str) -> Self {
        Self { kind, subtype, weight: 0, closeness: 0, place: 0 }
    }

    fn is_named(&self) -> bool {
        self.closeness == Self::NAMED
    }

    fn consider(&mut self, range: &str, place: usize) {
        let mut parts = split(range, ';').map(str::trim);
        let Some((kind, subtype)) = parts.next().and_then(|name| name.split_once('/')) else { return };
        let closeness = match (kind, subtype) {
            ("*", "*") => 1,
            (kind, "*") if kind.eq_ignore_ascii_case(self.kind) => 2,
            _ if kind.eq_ignore_ascii_case(self.kind) && subtype.eq_ignore_ascii_case(self.subtype) => Self::NAMED,
            _ => return,
        };
        let mut parameters = parts.filter_map(|parameter| parameter.split_once('='));
        let weight = match parameters.find(|(name, _)| name.eq_ignore_ascii_case("q")) {
            Some((_, weight)) => parse_weight(weight),
            None => Some(1000),
        };
        // Of two ranges that fit alike, the first counts.
        if let Some(weight) = weight
            && closeness > self.closeness
        {
            (self.weight, self.closeness, self.place) = (weight, closeness, place);
        }
    }
}

/// A weight in thousandths: 0 to 1, with three decimals at most (section 12.4.2).
fn parse_weight(text: &str) -> Option<u16> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    if decimals.len() > 3 || !decimals.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let thousandths = decimals.bytes().zip([100, 10, 1]).map(|(digit, worth)| u16::from(digit - b'0') * worth).sum();
    match (whole, thousandths) {
        ("0", thousandths) => Some(thousandths),
        ("1", 0) => Some(1000),
        _ => None,
    }
}

/// Splits where the letter stands outside of quotes.
fn split(text: &str, at: char) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    text.split(move |letter| match letter {
        _ if is_escaped => {
            is_escaped = false;
            false
        }
        '\\' if is_quoted => {
            is_escaped = true;
            false
        }
        '"' => {
            is_quoted = !is_quoted;
            false
        }
        letter => letter == at && !is_quoted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_that_weighs_more_is_answered_and_json_where_nothing_tells() {
        for (lines, is_text) in [
            (&["text/plain"][..], true),
            (&["TEXT/Plain"], true),
            (&["text/plain;charset=utf-8"], true),
            (&["text/*"], true),
            (&["text/plain, application/json"], true),
            (&["text/plain, */*"], true),
            (&["text/plain", "application/json"], true),
            (&["application/json;q=0.5, text/plain"], true),
            (&["application/json;q=0.5", "text/plain;q=0.501"], true),
            (&["*/*;q=0.1, text/plain"], true),
            (&["application/json;q=0, */*"], true),
            (&["application/json; Q=0 , text/*;q=0.001"], true),
            (&["application/xml;a=\"b\\\",application/json\", text/plain"], true),
            (&["application/xml", "text/plain;q=0.3"], true),
            (&[], false),
            (&[""], false),
            (&["*/*"], false),
            (&["application/json"], false),
            (&["application/json, text/plain, */*"], false),
            (&["APPLICATION/JSON, text/plain"], false),
            (&["application/json", "text/plain"], false),
            (&["text/plain;q=0.4, application/json;q=0.5"], false),
            (&["text/plain;q=0"], false),
            (&["text/plain;q=0, text/*"], false),
            (&["text/plain;q=0.000, */*;q=0.1"], false),
            (&["text/plain;q=0, application/json;q=0"], false),
            (&["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], false),
            (&["text/*, application/json"], false),
            (&["image/png"], false),
            // A part that is no range, or has no weight, says nothing.
            (&["text"], false),
            (&["text/plain;q=1.5"], false),
            (&["text/plain;q=0.0001"], false),
            (&["text/plain;q=-1"], false),
            (&["text/plain;q="], false),
            (&["text/plain;q=1.001"], false),
            (&["*/plain"], false),
        ] {
            assert_eq!(prefers_text(lines.iter().copied()), is_text, "{lines:?}");
        }
    }
}
