//! References in upstream's texts: `${NAME}` to a secret of the same folder, and
//! `${environment.folder.NAME}` to one of another.
//!
//! Upstream would replace them with the rights of the proxy's own identity, which reads all
//! tenants: anybody who may write one secret could then read every other through it. So texts are
//! read as they are written, and references are followed here, within [`Rules`]: into the folder of
//! the text, and into folders that the configuration allows. Text that was inserted for a reference
//! is never searched for references again.
//!
//! A reference that is not followed stays as it is written, and never harms another secret.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Range,
};

use crate::{flaws::Unresolved, secret::SecretValue};

/// The longest value that references may make, in bytes: the largest that Infisical accepts in a
/// request.
const LONGEST: usize = 1 << 20;

/// The total bytes of values that references may make in one folder, so that texts that double each
/// other do not fill memory.
const MOST_BYTES: usize = 32 << 20;

/// The longest chain of references that is followed.
const DEEPEST: usize = 16;

/// The number of references in one text that are followed.
const MOST_REFERENCES: usize = 1000;

/// The folders that texts may refer to.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    environment: String,
    folders: BTreeSet<String>,
}

impl Rules {
    /// Allows references within each folder, and from every folder into these folders of this
    /// environment.
    pub fn new(environment: &str, folders: impl IntoIterator<Item = String>) -> Self {
        Self { environment: environment.to_owned(), folders: folders.into_iter().collect() }
    }

    /// The folder and the name that a reference in a text of the folder `home` leads to.
    fn target<'t>(&self, home: &str, reference: &'t str) -> Result<(Place, &'t str), Unresolved> {
        let Some((path, name)) = reference.rsplit_once('.') else { return Ok((Place::Home, reference)) };
        let (environment, folders) = path.split_once('.').unwrap_or((path, ""));
        if environment != self.environment {
            return Err(Unresolved::NotAllowed);
        }
        let folder = format!("/{}", folders.replace('.', "/"));
        if folder == home {
            return Ok((Place::Home, name));
        }
        if self.folders.contains(&folder) { Ok((Place::Elsewhere(folder), name)) } else { Err(Unresolved::NotAllowed) }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Home,
    Elsewhere(String),
}

/// Whether upstream might take any part of this text for a reference.
#[must_use]
pub fn refers(text: &str) -> bool {
    names(text).next().is_some()
}

/// Every name that any reader of this text might take for a reference: servers of different
/// versions disagree about where a reference begins that is inside another.
///
/// The next end is searched once, however many references begin before it. A name that is longer
/// than any valid name is returned as `TOO_LONG`.
pub fn names(text: &str) -> impl Iterator<Item = &str> {
    let (mut at, mut end) = (0, 0);
    let next = move || {
        let start = at + text[at..].find("${")? + 2;
        if end < start {
            end = start + text[start..].find('}')?;
        }
        at = start;
        Some(if end - start > LONGEST_NAME { TOO_LONG } else { trim(&text[start..end]) })
    };
    std::iter::from_fn(next).filter(|name| !name.is_empty())
}

/// The longest reference: a path and a name.
const LONGEST_NAME: usize = 4096;

/// Stands for a name that nothing can have. As it has a dot, it leads to another folder, where the
/// writer has no rights.
const TOO_LONG: &str = ".";

/// Whether a writer with access to these keys of a tenant may write this text to its folder: each
/// reference in it must lead to one of them. A reader of the written secret would read their values
/// too.
#[must_use]
pub fn stay_within(text: &str, reaches: impl Fn(&str) -> bool) -> bool {
    // A name with a dot leads into another folder, or may.
    names(text).all(|name| !name.contains('.') && reaches(name))
}

/// The references that are followed: from `${` to the next `}`, as the recorded server reads them.
fn references(text: &str) -> Vec<(Range<usize>, &str)> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(start) = text[at..].find("${").map(|start| at + start) {
        let Some(end) = text[start..].find('}').map(|end| start + end) else { break };
        let name = trim(&text[start + 2..end]);
        if !name.is_empty() {
            found.push((start..end + 1, name));
        }
        at = end + 1;
    }
    found
}

