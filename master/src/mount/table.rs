//! The opened under stores, by mount id. Filled on first use from the mount records, emptied when the table changes.

use super::MountOptions;
use crate::store::{Reader, Store};
use forebay_common::config::MasterConfig;
use forebay_common::{AbsPath, MountId, Result, err};
use forebay_proto::store::Mount;
use forebay_ufs::{Requests, UfsUri, UnderStore};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

/// One mount, ready for use.
pub struct Mounted {
    /// Its id.
    pub id: MountId,
    /// Where it appears.
    pub path: AbsPath,
    /// Changes are refused.
    pub read_only: bool,
    /// Its options.
    pub options: MountOptions,
    /// The store.
    pub ufs: UnderStore,
}

#[derive(Default)]
pub struct MountTable {
    open: RwLock<HashMap<MountId, Arc<Mounted>>>,
    /// What each has cost since the master started, whatever options it had.
    requests: Mutex<HashMap<MountId, Arc<Requests>>>,
}

impl MountTable {
    /// The mount. Errors: `NotFound`, or what opening the store said.
    pub fn get(&self, store: &Store, config: &MasterConfig, id: MountId) -> Result<Arc<Mounted>> {
        if let Some(mounted) = self.open.read().unwrap_or_else(|e| e.into_inner()).get(&id) {
            return Ok(mounted.clone());
        }
        let record = store.view().mount(id)?.ok_or_else(|| err!(NotFound, "mount {id} does not exist"))?;
        let mounted = Arc::new(open(&record, config, self.requests(id))?);
        self.open.write().unwrap_or_else(|e| e.into_inner()).insert(id, mounted.clone());
        Ok(mounted)
    }

    /// What a mount has cost this master.
    pub fn requests(&self, id: MountId) -> Arc<Requests> {
        self.requests.lock().unwrap_or_else(|e| e.into_inner()).entry(id).or_default().clone()
    }

    /// Opens all again at the next use.
    pub fn forget_all(&self) {
        self.open.write().unwrap_or_else(|e| e.into_inner()).clear();
    }
}

fn open(record: &Mount, config: &MasterConfig, requests: Arc<Requests>) -> Result<Mounted> {
    let options = MountOptions::parse(&record.options, config)?;
    let uri = UfsUri::parse(&record.uri)?;
    let ufs = UnderStore::open_counting(&uri, &options.ufs, requests)?;
    Ok(Mounted { id: MountId(record.id), path: AbsPath::parse(&record.path)?, read_only: record.read_only, options, ufs })
}
