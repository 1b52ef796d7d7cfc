//! `Core`: the parts of one worker, shared by its sessions.

use crate::hadoop::{OpenBlocks, Slots};
use crate::master::Master;
use crate::report::Reporter;
use crate::store::BlockStore;
use crate::ufs_read::Fetcher;
use forebay_common::config::WorkerConfig;
use forebay_common::token::{Claims, KeyRing, Refusal};
use forebay_common::{MountId, Result, WorkerId, clock, err};
use forebay_ufs::{Requests, UfsUri, UnderStore};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, RwLock};
use tokio::sync::watch;

/// Everything a session needs.
pub struct Core {
    pub id: WorkerId,
    pub host_id: String,
    pub config: WorkerConfig,
    pub store: Arc<BlockStore>,
    pub master: Master,
    pub keys: KeyRing,
    pub mounts: Mounts,
    pub fetcher: Fetcher,
    pub reporter: Reporter,
    /// Blocks that Hadoop's clients are writing.
    pub open_blocks: OpenBlocks,
    /// What Java clients hold by descriptor.
    pub slots: Slots,
    /// Whether this worker is to leave: it keeps nothing new and takes its grants back.
    pub leaving: watch::Sender<bool>,
}

impl Core {
    /// Verifies a token. A key not heard of yet is asked for once. Errors: `Unauthenticated`.
    pub async fn verify(&self, token: &[u8], right: u32) -> Result<Claims> {
        match self.keys.verify(token, self.id, right, clock::now_ms()) {
            Ok(claims) => Ok(claims),
            Err(Refusal::UnknownKey) => {
                self.reporter.report_now().await;
                self.keys.verify(token, self.id, right, clock::now_ms()).map_err(|refusal| match refusal {
                    Refusal::UnknownKey => err!(Unauthenticated, "block token signed with an unknown key: open the file again"),
                    Refusal::Refused(why) => err!(Unauthenticated, "{why}"),
                })
            }
            Err(Refusal::Refused(why)) => Err(err!(Unauthenticated, "{why}")),
        }
    }

    /// The under store of a mount. One not heard of yet is asked for once.
    pub async fn under_store(&self, mount: MountId) -> Result<UnderStore> {
        if let Some(store) = self.mounts.get(mount) {
            return store;
        }
        self.reporter.report_now().await;
        self.mounts.get(mount).unwrap_or_else(|| Err(err!(NotFound, "mount {mount} is gone")))
    }
}

type Described = (String, BTreeMap<String, String>);

/// A mount's store as it is described, and what it has cost, whatever options it had.
struct Opened {
    described: Described,
    store: Result<UnderStore>,
    requests: Arc<Requests>,
}

/// Under stores by mount, from the master's heartbeat answers; credentials live here and nowhere on disk.
#[derive(Default)]
pub struct Mounts {
    open: RwLock<HashMap<MountId, Opened>>,
}

impl Mounts {
    fn get(&self, id: MountId) -> Option<Result<UnderStore>> {
        self.open.read().unwrap_or_else(|e| e.into_inner()).get(&id).map(|o| o.store.clone())
    }

    /// What each mount has cost, by kind.
    pub fn requests(&self) -> Vec<(MountId, Vec<(&'static str, u64)>)> {
        let open = self.open.read().unwrap_or_else(|e| e.into_inner());
        open.iter().map(|(id, o)| (*id, o.requests.all())).collect()
    }

    /// Takes the whole table: new ones are opened, changed ones again, missing ones forgotten.
    pub fn set(&self, table: Vec<(MountId, String, BTreeMap<String, String>)>) {
        let mut open = self.open.write().unwrap_or_else(|e| e.into_inner());
        open.retain(|id, _| table.iter().any(|(other, ..)| other == id));
        for (id, uri, options) in table {
            let described = (uri, options);
            if open.get(&id).is_some_and(|known| known.described == described && known.store.is_ok()) {
                continue;
            }
            let requests = open.get(&id).map_or_else(Arc::default, |known| known.requests.clone());
            let store = UfsUri::parse(&described.0).and_then(|uri| UnderStore::open_counting(&uri, &described.1, requests.clone()));
            if let Err(e) = &store {
                tracing::warn!(mount = %id, error = %e, "an under store cannot be opened on this worker");
            }
            open.insert(id, Opened { described, store, requests });
        }
    }
}
