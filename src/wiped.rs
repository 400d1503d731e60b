//! Long content that is wiped when it is dropped.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use zeroize::Zeroize as _;

use crate::long_work::{SHORT, breathe};

/// A text or bytes of any length, wiped when dropped with the spare room behind them. It does what
/// `Zeroizing` does, in parts, so that a thread for long work offers its processor to others in
/// between: a mebibyte takes half a millisecond.
#[derive(Default)]
pub struct Wiped<T: Buffer>(T);

/// A buffer that [`Wiped`] can wipe.
pub trait Buffer: Default + AsRef<[u8]> + Into<Vec<u8>> {}

impl Buffer for String {}
impl Buffer for Vec<u8> {}

impl<T: Buffer> Wiped<T> {
    /// Takes ownership of the buffer, which is not copied.
    pub fn new(buffer: T) -> Self {
        Self(buffer)
    }
}

impl<T: Buffer> Drop for Wiped<T> {
    fn drop(&mut self) {
        let mut bytes: Vec<u8> = std::mem::take(&mut self.0).into();
        // Within its capacity, so it does not move.
        bytes.resize(bytes.capacity(), 0);
        for part in bytes.chunks_mut(SHORT) {
            part.zeroize();
            breathe(part.len());
        }
    }
}

impl<T: Buffer> Deref for Wiped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Buffer> DerefMut for Wiped<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Buffer> AsRef<[u8]> for Wiped<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl<T: Buffer> fmt::Debug for Wiped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wiped").field(&self.0.as_ref().len()).finish()
    }
}
