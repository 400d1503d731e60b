//! How a line of the log looks: whatever is in it, it is one line, and each field is one field.

use std::{error::Error, fmt, io};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FormatFields, format::Writer},
};

use crate::legible;

/// Writes the fields of a text line. A value that could be taken for more than one, a secret's
/// key say, is quoted: `key="A peer=10.0.0.1"`.
pub(super) struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut writing = Writing { writer, is_first: true, result: Ok(()) };
        fields.record(&mut writing);
        writing.result
    }
}

struct Writing<'w> {
    writer: Writer<'w>,
    is_first: bool,
    result: fmt::Result,
}

impl Writing<'_> {
    fn put(&mut self, field: &Field, value: &dyn fmt::Display) {
        // How the crate `log` tells where it was called; the line has it already.
        if field.name().starts_with("log.") || self.result.is_err() {
            return;
        }
        let space = if std::mem::take(&mut self.is_first) { "" } else { " " };
        self.result = match field.name() {
            "message" => write!(self.writer, "{space}{value}"),
            name => write!(self.writer, "{space}{}={value}", name.trim_start_matches("r#")),
        };
    }
}

impl Visit for Writing<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.put(field, &value),
            _ => self.put(field, &legible::quoted(value)),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.put(field, &legible::Word(&super::chain(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.put(field, &format_args!("{value:?}")),
            // `%` and `?` look the same here: what they give is not known to be one word.
            _ => self.put(field, &legible::Word(&format!("{value:?}"))),
        }
    }
}

/// Writes what is fit to be shown. It is handed whole lines.
pub(super) struct Fit<W>(pub(super) W);

impl<W: io::Write> io::Write for Fit<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let (text, end) = text.strip_suffix('\n').map_or((&*text, ""), |text| (text, "\n"));
        self.0.write_all(format!("{}{end}", legible::line(text)).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(in_json: bool, say: impl FnOnce()) -> String {
        let page = Page::default();
        let written = page.clone();
        let lines = tracing_subscriber::fmt::layer().with_writer(move || Fit(written.clone())).without_time();
        let registry = tracing_subscriber::registry();
        match in_json {
            false => {
                let registry = registry.with(lines.with_ansi(false).fmt_fields(Fields));
                tracing::subscriber::with_default(registry, say)
            }
            true => tracing::subscriber::with_default(registry.with(lines.json()), say),
        }
        let page = page.0.lock().unwrap();
        String::from_utf8(page.clone()).unwrap()
    }

    const FORGED: &str = "K\" peer=10.0.0.1 token=\"root";
    const UNFIT: &str = "a\nERROR b\u{1b}[2J\u{9b}\u{202e}\u{200b}\u{2028}c";

    #[test]
    fn no_value_of_a_text_line_can_be_taken_for_a_field_of_its_own() {
        let line = logged(false, || tracing::info!(key = %FORGED, peer = %"127.0.0.1", name = FORGED, "written"));
        let value = r#""K\" peer=10.0.0.1 token=\"root""#;
        assert!(line.ends_with(&format!("written key={value} peer=127.0.0.1 name={value}\n")), "{line}");
    }

    #[test]
    fn whatever_is_logged_is_one_line_of_what_can_be_read() {
        for in_json in [false, true] {
            let page = logged(in_json, || tracing::info!(key = %UNFIT, name = UNFIT, seen = ?UNFIT, "{UNFIT}"));
            let line = page.strip_suffix('\n').unwrap();
            assert!(!line.contains(legible::is_unfit) && line.contains("\\u202e"), "{line:?}");
            if in_json {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!((&line["fields"]["name"], &line["fields"]["message"]), (&UNFIT.into(), &UNFIT.into()));
            }
        }
    }
}
