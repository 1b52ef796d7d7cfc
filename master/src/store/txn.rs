//! `Txn`: the writes of one journal entry, laid over the store, in order, all or nothing.
//!
//! Each command sees what the commands before it in the same entry have done. A command that fails leaves nothing.
//! `commit` writes one batch, carrying how far apply has come, so that a crash leaves whole entries only.

use super::reader::{collect, decode, not_below};
use super::{Cf, Reader, Store, id_key, rocks};
use forebay_common::{Error, Result};
use prost::Message;
use rocksdb::{Direction, IteratorMode, ReadOptions, WriteBatch};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Bound;

type Overlay = BTreeMap<(Cf, Vec<u8>), Option<Vec<u8>>>;

/// The overlay.
pub struct Txn<'a> {
    store: &'a Store,
    done: Overlay,
    current: Overlay,
    failure: RefCell<Option<Error>>,
}

impl<'a> Txn<'a> {
    /// An empty one.
    pub fn new(store: &'a Store) -> Self {
        Txn { store, done: BTreeMap::new(), current: BTreeMap::new(), failure: RefCell::new(None) }
    }

    /// Keeps what the command wrote.
    pub fn keep(&mut self) {
        self.done.append(&mut self.current);
    }

    /// Drops what the command wrote.
    pub fn discard(&mut self) {
        self.current.clear();
    }

    /// The first read that the store failed, whatever its caller made of it.
    pub fn failure(&self) -> Option<Error> {
        self.failure.borrow().clone()
    }

    /// Remembers a failure of the store.
    fn noted<T>(&self, result: std::result::Result<T, rocksdb::Error>, doing: &'static str) -> Result<T> {
        result.map_err(rocks(doing)).inspect_err(|e| {
            self.failure.borrow_mut().get_or_insert_with(|| e.clone());
        })
    }

    /// Writes a record.
    pub fn put<M: Message>(&mut self, cf: Cf, key: &[u8], record: &M) {
        self.put_raw(cf, key, record.encode_to_vec());
    }

    /// Writes bytes.
    pub fn put_raw(&mut self, cf: Cf, key: &[u8], value: Vec<u8>) {
        self.current.insert((cf, key.to_vec()), Some(value));
    }

    /// Removes a key.
    pub fn delete(&mut self, cf: Cf, key: &[u8]) {
        self.current.insert((cf, key.to_vec()), None);
    }

    /// Removes a record with a numeric key.
    pub fn delete_id(&mut self, cf: Cf, id: u64) {
        self.delete(cf, &id_key(id));
    }

    /// Writes everything kept, in one batch.
    pub fn commit(mut self) -> Result<()> {
        self.discard();
        let mut batch = WriteBatch::default();
        for ((cf, key), value) in &self.done {
            match value {
                Some(value) => batch.put_cf(self.store.cf(*cf), key, value),
                None => batch.delete_cf(self.store.cf(*cf), key),
            }
        }
        self.store.db.write(batch).map_err(rocks("writing"))
    }

    fn overlaid(&self, cf: Cf, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        let key = (cf, key.to_vec());
        self.current.get(&key).or_else(|| self.done.get(&key))
    }
}

impl Reader for Txn<'_> {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>> {
        match self.overlaid(cf, key) {
            Some(value) => Ok(value.clone()),
            None => self.noted(self.store.db.get_cf(self.store.cf(cf), key), "reading"),
        }
    }

    fn scan(&self, cf: Cf, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let from = after.unwrap_or(prefix);
        let mut overlay: BTreeMap<&[u8], &Option<Vec<u8>>> = BTreeMap::new();
        for layer in [&self.done, &self.current] {
            let start = Bound::Included((cf, from.to_vec()));
            for ((_, key), value) in layer.range((start, Bound::Unbounded)).take_while(|((c, k), _)| *c == cf && k.starts_with(prefix)) {
                overlay.insert(key, value);
            }
        }
        let mut options = ReadOptions::default();
        options.set_total_order_seek(true);
        let iterator = self.store.db.iterator_cf_opt(self.store.cf(cf), options, IteratorMode::From(from, Direction::Forward));
        // Overlaid deletions may hide rows, so that many more are taken from below.
        let below = self.noted(collect(iterator, prefix, after, limit.saturating_add(overlay.len())), "scanning")?;
        let mut merged: BTreeMap<Vec<u8>, Vec<u8>> = below.into_iter().collect();
        for (key, value) in overlay {
            if after.is_some_and(|a| a == key) {
                continue;
            }
            match value {
                Some(value) => drop(merged.insert(key.to_vec(), value.clone())),
                None => drop(merged.remove(key)),
            }
        }
        Ok(merged.into_iter().take(limit).collect())
    }

    fn at_or_below(&self, cf: Cf, key: &[u8], floor: &[u8]) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let mut bound = Bound::Included(key.to_vec());
        loop {
            let (Bound::Included(limit) | Bound::Excluded(limit)) = &bound else { return Ok(None) };
            let excluded = matches!(bound, Bound::Excluded(_));
            let mut iterator = self.store.db.iterator_cf_opt(self.store.cf(cf), not_below(floor), IteratorMode::From(limit, Direction::Reverse));
            let below = loop {
                match self.noted(iterator.next().transpose(), "reading")? {
                    Some((k, _)) if excluded && *k == **limit => {}
                    other => break other.map(|(k, v)| (k.into_vec(), Some(v.into_vec()))),
                }
            };
            if **limit < *floor {
                return Ok(None);
            }
            let upper = match &bound {
                Bound::Included(k) => Bound::Included((cf, k.clone())),
                Bound::Excluded(k) => Bound::Excluded((cf, k.clone())),
                Bound::Unbounded => Bound::Unbounded,
            };
            let best = [&self.done, &self.current]
                .iter()
                .filter_map(|layer| layer.range((Bound::Included((cf, floor.to_vec())), upper.clone())).next_back())
                .map(|((_, k), v)| (k.clone(), v.clone()))
                .chain(below)
                .reduce(|a, b| if b.0 > a.0 { b } else { a });
            let Some((k, _)) = best else { return Ok(None) };
            match self.get(cf, &k)? {
                Some(v) => return Ok(Some((k, v))),
                None => bound = Bound::Excluded(k),
            }
        }
    }

    fn record<M: Message + Default>(&self, cf: Cf, key: &[u8]) -> Result<Option<M>> {
        self.get(cf, key)?.map(|raw| decode(cf, key, &raw)).transpose()
    }
}
