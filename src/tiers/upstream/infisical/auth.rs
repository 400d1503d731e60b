//! Universal auth: one token for all calls, one login at a time.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::super::{Cause, UpstreamError};
use crate::clock::{Clock, Moment};

/// The pause after the first refused login; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// Newer servers lock an identity for as long as this after three refused logins.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// The pause after a login that something else answered: every lookup would make another.
const ELSEWHERE_PAUSE: Duration = Duration::from_secs(10);
/// How long a refusal of a brand-new token proves that logging in again is of no use.
const REFUSAL_HOLDS: Duration = Duration::from_secs(30);

/// The token that calls carry, and the way to get a newer one.
///
/// Tokens are numbered as they are obtained, and a caller asks for one *newer than the one it was
/// refused with* (0: any). A caller never says "throw the token away", because that would go wrong:
/// A and B are refused with token 1; A logs in and gets 2; B, which learns of its refusal only now,
/// throws away "the token", which is 2, and logs in for 3; A's next call is still on its way with
/// 2, and so on: 200 callers make 200 logins. With numbers B asks for newer than 1 and is given 2.
///
/// Two callers that both find nothing newer meet at `gate`. The second one checks again once inside
/// and finds the token that the first obtained, so an expired token costs one login however many
/// callers notice. A caller that is cancelled inside leaves the gate open and the old token in
/// place; the next one inside starts over. A token is replaced only by a newer one, stored while
/// holding the gate, so numbers never go back.
pub(super) struct Auth {
    clock: Clock,
    current: Mutex<Option<Arc<Token>>>,
    gate: tokio::sync::Mutex<Refusals>,
    refused_when_new: Mutex<Option<(u64, Duration)>>,
}

/// An access token.
pub(super) struct Token {
    number: u64,
    /// By both clocks: it ends by the wall clock, and a step of that clock makes it no younger.
    usable_until: Moment,
    header: HeaderValue,
}

/// The result of a login.
pub(super) enum Login {
    /// A token.
    Granted {
        /// The token itself.
        token: Zeroizing<String>,
        /// How long it is valid from the time of the request; zero means for ever.
        lasts: Duration,
    },
    /// It is refused.
    Refused(Cause),
    /// Something else answered: the credentials were neither accepted nor refused.
    Elsewhere(UpstreamError),
}

/// The number of consecutive refused logins, and until when none is tried.
#[derive(Default)]
struct Refusals {
    count: u32,
    until: Option<Duration>,
    /// The error until then.
    error: Option<UpstreamError>,
}

impl Auth {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            current: Mutex::default(),
            gate: tokio::sync::Mutex::default(),
            refused_when_new: Mutex::default(),
        }
    }

    /// Returns a token newer than number `newer_than`; `login` is run only if there is none.
    pub(super) async fn token(
        &self,
        newer_than: u64,
        login: impl Future<Output = Result<Login, UpstreamError>>,
    ) -> Result<Arc<Token>, UpstreamError> {
        if let Some(token) = self.usable(newer_than) {
            return Ok(token);
        }
        let mut refusals = self.gate.lock().await;
        if let Some(token) = self.usable(newer_than) {
            return Ok(token);
        }
        let asked_at = self.clock.moment();
        if let Some(left) = refusals.until.and_then(|until| until.checked_sub(asked_at.running()))
            && !left.is_zero()
        {
            return Err(match &refusals.error {
                Some(UpstreamError::LoginRefused { cause, .. }) => {
                    UpstreamError::LoginRefused { cause: *cause, retry_after: left }
                }
                Some(error) => error.clone(),
                None => UpstreamError::LoginRefused { cause: Cause::LoginRefused, retry_after: left },
            });
        }
        match login.await? {
            Login::Granted { token, lasts } => {
                *refusals = Refusals::default();
                self.store(&token, asked_at, lasts)
            }
            Login::Refused(cause) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << refusals.count.min(8)).min(LONGEST_PAUSE);
                refusals.count += 1;
                refusals.until = Some(self.clock.running() + pause);
                let error = UpstreamError::LoginRefused { cause, retry_after: pause };
                refusals.error = Some(error.clone());
                Err(error)
            }
            Login::Elsewhere(error) => {
                refusals.until = Some(self.clock.running() + ELSEWHERE_PAUSE);
                refusals.error = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Remembers that a call was refused with `token` although it was brand-new: the call itself is
    /// refused, and for a while no login is spent on finding that out again.
    pub(super) fn refused_when_new(&self, token: &Token) {
        *lock(&self.refused_when_new) = Some((token.number, self.clock.running() + REFUSAL_HOLDS));
    }

    /// Whether [`Self::refused_when_new`] was called for this token a short while ago.
    pub(super) fn was_refused_when_new(&self, token: &Token) -> bool {
        let now = self.clock.running();
        lock(&self.refused_when_new).is_some_and(|(number, until)| number == token.number && now < until)
    }

    fn usable(&self, newer_than: u64) -> Option<Arc<Token>> {
        let now = self.clock.moment();
        let is_usable = |token: &&Arc<Token>| token.number > newer_than && now.is_before(token.usable_until);
        lock(&self.current).as_ref().filter(is_usable).cloned()
    }

    fn store(&self, token: &str, asked_at: Moment, lasts: Duration) -> Result<Arc<Token>, UpstreamError> {
        // Replaced a little early, so that it does not expire on the way.
        let lasts = if lasts.is_zero() { Duration::from_secs(24 * 3600) } else { lasts };
        let early = (lasts / 10).min(Duration::from_secs(30));
        let header = Zeroizing::new([b"Bearer ", token.as_bytes()].concat());
        let mut header = HeaderValue::from_maybe_shared(Bytes::from_owner(header))
            .map_err(|_| UpstreamError::Malformed("the access token cannot be sent in a header"))?;
        header.set_sensitive(true);

        let mut current = lock(&self.current);
        let number = current.as_ref().map_or(1, |token| token.number + 1);
        let token = Arc::new(Token { number, usable_until: asked_at.plus(lasts - early), header });
        *current = Some(Arc::clone(&token));
        Ok(token)
    }
}

