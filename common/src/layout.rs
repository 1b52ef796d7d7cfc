//! `Layout`: where the blocks of a file lie in it.
//!
//! Every block has the file's block size, but the last one, and those named as shorter: what a Hadoop client appended to, ended early, or joined. Used by the
//! master (locations, completion), by tokens (what a block covers), by clients. Invariant: it is the one place that turns a block's number into an offset.

/// The blocks of a file, or of its end from some block on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout<'a> {
    /// Bytes of a block that is not shorter.
    pub block_size_bytes: u64,
    /// Bytes of them all.
    pub length_bytes: u64,
    /// Number and length of each block that is shorter and not the last, ascending: number, length, number, length…
    pub short: &'a [u64],
}

impl<'a> Layout<'a> {
    fn shorts(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.short.chunks_exact(2).map(|pair| (pair[0], pair[1]))
    }

    /// Where block `index` begins; beyond the end that is where it would.
    pub fn offset(self, index: u64) -> u64 {
        let missing = self.shorts().take_while(|(i, _)| *i < index).map(|(_, length)| self.block_size_bytes.saturating_sub(length));
        index.saturating_mul(self.block_size_bytes).saturating_sub(missing.fold(0, u64::saturating_add))
    }

    /// Offset and length of block `index`; 0 bytes beyond the end.
    pub fn span(self, index: u64) -> (u64, u64) {
        let offset = self.offset(index);
        let most = self.shorts().find(|(i, _)| *i == index).map_or(self.block_size_bytes, |(_, length)| length);
        (offset, self.length_bytes.saturating_sub(offset).min(most))
    }

    /// The block that has the byte at `offset`, and where that block begins.
    pub fn block_at(self, offset: u64) -> (u64, u64) {
        let size = self.block_size_bytes.max(1);
        let (mut first, mut start) = (0, 0);
        for (index, length) in self.shorts() {
            // The blocks before it are of full size.
            let short = start + (index - first) * size;
            if offset < short {
                break;
            }
            if offset < short + length {
                return (index, short);
            }
            (first, start) = (index + 1, short + length);
        }
        let ahead = offset.saturating_sub(start) / size;
        (first + ahead, start + ahead * size)
    }

    /// How many blocks there are.
    pub fn count(self) -> u64 {
        match self.length_bytes.checked_sub(1) {
            Some(last) => self.block_at(last).0 + 1,
            None => 0,
        }
    }

    /// Offset and length of every block, in order.
    pub fn spans(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        let (mut offset, mut shorts) = (0, self.shorts().peekable());
        (0..self.count()).map(move |index| {
            let most = shorts.next_if(|(i, _)| *i == index).map_or(self.block_size_bytes, |(_, length)| length);
            let span = (offset, self.length_bytes.saturating_sub(offset).min(most));
            offset += span.1;
            span
        })
    }
}

/// The list of `Layout::short` for blocks of these lengths; the last one may be of any. `None`: one has no bytes, or too many.
pub fn shorter_than(block_size_bytes: u64, lengths: &[u64]) -> Option<Vec<u64>> {
    let mut short = Vec::new();
    for (i, length) in lengths.iter().enumerate() {
        if *length == 0 || *length > block_size_bytes {
            return None;
        }
        if *length < block_size_bytes && i + 1 < lengths.len() {
            short.extend([i as u64, *length]);
        }
    }
    Some(short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the plain list of lengths.
        #[test]
        fn it_is_what_adding_up_says(lengths in proptest::collection::vec(1u64..=10, 0..20)) {
            let short = shorter_than(10, &lengths).unwrap();
            let layout = Layout { block_size_bytes: 10, length_bytes: lengths.iter().sum(), short: &short };
            let mut spans = Vec::new();
            for length in &lengths {
                spans.push((spans.last().map_or(0, |(o, l): &(u64, u64)| o + l), *length));
            }
            prop_assert_eq!(layout.count(), lengths.len() as u64);
            prop_assert_eq!(layout.spans().collect::<Vec<_>>(), spans.clone());
            for (i, span) in spans.iter().enumerate() {
                prop_assert_eq!(layout.span(i as u64), *span);
                for byte in span.0..span.0 + span.1 {
                    prop_assert_eq!(layout.block_at(byte), (i as u64, span.0));
                }
            }
            prop_assert_eq!(layout.span(lengths.len() as u64 + 1).1, 0);
        }
    }
}
