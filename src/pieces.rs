//! A long answer, made piece by piece while it is sent.

use bytes::Bytes;
use zeroize::Zeroizing;

/// The most bytes of a piece.
pub const PIECE: usize = 64 << 10;

/// Joins the parts of an answer to pieces of at most [`PIECE`] bytes, none of them empty, each when
/// it is asked for. A part is dropped as soon as it is joined; a part that is as long as a piece is
/// passed on in slices of its own bytes. Copied bytes are wiped.
#[derive(Debug)]
pub struct Pieces<I> {
    parts: I,
    /// The rest of the part that is being joined.
    rest: Bytes,
    /// The number of bytes still to come.
    left: u64,
}

impl<I: Iterator<Item = Bytes>> Pieces<I> {
    /// The pieces of these parts, which have so many bytes in total.
    pub fn new(length: u64, parts: I) -> Self {
        Self { parts, rest: Bytes::new(), left: length }
    }

    /// The number of bytes still to come.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Moves on to the next part that has bytes, where this one has none left.
    fn has_more(&mut self) -> bool {
        while self.rest.is_empty() {
            match self.parts.next() {
                Some(part) => self.rest = part,
                None => return false,
            }
        }
        true
    }

    fn joined(&mut self) -> Bytes {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE);
        // It never grows: a growing buffer leaves copies of its content behind.
        let mut piece = Zeroizing::new(Vec::with_capacity(room));
        while piece.len() < room && self.has_more() && self.rest.len() < PIECE {
            let some = self.rest.split_to(self.rest.len().min(room - piece.len()));
            piece.extend_from_slice(&some);
        }
        Bytes::from_owner(piece)
    }
}

impl<I: Iterator<Item = Bytes>> Iterator for Pieces<I> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.left == 0 || !self.has_more() {
            return None;
        }
        let piece = if self.rest.len() < PIECE { self.joined() } else { self.rest.split_to(PIECE) };
        self.left = self.left.saturating_sub(piece.len() as u64);
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    struct Part(Vec<u8>, Arc<AtomicUsize>);

    impl AsRef<[u8]> for Part {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Part {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn pieces_are_the_parts_one_after_the_other_whatever_their_lengths() {
        let lengths = [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 7];
        for first in lengths {
            for second in lengths {
                let bytes = |length: usize| (0..length).map(|at| at as u8).collect::<Vec<u8>>();
                let parts = [bytes(first), bytes(0), bytes(second), bytes(5)];
                let whole = parts.concat();
                let mut pieces = Pieces::new(whole.len() as u64, parts.clone().into_iter().map(Bytes::from));
                let mut joined = Vec::new();
                while let Some(piece) = pieces.next() {
                    assert!((1..=PIECE).contains(&piece.len()));
                    joined.extend_from_slice(&piece);
                    assert_eq!(pieces.left(), (whole.len() - joined.len()) as u64);
                }
                assert!(joined == whole, "{first} and {second}");
            }
        }
    }

    #[test]
    fn parts_are_made_as_they_are_taken_and_let_go_of_as_they_are_joined() {
        let held = Arc::new(AtomicUsize::new(0));
        let part = |_| {
            held.fetch_add(1, Ordering::Relaxed);
            Bytes::from_owner(Part(vec![1; 1000], Arc::clone(&held)))
        };
        let mut pieces = Pieces::new(1000 * 1000, (0..1000).map(part));
        assert_eq!(held.load(Ordering::Relaxed), 0, "nothing is made before it is asked for");
        let mut length = 0;
        for piece in &mut pieces {
            length += piece.len();
            assert!(held.load(Ordering::Relaxed) <= 1);
        }
        assert_eq!((length, held.load(Ordering::Relaxed)), (1000 * 1000, 0));
    }

    #[test]
    fn a_part_that_is_longer_than_a_piece_is_not_copied() {
        let large = Bytes::from(vec![7; 10 * PIECE]);
        let parts = [Bytes::from_static(b"{"), large.clone(), Bytes::from_static(b"}")];
        let pieces: Vec<Bytes> = Pieces::new(large.len() as u64 + 2, parts.into_iter()).collect();
        let within = large.as_ptr_range();
        assert!(pieces[1..11].iter().all(|piece| within.contains(&piece.as_ptr())));
        assert_eq!(pieces.len(), 12);
    }
}
