//! How long a 429 asks us to stay away.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, header};

use crate::clock::Timestamp;

/// Where no time is told.
const USUAL_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

const RATE_LIMIT_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// From one second to ten minutes: by `Retry-After`, in seconds or until a date (RFC 9110, section 10.2.3), else by
/// Infisical's own header, else a minute. `now` counts for a date where the answer does not say when it was sent:
/// the server's clock need not agree with ours.
pub(super) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Duration {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok().map(str::trim);
    let seconds = |name: &HeaderName| text(name)?.parse().ok().map(Duration::from_secs);
    let date = |name: &HeaderName| text(name).and_then(|text| httpdate::parse_http_date(text).ok());
    let until_date = || {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(now.as_millis()).unwrap_or_default());
        let sent_at = date(&header::DATE).unwrap_or(now);
        // A date that is past asks for no pause.
        Some(date(&header::RETRY_AFTER)?.duration_since(sent_at).unwrap_or_default())
    };
    let reset = || seconds(&RATE_LIMIT_RESET).filter(|pause| *pause <= LONGEST_PAUSE);
    let pause = seconds(&header::RETRY_AFTER).or_else(until_date).or_else(reset).unwrap_or(USUAL_PAUSE);
    pause.clamp(Duration::from_secs(1), LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_told_in_seconds_or_by_a_date() {
        // Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110.
        let now = Timestamp::from_millis(784_111_777_000);
        for (headers, pause) in [
            (&[("retry-after", "17")][..], 17),
            (&[("retry-after", " 17 ")], 17),
            (&[("retry-after", "0")], 1),
            (&[("retry-after", "90000")], 600),
            (&[("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")], 30),
            // The two obsolete forms, which recipients must understand.
            (&[("retry-after", "Sunday, 06-Nov-94 08:50:07 GMT")], 30),
            (&[("retry-after", "Sun Nov  6 08:50:07 1994")], 30),
            (&[("retry-after", "Sun, 06 Nov 1994 08:49:00 GMT")], 1),
            (&[("retry-after", "Mon, 07 Nov 1994 08:49:37 GMT")], 600),
            // By the server's clock, where it tells the time.
            (&[("date", "Tue, 15 Nov 1994 08:12:31 GMT"), ("retry-after", "Tue, 15 Nov 1994 08:12:36 GMT")], 5),
            (&[("date", "yesterday"), ("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")], 30),
            (&[("retry-after", "soon")], 60),
            (&[("retry-after", "-1")], 60),
            (&[("retry-after", "soon"), ("x-ratelimit-reset", "23")], 23),
            (&[("retry-after", "17"), ("x-ratelimit-reset", "23")], 17),
            (&[("x-ratelimit-reset", "1790000000")], 60),
            (&[], 60),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.insert(HeaderName::from_static(name), http::HeaderValue::from_static(value));
            }
            assert_eq!(retry_after(&map, now), Duration::from_secs(pause), "{headers:?}");
        }
    }
}
