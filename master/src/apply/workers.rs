//! Which workers are to leave: kept in the journal, so that a new master goes on with it.

use super::context::Context;
use crate::store::{Cf, leaving_key};
use forebay_common::{Result, err};
use forebay_proto::journal::SetWorkerState;

pub fn set_state(c: &mut Context<'_, '_>, op: &SetWorkerState) -> Result<()> {
    if !c.who.superuser {
        return Err(err!(PermissionDenied, "user {} is not a superuser: only those have workers leave", c.who.user));
    }
    let key = leaving_key(op.worker_id);
    if op.leaving {
        c.txn.put_raw(Cf::Meta, &key, if op.until_gone { vec![1] } else { Vec::new() })
    } else {
        c.txn.delete(Cf::Meta, &key)
    }
    Ok(())
}