impl Token {
    /// Its number, to ask for a newer one.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The value of the header `Authorization`, wiped when the last copy is dropped.
    pub(super) fn header(&self) -> HeaderValue {
        self.header.clone()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("number", &self.number).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    async fn granted(logins: &AtomicU32, lasts: u64) -> Result<Login, UpstreamError> {
        tokio::task::yield_now().await;
        let number = logins.fetch_add(1, Ordering::Relaxed);
        Ok(Login::Granted { token: Zeroizing::new(format!("token-{number}")), lasts: Duration::from_secs(lasts) })
    }

    #[tokio::test]
    async fn two_hundred_callers_with_a_refused_token_make_one_login() {
        let auth = Auth::new(Clock::system());
        let logins = AtomicU32::new(0);
        for round in 1..=3 {
            let callers = (0..200).map(|_| auth.token(round - 1, granted(&logins, 3600)));
            for token in futures_util::future::join_all(callers).await {
                assert_eq!(token.unwrap().number(), round);
            }
            assert_eq!(u64::from(logins.load(Ordering::Relaxed)), round);
        }
        let late = auth.token(1, granted(&logins, 3600)).await.unwrap();
        assert_eq!(late.number(), 3, "who was refused with an old token gets the newest");
        assert_eq!(logins.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_token_is_given_up_shortly_before_its_end() {
        let clock = Clock::system();
        let auth = Auth::new(clock.clone());
        let logins = AtomicU32::new(0);
        auth.token(0, granted(&logins, 600)).await.unwrap();
        clock.advance(Duration::from_secs(560));
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 1);
        clock.advance(Duration::from_secs(15));
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 2);
    }

    #[tokio::test]
    async fn a_token_ends_by_either_clock_and_a_refused_login_is_left_alone_by_the_running_one() {
        let clock = Clock::system();
        let auth = Auth::new(clock.clone());
        let logins = AtomicU32::new(0);
        auth.token(0, granted(&logins, 600)).await.unwrap();
        clock.step(-3_600_000);
        clock.advance(Duration::from_secs(560));
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 1);
        clock.advance(Duration::from_secs(15));
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 2, "no younger by a step back");
        clock.step(3_600_000);
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 3);

        auth.token(3, async { Ok(Login::Refused(Cause::LoginRefused)) }).await.expect_err("refused");
        for step in [3_600_000, -3_600_000] {
            clock.step(step);
            let again = auth.token(3, async { unreachable!("a login was made") }).await;
            assert!(matches!(again, Err(UpstreamError::LoginRefused { .. })), "{again:?}");
        }
        clock.advance(FIRST_PAUSE);
        assert_eq!(auth.token(3, granted(&logins, 600)).await.unwrap().number(), 4);
    }

    #[tokio::test]
    async fn a_caller_that_is_cancelled_while_logging_in_leaves_the_way_free() {
        let auth = Auth::new(Clock::system());
        let logins = AtomicU32::new(0);
        let lost = auth.token(0, std::future::pending());
        assert!(tokio::time::timeout(Duration::from_millis(1), lost).await.is_err());
        assert_eq!(auth.token(0, granted(&logins, 600)).await.unwrap().number(), 1);
    }

    #[tokio::test]
    async fn a_refused_login_is_left_alone_for_longer_and_longer() {
        let clock = Clock::system();
        let auth = Auth::new(clock.clone());
        for pause in [60, 120, 240, 300, 300] {
            let error = auth.token(0, async { Ok(Login::Refused(Cause::LoginRefused)) }).await.expect_err("refused");
            assert_eq!(error.retry_after(), Some(Duration::from_secs(pause)));
            clock.advance(Duration::from_secs(pause - 1));
            let again = auth.token(0, async { unreachable!("a login was made") }).await;
            assert!(matches!(again, Err(UpstreamError::LoginRefused { .. })), "{again:?}");
            clock.advance(Duration::from_secs(1));
        }
        let logins = AtomicU32::new(0);
        auth.token(0, granted(&logins, 600)).await.unwrap();
    }

    #[tokio::test]
    async fn a_token_is_absent_from_debug() {
        let auth = Auth::new(Clock::system());
        let token = auth.token(0, granted(&AtomicU32::new(7), 600)).await.unwrap();
        assert!(!format!("{token:?} {:?}", token.header()).contains("token-7"));
    }
}
