//! References in values: `${NAME}` in the same folder, `${environment.folder.NAME}` elsewhere.

use std::collections::{HashMap, HashSet};

/// Replaces the references in the values of one folder, as the recorded server does: each name once
/// and in order; a name that is being replaced already counts as missing, and a missing reference
/// stays as it was written.
pub(super) struct Expander<'a> {
    values: &'a HashMap<String, String>,
    elsewhere: &'a dyn Fn(&str, &str, &str) -> Option<String>,
    expanded: HashMap<String, String>,
    /// Whether the replacement of a reference is read as a pattern of JavaScript's
    /// `String.prototype.replaceAll` (ECMA-262, 22.1.3.20), in which `$&` is the reference itself.
    mangles: bool,
    /// Bytes that expansion may still add, so that a few nested references cannot fill memory.
    allowance: usize,
}

impl<'a> Expander<'a> {
    pub(super) fn new(
        values: &'a HashMap<String, String>,
        elsewhere: &'a dyn Fn(&str, &str, &str) -> Option<String>,
        mangles: bool,
    ) -> Self {
        Self { values, elsewhere, expanded: HashMap::new(), mangles, allowance: MOST_ADDED }
    }

    pub(super) fn expand(&mut self, name: &str) -> Option<String> {
        self.follow(name, &mut HashSet::new())
    }

    fn follow(&mut self, name: &str, on_the_way: &mut HashSet<String>) -> Option<String> {
        if let Some(done) = self.expanded.get(name) {
            return Some(done.clone());
        }
        let mut value = self.values.get(name)?.clone();
        if on_the_way.len() >= DEEPEST || !on_the_way.insert(name.to_owned()) {
            return None;
        }
        for reference in references(&value) {
            let written = format!("${{{reference}}}");
            let parts: Vec<&str> = reference.trim().split('.').collect();
            let replacement = match parts[..] {
                [name] => self.follow(name, on_the_way),
                [environment, ref folders @ .., name] => {
                    (self.elsewhere)(environment, &format!("/{}", folders.join("/")), name)
                }
                [] => None,
            };
            let Some(mut replacement) = replacement.filter(|text| !text.is_empty()) else { continue };
            if self.mangles {
                replacement = mangled(&replacement, &written);
            }
            let added = value.matches(&written).count().saturating_mul(replacement.len());
            if added <= self.allowance {
                self.allowance -= added;
                value = value.replace(&written, &replacement);
            }
        }
        self.expanded.insert(name.to_owned(), value.clone());
        Some(value)
    }
}

/// A replacement as JavaScript reads it; only `$$` and `$&` are supported.
fn mangled(replacement: &str, reference: &str) -> String {
    let mut pieces = replacement.split("$$");
    let first = pieces.next().unwrap_or_default().replace("$&", reference);
    pieces.fold(first, |before, piece| format!("{before}${}", piece.replace("$&", reference)))
}

/// The distinct references of a value, in order: the text between `${` and the next `}`.
fn references(value: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = value;
    while let Some(start) = rest.find("${") {
        rest = &rest[start + 2..];
        let Some(end) = rest.find('}') else { break };
        let reference = &rest[..end];
        if !reference.is_empty() && !found.iter().any(|known| known == reference) {
            found.push(reference.to_owned());
        }
        if found.len() == MOST_REFERENCES {
            break;
        }
        rest = &rest[end + 1..];
    }
    found
}

const DEEPEST: usize = 64;
const MOST_REFERENCES: usize = 200;
const MOST_ADDED: usize = 16 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubling_references_stop_before_they_fill_memory() {
        let mut values: HashMap<_, _> =
            (0..60).map(|level| (format!("L{level}"), format!("${{L{0}}}${{L{0}}}", level + 1))).collect();
        values.insert("L60".to_owned(), "x".repeat(1000));
        let mut expander = Expander::new(&values, &|_, _, _| None, false);
        assert!(expander.expand("L0").unwrap().len() <= MOST_ADDED);
    }
}
