//! How often something is tried that happens at a moment of chance: a kill, a step, a round.

/// `all` of them, or `few` where `SECRETIER_TEST_QUICK` is set, as `scripts/test quick` does. Every
/// promise is tested either way.
pub(crate) fn times<N>(all: N, few: N) -> N {
    if std::env::var_os("SECRETIER_TEST_QUICK").is_some() { few } else { all }
}
