//! The policy alone: the same objects that the worker's folders use, driven at once and without files.
//!
//! The rules around them are those of `worker/src/store/evictor.rs`: room is made down to the low watermark, a warm victim may
//! push colder ones out of the tier below, a cold one takes free room only, and a block that is used often enough below moves
//! up.

use super::{HEADER_FILE_BYTES, Read, Served, TraceOptions};
use forebay_common::BlockId;
use forebay_common::config::{EvictPolicy, WorkerConfig};
use forebay_worker::store::evict::{self, Evictable, Eviction};
use std::collections::{HashMap, HashSet};

struct Tier {
    policy: Box<dyn Eviction>,
    here: HashSet<u64>,
    quota: u64,
    used: u64,
}

impl Tier {
    fn new(policy: EvictPolicy, quota: u64) -> Tier {
        Tier { policy: evict::new(policy), here: HashSet::new(), quota, used: 0 }
    }

    fn enter(&mut self, id: u64, bytes: u64) {
        self.policy.insert(Evictable::simulated(id, bytes));
        self.here.insert(id);
        self.used += bytes;
    }

    fn leave(&mut self, id: u64, bytes: u64) {
        self.policy.remove(BlockId(id));
        self.here.remove(&id);
        self.used -= bytes;
    }

    fn evict(&mut self, bytes: u64) -> Option<(u64, bool)> {
        let victim = self.policy.victim()?;
        self.here.remove(&victim.id.get());
        self.used -= bytes;
        Some((victim.id.get(), victim.warm))
    }
}

/// Where each read is served from.
pub fn run(policy: EvictPolicy, options: &TraceOptions, reads: &[Read]) -> Vec<Served> {
    let rules = WorkerConfig::default();
    let bytes = options.block.as_u64() + HEADER_FILE_BYTES;
    let (mut mem, mut ssd) = (Tier::new(policy, options.mem.as_u64()), Tier::new(policy, options.ssd.as_u64()));
    let mut uses: HashMap<u64, u32> = HashMap::new();
    let make_room = |mem: &mut Tier, ssd: &mut Tier, uses: &mut HashMap<u64, u32>| {
        if mem.used <= mem.quota / 100 * rules.watermark_high_percent {
            return;
        }
        while mem.used > mem.quota / 100 * rules.watermark_low_percent {
            let Some((id, warm)) = mem.evict(bytes) else { return };
            while warm && ssd.used + bytes > ssd.quota && ssd.evict(bytes).is_some() {}
            if ssd.used + bytes <= ssd.quota {
                uses.remove(&id);
                ssd.enter(id, bytes);
            }
        }
    };
    reads
        .iter()
        .map(|read| {
            let id = read.id;
            if mem.here.contains(&id) {
                mem.policy.access(BlockId(id));
                return Served::Mem;
            }
            if ssd.here.contains(&id) {
                ssd.policy.access(BlockId(id));
                let used = uses.entry(id).or_default();
                *used += 1;
                if *used == rules.promote_after {
                    ssd.leave(id, bytes);
                    mem.enter(id, bytes);
                    make_room(&mut mem, &mut ssd, &mut uses);
                }
                return Served::Ssd;
            }
            mem.enter(id, bytes);
            make_room(&mut mem, &mut ssd, &mut uses);
            Served::Missed
        })
        .collect()
}
