//! Which workers are to leave: kept in the journal, so that a new master goes on with it.

use super::context::Context;
use crate::store::{Cf, Reader, leaving_key};
use forebay_common::{Result, err};
use forebay_proto::journal::SetWorkerState;

pub fn set_state(c: &mut Context<'_, '_>, op: &SetWorkerState) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "user {} is not a superuser: only those have workers leave", c.who.user));
    }
    let key = leaving_key(op.worker_id);
    if op.leaving {
        // One that was told to leave for good does not come back because its process stops.
        let for_good = op.process == 0 || c.txn.get(Cf::Meta, &key)?.is_some_and(|before| before.is_empty());
        c.txn.put_raw(Cf::Meta, &key, if for_good { Vec::new() } else { op.process.to_be_bytes().to_vec() })
    } else {
        c.txn.delete(Cf::Meta, &key)
    }
    Ok(())
}
