//! In which format the metrics are wanted.

use http::{HeaderMap, header};

/// Whether OpenMetrics 1.0 is named in `Accept`, and is wanted at least as much as plain text. A
/// name with another version is not this format.
pub(super) fn prefers_openmetrics(headers: &HeaderMap) -> bool {
    let (mut openmetrics, mut plain) = (0.0_f32, [None; 3]);
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for range in values.flat_map(|value| value.split(',')) {
        let Some((name, weight, is_version)) = parsed(range) else { continue };
        match name.as_str() {
            "application/openmetrics-text" if is_version => openmetrics = openmetrics.max(weight),
            "text/plain" => plain[0] = Some(weight),
            "text/*" => plain[1] = Some(weight),
            "*/*" => plain[2] = Some(weight),
            _ => {}
        }
    }
    // The most specific range counts (RFC 9110, section 12.5.1).
    openmetrics > 0.0 && openmetrics >= plain.into_iter().flatten().next().unwrap_or(0.0)
}

/// A range's name in lower case, its weight, and whether it allows version 1.0.0.
fn parsed(range: &str) -> Option<(String, f32, bool)> {
    let mut parts = range.split(';').map(str::trim);
    let name = parts.next()?.to_ascii_lowercase();
    let (mut weight, mut is_version) = (1.0, true);
    for (key, value) in parts.filter_map(|part| part.split_once('=')) {
        let value = value.trim().trim_matches('"');
        match key.trim().to_ascii_lowercase().as_str() {
            "q" => weight = value.parse().ok().filter(|weight| (0.0..=1.0).contains(weight))?,
            "version" => is_version = value == "1.0.0",
            _ => {}
        }
    }
    Some((name, weight, is_version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_whoever_asks_for_it_and_wants_nothing_else_more() {
        let prefers = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            prefers_openmetrics(&headers)
        };
        for accept in [
            "application/openmetrics-text",
            "application/openmetrics-text; version=1.0.0",
            "Application/OpenMetrics-Text;VERSION=\"1.0.0\";charset=utf-8",
            // As Prometheus 2 and 3 ask.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "text/plain;q=0.5, */*, application/openmetrics-text;q=0.5",
        ] {
            assert!(prefers(accept), "{accept}");
        }
        for accept in [
            "*/*",
            "text/plain",
            "text/html, */*;q=0.8",
            "application/openmetrics-text;version=0.0.1",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=2",
            "application/openmetrics-text;q=0.3, text/plain",
            "application/openmetrics-text;q=0.3, text/*;q=0.4, */*;q=0.1",
            "application/openmetrics-text;q=0.3, */*;q=0.4",
        ] {
            assert!(!prefers(accept), "{accept}");
        }
        assert!(!prefers_openmetrics(&HeaderMap::new()));
    }
}