/// Trims as JavaScript does on the server: the byte order mark too, but not U+0085.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| (c.is_whitespace() && c != '\u{85}') || c == '\u{feff}')
}

/// The texts of one folder by name; `None` for one that exists but cannot be used.
pub type Texts<'a> = HashMap<&'a str, Option<&'a str>>;

/// The folders that texts refer to.
#[derive(Debug, Default)]
pub struct Folders<'a> {
    /// The path of the folder whose texts are resolved.
    pub home: &'a str,
    /// Its texts.
    pub texts: Texts<'a>,
    /// The texts of other folders; `None` for a folder that cannot be read now.
    pub others: BTreeMap<&'a str, Option<Texts<'a>>>,
}

/// A text with its references replaced.
#[derive(Debug)]
pub struct Resolved {
    /// The value; `None` where it refers to a secret that exists but cannot be read now.
    pub value: Option<SecretValue>,
    /// Why a reference in it is not replaced; of several reasons the first.
    pub unresolved: Option<Unresolved>,
    /// Identifies the state of the other folders, where they were read.
    pub others: u64,
}

/// The other folders that are needed for these texts: those that the texts refer to and may refer
/// to. Folders that have been read already are searched as well.
#[must_use]
pub fn folders_needed(rules: &Rules, folders: &Folders<'_>) -> BTreeSet<String> {
    let others = folders.others.iter().filter_map(|(path, texts)| Some((*path, texts.as_ref()?)));
    let all = std::iter::once((folders.home, &folders.texts)).chain(others);
    let texts = all.flat_map(|(path, texts)| texts.values().flatten().map(move |text| (path, *text)));
    let needed = texts.flat_map(|(path, text)| {
        references(text).into_iter().filter_map(move |(_, reference)| match rules.target(path, reference) {
            Ok((Place::Elsewhere(folder), _)) => Some(folder),
            Ok((Place::Home, _)) | Err(_) => None,
        })
    });
    needed.filter(|folder| !folders.others.contains_key(folder.as_str())).collect()
}

/// Replaces the references in every text of the home folder that has any; returns them by name.
///
/// Texts are processed in the order of their dependencies, without recursion. Texts that are left
/// over depend on each other in a cycle, or on a text that does.
#[must_use]
pub fn resolve<'a>(rules: &Rules, folders: &Folders<'a>) -> HashMap<&'a str, Resolved> {
    let mut graph = Graph { rules, folders, nodes: Vec::new(), numbers: HashMap::new(), left: MOST_BYTES };
    let mut home: Vec<&'a str> =
        folders.texts.iter().filter(|(_, text)| text.is_some_and(refers)).map(|(name, _)| *name).collect();
    home.sort_unstable();
    let home: Vec<(&'a str, usize)> =
        home.into_iter().filter_map(|name| Some((name, graph.node(folders.home, name).ok()?))).collect();
    graph.discover();
    graph.settle();
    let resolved = |(name, number): (&'a str, usize)| {
        let node = &graph.nodes[number];
        let value = match &node.state {
            State::Done { value, .. } => Some(value.clone()),
            State::Open | State::Unavailable => None,
        };
        (name, Resolved { value, unresolved: node.unresolved, others: 0 })
    };
    home.into_iter().map(resolved).collect()
}

struct Graph<'r, 'a> {
    rules: &'r Rules,
    folders: &'r Folders<'a>,
    nodes: Vec<Node<'a>>,
    numbers: HashMap<(&'a str, &'a str), usize>,
    /// Bytes that references may still add.
    left: usize,
}

/// A text that refers to another, or that another refers to.
struct Node<'a> {
    folder: &'a str,
    text: &'a str,
    references: Vec<(Range<usize>, Result<usize, Miss>)>,
    state: State,
    unresolved: Option<Unresolved>,
}

enum State {
    /// The text's references have not been resolved yet.
    Open,
    Done {
        value: SecretValue,
        depth: usize,
    },
    /// It refers to a secret that exists but cannot be read now.
    Unavailable,
}

