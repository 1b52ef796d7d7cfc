//! How far ahead of a sequential reader bytes are asked for. Used by `FileReader` and `Pieces`.
//!
//! A reader that may stop anywhere begins with little and is trusted with twice as much each time it has used what was
//! asked for; one that jumps away from bytes asked for and not read loses trust, and has nothing fetched ahead until it
//! reads on from where it jumped to. A reader whose range is known has the whole window at once.

use std::ops::Range;

/// What an unknown reader begins with.
const FIRST_BYTES: u64 = 1 << 20;
/// The window is filled up in steps of this size, so that workers have as many ranges under way as fit.
const STEP_BYTES: u64 = 4 << 20;

pub struct Window {
    /// Where the reader's next read is expected.
    next: u64,
    /// All before it was asked for, or read.
    asked_to: u64,
    size: u64,
    max: u64,
}

impl Window {
    /// Of a reader at the beginning of a file, which may read all of it or a line.
    pub fn growing(max: u64) -> Window {
        Window { next: 0, asked_to: 0, size: FIRST_BYTES.min(max), max }
    }

    /// Of a reader that will read everything from `start` on.
    pub fn whole(start: u64, max: u64) -> Window {
        Window { next: start, asked_to: start, size: max, max }
    }

    /// Takes note of a read of `length` bytes at `position`, and returns what to ask for behind it, up to `end`.
    pub fn advance(&mut self, position: u64, length: u64, end: u64) -> Option<Range<u64>> {
        let jumped = position != self.next;
        let unread = self.asked_to.saturating_sub(self.next);
        self.next = position.saturating_add(length);
        if jumped {
            if unread > 0 {
                self.size = (self.size / 4).max(FIRST_BYTES.min(self.max));
            }
            self.asked_to = self.next;
            return None;
        }
        self.asked_to = self.asked_to.max(self.next);
        let step = STEP_BYTES.min(self.size / 2);
        if self.asked_to > self.next.saturating_add(self.size.saturating_sub(step)) {
            return None;
        }
        let range = self.asked_to..self.next.saturating_add(self.size).min(end);
        if range.is_empty() {
            return None;
        }
        self.asked_to = range.end;
        self.size = (self.size * 2).min(self.max);
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn grows_while_it_is_used() {
        let mut window = Window::growing(16 * MIB);
        let mut sizes = Vec::new();
        for i in 0..64 {
            sizes.extend(window.advance(i * MIB, MIB, u64::MAX).map(|r| (r.end - (i + 1) * MIB) / MIB));
        }
        assert_eq!(sizes[..5], [1, 2, 4, 8, 16]);
        assert_eq!(sizes.iter().max(), Some(&16));
    }

    #[test]
    fn a_known_range_is_kept_full_in_steps() {
        let mut window = Window::whole(0, 16 * MIB);
        let asked: Vec<_> = (0..32).filter_map(|i| window.advance(i * MIB, MIB, 100 * MIB)).collect();
        assert_eq!(asked[0], MIB..17 * MIB);
        assert!(asked[1..].iter().all(|r| r.end - r.start == 4 * MIB));
        assert!(asked.windows(2).all(|w| w[0].end == w[1].start));
    }

    #[test]
    fn nothing_is_asked_for_behind_random_reads() {
        let mut window = Window::growing(16 * MIB);
        for i in 1..100u64 {
            assert_eq!(window.advance((i * 7919) % 1000 * 4 * MIB + MIB, 4096, u64::MAX), None);
        }
    }

    #[test]
    fn a_jump_away_costs_trust() {
        let mut window = Window::growing(16 * MIB);
        (0..32).for_each(|i| {
            let _ = window.advance(i * MIB, MIB, u64::MAX);
        });
        assert_eq!(window.advance(500 * MIB, MIB, u64::MAX), None);
        assert_eq!(window.advance(501 * MIB, MIB, u64::MAX), Some(502 * MIB..506 * MIB));
    }

    proptest::proptest! {
        /// Never beyond the end or the window, never the same byte twice in one run of reads.
        #[test]
        fn stays_in_bounds(reads in proptest::collection::vec((proptest::bool::weighted(0.1), 1u64..3_000_000), 1..200), max in 0u64..40_000_000) {
            let end = 100_000_000;
            let mut window = Window::growing(max);
            let (mut at, mut asked) = (0u64, 0u64);
            for (jump, length) in reads {
                if jump {
                    at = (at * 31 + 12_345) % end;
                    asked = 0;
                }
                if let Some(range) = window.advance(at, length, end) {
                    proptest::prop_assert!(range.start >= at + length && range.start >= asked);
                    proptest::prop_assert!(range.end <= end && range.end <= at + length + max);
                    asked = range.end;
                }
                at += length;
            }
        }
    }
}
