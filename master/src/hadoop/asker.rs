//! `Asker`: who makes a call, and what makes it unique.

use bytes::Bytes;
use forebay_proto::Caller;
use sha2::{Digest, Sha256};
use std::net::IpAddr;

/// Calls of one client whose answers are remembered under one id of ours; see `caller`.
const CALLS_TOGETHER: u64 = 16;
/// Changes that one call may make.
const STEPS: u64 = 4;

/// Of one call.
#[derive(Clone, Debug)]
pub struct Asker {
    /// The effective user, without host and realm.
    pub user: String,
    /// Where the call comes from.
    pub ip: IpAddr,
    /// The client's own id, the same on all its connections.
    pub client_id: Bytes,
    /// The call's number.
    pub call_id: i32,
}

impl Asker {
    /// The caller of the call's `step`-th change, for the journaled reply cache: the same whenever the call is sent again.
    ///
    /// Our reply cache remembers 64 answers per client, and refuses what is older as expired; Hadoop's calls of one client may overtake
    /// each other by more. So 16 calls in a row, of at most 4 changes, are a client of ours.
    pub fn caller(&self, step: u64) -> Caller {
        debug_assert!((0..STEPS).contains(&step));
        let call = u64::from(self.call_id.unsigned_abs());
        let mut hasher = Sha256::new();
        hasher.update(b"hadoop");
        hasher.update(&self.client_id);
        hasher.update((call / CALLS_TOGETHER).to_be_bytes());
        let digest = hasher.finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        let sequence = call % CALLS_TOGETHER * STEPS + step + 1;
        Caller { user: self.user.clone(), client_id: u64::from_be_bytes(id) | 1, sequence }
    }
}

/// The user of a principal: `hive/host@REALM` is `hive`.
pub fn short_name(principal: &str) -> &str {
    principal.split(['/', '@']).next().unwrap_or(principal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(client: &'static [u8], call_id: i32) -> Asker {
        Asker { user: "u".into(), ip: IpAddr::from([127, 0, 0, 1]), client_id: Bytes::from_static(client), call_id }
    }

    #[test]
    fn every_change_of_every_call_has_numbers_of_its_own_within_the_window() {
        let mut seen = std::collections::HashSet::new();
        for client in [b"a", b"b"] {
            for call in (0..200).chain([i32::MAX - 1, i32::MAX]) {
                for step in 0..STEPS {
                    let caller = asker(client, call).caller(step);
                    assert!(caller.client_id > 0 && (1..=64).contains(&caller.sequence));
                    assert!(seen.insert((caller.client_id, caller.sequence)));
                    assert_eq!(caller, asker(client, call).caller(step), "sent again");
                }
            }
        }
        assert_eq!((short_name("hive/h@R"), short_name("hive@R"), short_name("hive")), ("hive", "hive", "hive"));
    }
}