/// Why a reference leads to no node.
#[derive(Debug, Clone, Copy)]
enum Miss {
    Stays(Unresolved),
    Unavailable,
}

impl<'a> Graph<'_, 'a> {
    /// Returns the number of a text's node, which is made where it is missing.
    fn node(&mut self, folder: &'a str, name: &str) -> Result<usize, Miss> {
        let texts = if folder == self.folders.home {
            &self.folders.texts
        } else {
            let texts = self.folders.others.get(folder).and_then(Option::as_ref);
            texts.ok_or(Miss::Unavailable)?
        };
        let (name, text) = texts.get_key_value(name).ok_or(Miss::Stays(Unresolved::NotThere))?;
        let text = text.ok_or(Miss::Unavailable)?;
        let next = self.nodes.len();
        let number = *self.numbers.entry((folder, *name)).or_insert(next);
        if number == next {
            self.nodes.push(Node { folder, text, references: Vec::new(), state: State::Open, unresolved: None });
        }
        Ok(number)
    }

    /// Finds the texts that each node refers to, and adds their nodes.
    fn discover(&mut self) {
        let mut number = 0;
        while number < self.nodes.len() {
            let Node { folder, text, .. } = self.nodes[number];
            let found = references(text);
            let mut led = Vec::with_capacity(found.len());
            for (count, (range, reference)) in found.into_iter().enumerate() {
                let target = match self.rules.target(folder, reference) {
                    _ if count >= MOST_REFERENCES => Err(Miss::Stays(Unresolved::TooLong)),
                    Ok((Place::Home, name)) => self.node(folder, name),
                    Ok((Place::Elsewhere(other), name)) => match self.folder(&other) {
                        Some(other) => self.node(other, name),
                        None => Err(Miss::Unavailable),
                    },
                    Err(unresolved) => Err(Miss::Stays(unresolved)),
                };
                led.push((range, target));
            }
            self.nodes[number].references = led;
            number += 1;
        }
    }

    fn folder(&self, path: &str) -> Option<&'a str> {
        if path == self.folders.home {
            return Some(self.folders.home);
        }
        self.folders.others.get_key_value(path).map(|(path, _)| *path)
    }

    fn settle(&mut self) {
        let mut waiting = vec![0_usize; self.nodes.len()];
        let mut dependents = vec![Vec::new(); self.nodes.len()];
        for (number, node) in self.nodes.iter().enumerate() {
            let targets: BTreeSet<usize> = node.references.iter().filter_map(|(_, target)| target.ok()).collect();
            waiting[number] = targets.len();
            for target in targets {
                dependents[target].push(number);
            }
        }
        let mut ready: VecDeque<usize> = (0..self.nodes.len()).filter(|number| waiting[*number] == 0).collect();
        while let Some(number) = ready.pop_front() {
            self.nodes[number].state = self.fill_in(number);
            for dependent in &dependents[number] {
                waiting[*dependent] -= 1;
                if waiting[*dependent] == 0 {
                    ready.push_back(*dependent);
                }
            }
        }
        // Each separately: the result of one of them is not inserted into another.
        let left: Vec<usize> = (0..self.nodes.len()).filter(|number| waiting[*number] > 0).collect();
        let states: Vec<State> = left.iter().map(|number| self.fill_in(*number)).collect();
        for (number, state) in left.into_iter().zip(states) {
            self.nodes[number].state = state;
        }
    }

    /// Returns the state of a node; the values of the texts that it refers to must be known.
    fn fill_in(&mut self, number: usize) -> State {
        let (mut pieces, mut depth, mut unresolved) = (Vec::new(), 0, None);
        let node = &self.nodes[number];
        for (range, target) in &node.references {
            let stays = match target {
                Err(Miss::Unavailable) => return State::Unavailable,
                Err(Miss::Stays(unresolved)) => *unresolved,
                Ok(target) => match &self.nodes[*target].state {
                    State::Unavailable => return State::Unavailable,
                    State::Open => Unresolved::Cycle,
                    State::Done { depth: below, .. } if *below >= DEEPEST => Unresolved::TooDeep,
                    State::Done { value, depth: below } => {
                        depth = depth.max(below + 1);
                        pieces.push((range.clone(), value.clone()));
                        continue;
                    }
                },
            };
            unresolved = unresolved.or(Some(stays));
        }
        let length = |pieces: &[(Range<usize>, SecretValue)]| {
            let replaced = pieces.iter().map(|(range, _)| range.len()).sum::<usize>();
            let added = pieces.iter().fold(0_usize, |sum, (_, value)| sum.saturating_add(value.len()));
            (node.text.len() - replaced).saturating_add(added)
        };
        // A text that is too long by itself is left as it is.
        if !pieces.is_empty() && (length(&pieces) > LONGEST || length(&pieces) > self.left) {
            pieces.clear();
            (depth, unresolved) = (0, Some(Unresolved::TooLong));
        }
        let length = length(&pieces);
        let mut value = String::with_capacity(length);
        let mut at = 0;
        for (range, piece) in &pieces {
            value.push_str(&node.text[at..range.start]);
            value.push_str(piece.expose());
            at = range.end;
        }
        value.push_str(&node.text[at..]);
        if !pieces.is_empty() {
            self.left -= length;
        }
        self.nodes[number].unresolved = unresolved;
        State::Done { value: SecretValue::new(value), depth }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOME: &str = "/tenants/acme";

    fn rules() -> Rules {
        Rules::new("prod", ["/shared".to_owned(), "/shared/deep".to_owned()])
    }

    fn folders<'a>(texts: &[(&'a str, &'a str)], shared: Option<&[(&'a str, &'a str)]>) -> Folders<'a> {
        let of = |texts: &[(&'a str, &'a str)]| texts.iter().map(|(name, text)| (*name, Some(*text))).collect();
        Folders { home: HOME, texts: of(texts), others: BTreeMap::from([("/shared", shared.map(of))]) }
    }

    fn value(texts: &[(&str, &str)], name: &str) -> (String, Option<Unresolved>) {
        let folders = folders(
            texts,
            Some(&[("HOST", "db.internal"), ("URL", "x://${HOST}/${ HOST }"), ("OUT", "${prod.tenants.globex.KEY}")]),
        );
        let Resolved { value, unresolved, .. } =
            resolve(&rules(), &folders).remove(name).expect("it refers to something");
        (value.expect("all is at hand").expose().to_owned(), unresolved)
    }

    #[test]
    fn own_names_are_replaced_wherever_they_stand_and_however_they_lead_on() {
        let texts = [("A", "a"), ("EMPTY", ""), ("B", "<${A}>"), ("C", "${B}${ A }${EMPTY}!"), ("D", "é${C}é")];
        assert_eq!(value(&texts, "D"), ("é<a>a!é".to_owned(), None));
        assert_eq!(
            value(&[("A", "x"), ("B", "${prod.tenants.acme.A}")], "B"),
            ("x".to_owned(), None),
            "by its own path"
        );
    }

    #[test]
    fn text_that_came_in_by_a_reference_is_not_looked_at_again() {
        let texts = [("A", "{SECRET}"), ("B", "$${A}"), ("SECRET", "s"), ("C", "$"), ("D", "${C}{SECRET}")];
        assert_eq!(value(&texts, "B"), ("${SECRET}".to_owned(), None));
        assert_eq!(value(&texts, "D"), ("${SECRET}".to_owned(), None));
        assert_eq!(value(&[("A", "$& $1 $$ $`"), ("B", "[${A}]")], "B"), ("[$& $1 $$ $`]".to_owned(), None));
    }

    #[test]
    fn other_folders_are_reached_only_where_the_configuration_allows_it() {
        assert_eq!(value(&[("A", "${prod.shared.HOST}")], "A"), ("db.internal".to_owned(), None));
        assert_eq!(value(&[("A", "${prod.shared.URL}")], "A").0, "x://db.internal/db.internal");
        for text in [
            "${dev.shared.HOST}",
            "${prod.HOST}",
            "${prod.tenants.globex.KEY}",
            "${prod.tenants.acme.deeper.KEY}",
            "${prod.hono-api.MASTER_ENCRYPTION_KEY}",
            "${prod.shared.other.KEY}",
            "${prod..HOST}",
            "${.shared.HOST}",
            "${prod.shared/../tenants/globex.KEY}",
            "${prod/shared.HOST}",
        ] {
            assert_eq!(value(&[("A", text)], "A"), (text.to_owned(), Some(Unresolved::NotAllowed)), "{text}");
        }
        let inner = "${prod.tenants.globex.KEY}".to_owned();
        assert_eq!(value(&[("A", "${prod.shared.OUT}")], "A"), (inner, None), "nor from a folder that is allowed");
        assert_eq!(value(&[("A", "${prod.shared.NONE}")], "A").1, Some(Unresolved::NotThere));
    }

    #[test]
    fn what_leads_nowhere_or_back_to_itself_stays_as_it_is_written() {
        assert_eq!(value(&[("A", "pa${NONE}ss")], "A"), ("pa${NONE}ss".to_owned(), Some(Unresolved::NotThere)));
        for name in ["A", "B", "C", "SELF"] {
            let texts = [("A", "1${B}"), ("B", "2${A}${X}"), ("C", "3${A}"), ("X", "x"), ("SELF", "${SELF}")];
            let (value, unresolved) = value(&texts, name);
            let expected = match name {
                "A" => "1${B}",
                "B" => "2${A}x",
                "C" => "3${A}",
                _ => "${SELF}",
            };
            assert_eq!((value.as_str(), unresolved), (expected, Some(Unresolved::Cycle)), "{name}");
        }
    }

    #[test]
    fn odd_texts_are_no_references() {
        for text in ["${", "$ {A}", "${}", "${ }", "${A", "$${", "{A}", "$A", "}${"] {
            let folders = folders(&[("A", "a"), ("B", text)], None);
            assert!(!resolve(&rules(), &folders).contains_key("B"), "{text}");
        }
        assert_eq!(value(&[("A", "a"), ("B", "${A${A}}")], "B"), ("${A${A}}".to_owned(), Some(Unresolved::NotThere)));
        assert_eq!(names("${A${B}} ${ C}").collect::<Vec<_>>(), ["A${B", "B", "C"], "by any reading");
    }

    #[test]
    fn however_many_begin_and_none_ends_a_text_is_looked_through_once() {
        let open = "${".repeat(1 << 19);
        assert!(!refers(&open));
        assert!(stay_within(&open, |_| false));
        let late = format!("{open}}}");
        assert_eq!(names(&late).count(), (1 << 19) - 1, "the last one is empty");
        assert!(!stay_within(&late, |_| true), "nothing is named so");
        let blank = format!("${{{}}}", " ".repeat(1 << 20));
        assert!(!stay_within(&blank, |_| true));
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let names: Vec<String> = (0..60).map(|level| format!("L{level}")).collect();
        let doubled: Vec<String> = (0..60).map(|level| format!("${{L{0}}}${{L{0}}}", level + 1)).collect();
        let long = "x".repeat(1000);
        let mut texts: Vec<(&str, &str)> =
            names.iter().zip(&doubled).map(|(name, text)| (name.as_str(), text.as_str())).collect();
        texts.push(("L60", &long));
        let folders = folders(&texts, None);
        let resolved = resolve(&rules(), &folders);
        let total: usize = resolved.values().map(|one| one.value.as_ref().unwrap().len()).sum();
        assert!(total <= MOST_BYTES + 60 * 20, "{total}");
        assert!(resolved.values().all(|one| one.value.as_ref().unwrap().len() <= LONGEST));
        assert!(resolved.values().any(|one| one.unresolved == Some(Unresolved::TooLong)));

        let chain: Vec<String> = (0..60).map(|level| format!("${{L{}}}", level + 1)).collect();
        let mut texts: Vec<(&str, &str)> =
            names.iter().zip(&chain).map(|(name, text)| (name.as_str(), text.as_str())).collect();
        texts.push(("L60", "end"));
        let folders = super::tests::folders(&texts, None);
        let resolved = resolve(&rules(), &folders);
        let of = |name: &str| resolved[name].value.as_ref().unwrap().expose().to_owned();
        assert_eq!(of("L44"), "end");
        assert_eq!((of("L43").as_str(), resolved["L43"].unresolved), ("${L44}", Some(Unresolved::TooDeep)));

        let many = "${A}".repeat(MOST_REFERENCES + 1);
        let (value, unresolved) = value(&[("A", "a"), ("B", &many)], "B");
        assert_eq!(value, format!("{}${{A}}", "a".repeat(MOST_REFERENCES)));
        assert_eq!(unresolved, Some(Unresolved::TooLong));
    }

    #[test]
    fn what_is_there_and_cannot_be_read_is_neither_text_nor_value() {
        let folders = folders(&[("A", "${prod.shared.HOST}"), ("B", "[${A}]"), ("C", "${D}")], None);
        let mut folders = folders;
        folders.texts.insert("D", None);
        let resolved = resolve(&rules(), &folders);
        assert!(["A", "B", "C"].iter().all(|name| resolved[name].value.is_none()));
    }

    #[test]
    fn the_folders_that_are_needed_are_those_that_may_be_referred_to() {
        let texts = [("A", "${prod.shared.URL}${dev.shared.X}${B}"), ("B", "${prod.other.X}")];
        let mut folders = Folders { home: HOME, ..folders(&texts, None) };
        folders.others.clear();
        assert_eq!(folders_needed(&rules(), &folders), BTreeSet::from(["/shared".to_owned()]));
        folders.others.insert("/shared", Some(HashMap::from([("URL", Some("${prod.shared.deep.X}"))])));
        assert_eq!(folders_needed(&rules(), &folders), BTreeSet::from(["/shared/deep".to_owned()]));
    }

    fn piece() -> impl Strategy<Value = String> {
        let names = prop::sample::select(vec![
            "A",
            "B",
            "C",
            "D",
            "E",
            "NONE",
            "prod.shared.HOST",
            "dev.x.Y",
            "prod.tenants.globex.KEY",
        ]);
        prop_oneof![
            4 => names.prop_map(|name| format!("${{{name}}}")),
            2 => prop::sample::select(vec!["${", "}", "$", "{", "$&", "$$", " ", "é", "\u{feff}", ".", "${}", "${ A }"]).prop_map(str::to_owned),
            1 => "[a-z]{0,4}",
        ]
    }

    proptest! {
        /// No text makes this panic or run on, and a value contains only data from its own text,
        /// its folder and the allowed folders.
        #[test]
        fn whatever_the_texts_are_only_what_they_may_reach_comes_in(
            texts in prop::collection::vec(prop::collection::vec(piece(), 0..6).prop_map(|pieces| pieces.concat()), 5)
        ) {
            let names = ["A", "B", "C", "D", "E"];
            let texts: Vec<(&str, &str)> = names.into_iter().zip(texts.iter().map(String::as_str)).collect();
            let folders = folders(&texts, Some(&[("HOST", "shared-host")]));
            let resolved = resolve(&rules(), &folders);
            for (name, text) in &texts {
                prop_assert_eq!(resolved.contains_key(name), refers(text));
            }
            for one in resolved.values() {
                let value = one.value.as_ref().unwrap().expose();
                if one.unresolved.is_none() && !value.contains("${") {
                    prop_assert!(!value.contains("NONE") && !value.contains("globex"));
                }
            }
            // The order in which texts are processed changes nothing.
            let again = resolve(&rules(), &folders);
            for (name, one) in &resolved {
                prop_assert!(one.value.as_ref().unwrap().same_as(again[name].value.as_ref().unwrap()));
            }
        }
    }
}
