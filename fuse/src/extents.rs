//! `Extents`: which bytes of a file were written since it was loaded, so that they can be laid over another content of it.
//!
//! Kept by `staged`. Invariants: the ranges are in order, and no two touch; once a file was cut, all of it counts as written.

use forebay_common::{Result, err};
use std::ops::Range;

/// Parts that are told apart.
const EXTENTS_MAX: usize = 4_096;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    ranges: Vec<Range<u64>>,
    all: bool,
    too_many: bool,
}

impl Extents {
    /// These bytes were written.
    pub fn add(&mut self, range: Range<u64>) {
        if self.all || self.too_many || range.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|other| other.end < range.start);
        let end = self.ranges.partition_point(|other| other.start <= range.end);
        let mut whole = range;
        if let Some(touched) = self.ranges.get(first..end).filter(|touched| !touched.is_empty()) {
            whole = whole.start.min(touched[0].start)..whole.end.max(touched[touched.len() - 1].end);
        }
        self.ranges.splice(first..end.max(first), [whole]);
        self.too_many = self.ranges.len() > EXTENTS_MAX;
    }

    /// The file as a whole is another one.
    pub fn add_all(&mut self) {
        *self = Extents { all: true, ..Extents::default() };
    }

    /// What was written; `None`: all of it. Errors: `LimitExceeded`, more parts than are told apart.
    pub fn ranges(&self) -> Result<Option<&[Range<u64>]>> {
        match self.too_many {
            true => Err(err!(
                LimitExceeded,
                "more than {EXTENTS_MAX} parts of a file were written under a lock since it was handed over last: fsync more often"
            )
            .with_retryable(false)),
            false => Ok((!self.all).then_some(&self.ranges)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Beside a model that knows each byte.
        #[test]
        fn they_are_what_was_written(writes in prop::collection::vec((0u64..100, 0u64..20), 0..60)) {
            let (mut extents, mut model) = (Extents::default(), [false; 128]);
            for (at, length) in writes {
                extents.add(at..at + length);
                model[at as usize..(at + length) as usize].fill(true);
                let ranges = extents.ranges().unwrap().unwrap();
                let mut seen = [false; 128];
                ranges.iter().for_each(|range| seen[range.start as usize..range.end as usize].fill(true));
                prop_assert_eq!(seen, model);
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", ranges);
            }
        }
    }
}
