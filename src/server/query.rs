//! A request's query: which parameters there are.

use super::respond::Problem;

/// The parameters of a request, each one that its route knows. A mistyped one is refused: the
/// answer must not be taken for what it would have asked for, least of all after a change.
pub(super) struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    /// The query of a request without parameters.
    pub(super) const NONE: Self = Self(Vec::new());

    /// Parses a query of a route that knows these parameters.
    pub(super) fn parse(query: Option<&'a str>, known: &[&str]) -> Result<Self, Problem> {
        let mut found = Self::NONE;
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !known.contains(&name) {
                return Err(Problem::invalid_query(match known {
                    [] => "this request takes no parameters".to_owned(),
                    [only] => format!("the only parameter here is {only}"),
                    [first @ .., last] => format!("the parameters here are {} and {last}", first.join(", ")),
                }));
            }
            if found.get(name).is_some() {
                return Err(Problem::invalid_query(format!("{name} stands there twice")));
            }
            found.0.push((name, value));
        }
        Ok(found)
    }

    /// Takes a query as it is, for a route that ignores what it does not know.
    pub(super) fn any(query: Option<&'a str>) -> Self {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        Self(pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect())
    }

    /// Each parameter with its value, as they came.
    pub(super) fn each(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().copied()
    }

    /// A parameter as it came, still percent-encoded.
    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(found, _)| *found == name).map(|(_, value)| *value)
    }
}
