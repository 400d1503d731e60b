//! Checks which room of the source uses which. `docs/ARCHITECTURE.md` has the picture.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A room is a folder or file of `src`, or of `src/tiers`. It may use the rooms listed here, and
/// [`COMMON`]. A room that is not listed uses no other.
const ALLOWED: [(&str, &str); 20] = [
    ("access", "budget keys policy private_file sealing tiers::database"),
    (
        "app",
        "access attachment config jobs keys offline outgoing phase policy resolver rotation sealing server tiers::database tiers::memory tiers::upstream",
    ),
    (
        "cli",
        "access answer app certificate config key_rotation keys migration phase private_file sealing server setting tiers::database tiers::upstream tls",
    ),
    (
        "config",
        "access keys outgoing phase policy private_file resolver rotation server setting tiers::database tiers::memory tiers::upstream",
    ),
    ("jobs", "access attachment config rotation sealing server tiers::database"),
    ("key_rotation", "keys sealing tiers::database tiers::upstream"),
    ("keys", "private_file sealing setting tiers::upstream"),
    ("offline", "access phase private_file sealing tiers::memory"),
    ("migration", "flaws keys phase policy private_file references sealing tiers::database tiers::upstream"),
    ("policy", "phase"),
    ("references", "flaws"),
    (
        "resolver",
        "answer flaws flights offline phase policy references sealing tiers::database tiers::memory tiers::upstream",
    ),
    ("outgoing", "setting tiers::breaker tls"),
    ("rotation", "access answer outgoing policy resolver setting tiers::database"),
    ("server", "access answer attachment budget flaws infisical object phase pieces private_file resolver rotation"),
    ("snapshot", "flaws"),
    ("tiers::database", "answer etag flaws keys phase private_file sealing setting snapshot tiers::breaker tls"),
    ("tiers::memory", "answer flaws policy"),
    ("certificate", "tls"),
    ("tiers::upstream", "certificate flaws infisical object references setting snapshot tiers::breaker tls"),
];

/// Words of the domain and helpers, which use no other room.
const COMMON: [&str; 11] =
    ["clock", "diagnosis", "legible", "log", "long_work", "metrics", "secret", "tenant", "units", "wiped", "withheld"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.extend(path.extension().is_some_and(|extension| extension == "rs").then_some(path)),
        }
    }
}

/// The room of a path below `crate`, by its first names.
fn room(mut names: impl Iterator<Item = String>) -> Option<String> {
    let first = names.next()?;
    if first != "tiers" {
        return Some(first);
    }
    Some(names.next().map_or_else(|| first.clone(), |second| format!("{first}::{second}")))
}

/// Adds the rooms that the text after `crate::` names: one path, or a group of paths in braces.
fn named(text: &str, before: &[&str], rooms: &mut BTreeSet<String>) {
    if let Some(group) = text.strip_prefix('{') {
        let (mut depth, mut start) = (1, 0);
        for (at, letter) in group.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && letter == ',') {
                named(group[start..at].trim(), before, rooms);
                start = at + 1;
            }
            if depth == 0 {
                return;
            }
        }
        return;
    }
    let length = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(length);
    if name.is_empty() {
        return;
    }
    match rest.strip_prefix("::") {
        Some(rest) if name == "tiers" && before.is_empty() => named(rest, &["tiers"], rooms),
        Some(_) | None => rooms.extend(room(before.iter().copied().chain([name]).map(str::to_owned))),
    }
}

/// The rooms that each room uses, outside of tests.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, mut arrows) = (Vec::new(), BTreeMap::<String, BTreeSet<String>>::new());
    sources(&root, &mut files);
    for file in files {
        let inside = file.strip_prefix(&root).unwrap().with_extension("");
        let names: Vec<String> = inside.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        if names.iter().any(|name| matches!(name.as_str(), "tests" | "lib" | "main" | "layers")) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let code = code.join("\n");
        let mut used = BTreeSet::new();
        for (at, _) in code.match_indices("crate::") {
            let is_path = !code[..at].ends_with(|letter: char| letter.is_alphanumeric() || matches!(letter, '_' | ':'));
            // `pub(in crate::tiers)` is a visibility, not a use.
            if is_path && !code[..at].ends_with("(in ") {
                named(&code[at + "crate::".len()..], &[], &mut used);
            }
        }
        let own = room(names.into_iter().filter(|name| name != "mod")).unwrap();
        used.remove(&own);
        arrows.entry(own).or_default().extend(used);
    }
    arrows
}

#[test]
fn no_room_uses_one_that_it_may_not() {
    let mut wrong = Vec::new();
    for (room, used) in arrows() {
        let allowed: BTreeSet<&str> = allowed(&room).chain(COMMON).collect();
        wrong.extend(
            used.iter().filter(|used| !allowed.contains(used.as_str())).map(|used| format!("{room} -> {used}")),
        );
    }
    assert!(wrong.is_empty(), "not in the table of src/layers.rs, and not to be added lightly: {wrong:#?}");
}

fn allowed(room: &str) -> impl Iterator<Item = &'static str> {
    ALLOWED.iter().find(|(of, _)| *of == room).map_or("", |(_, allowed)| *allowed).split_whitespace()
}

#[test]
fn the_table_has_no_circle() {
    // Rooms that use no room that is left are taken out, until none is left.
    let mut left: BTreeSet<&str> = ALLOWED.iter().map(|(room, _)| *room).collect();
    while let Some(lowest) = left.iter().copied().find(|room| allowed(room).all(|used| !left.contains(used))) {
        left.remove(lowest);
    }
    assert!(left.is_empty(), "these use each other: {left:?}");
}

#[test]
fn the_table_allows_nothing_that_is_not_used() {
    let arrows = arrows();
    let is_used = |room: &str, other: &str| arrows.get(room).is_some_and(|used| used.contains(other));
    let entries = ALLOWED.iter().flat_map(|(room, _)| allowed(room).map(move |other| (*room, other)));
    let unused: Vec<_> = entries.filter(|(room, other)| !is_used(room, other)).collect();
    assert!(unused.is_empty(), "take these out of src/layers.rs: {unused:?}");
}
