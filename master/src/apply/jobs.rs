//! Jobs: written down when they start, and whenever there is something to tell. What they do is done by ordinary commands.

use super::context::Context;
use crate::store::{Cf, Reader, id_key};
use forebay_common::limits::{JOBS_KEPT, JOBS_RUNNING_MAX};
use forebay_common::{Result, err};
use forebay_proto::Job;
use forebay_proto::journal::{StartJob, UpdateJob};

/// The state of a job that is at work.
pub const RUNNING: &str = "running";

/// Errors: `LimitExceeded` while too many run.
pub fn start(c: &mut Context<'_, '_>, op: &StartJob) -> Result<()> {
    let Some(mut job) = op.job.clone() else { return Err(err!(InvalidArgument, "a job without a word")) };
    let mut all = c.txn.jobs()?;
    let running = all.iter().filter(|j| j.state == RUNNING).count();
    if running >= JOBS_RUNNING_MAX {
        return Err(err!(LimitExceeded, "{running} jobs are running, which is the limit: wait for one, or cancel it with `forebay job cancel`"));
    }
    // The oldest that are over make room.
    all.retain(|j| j.state != RUNNING);
    let surplus = (all.len() + running + 1).saturating_sub(JOBS_KEPT);
    all.iter().take(surplus).for_each(|old| c.txn.delete_id(Cf::Job, old.id));
    job.id = c.counters.next_job_id.max(1);
    c.counters.next_job_id = job.id + 1;
    job.state = RUNNING.to_owned();
    job.created_ms = c.now_ms();
    (job.principal, job.groups, job.superuser) = (c.who.user.clone(), c.who.groups.clone(), c.who.superuser);
    c.txn.put(Cf::Job, &id_key(job.id), &job);
    c.reply.job_id = job.id;
    Ok(())
}

/// Nothing happens to a job that is over.
pub fn update(c: &mut Context<'_, '_>, op: &UpdateJob) -> Result<()> {
    let Some(new) = &op.job else { return Ok(()) };
    let Some(old) = c.txn.record::<Job>(Cf::Job, &id_key(new.id))? else { return Ok(()) };
    if old.state != RUNNING {
        return Ok(());
    }
    if !c.who.superuser && c.who.user != old.principal {
        return Err(err!(PermissionDenied, "job {} is of user {}", old.id, old.principal));
    }
    let mut job = Job { principal: old.principal, groups: old.groups, superuser: old.superuser, created_ms: old.created_ms, ..new.clone() };
    if job.state != RUNNING {
        job.finished_ms = c.now_ms();
    }
    c.txn.put(Cf::Job, &id_key(job.id), &job);
    Ok(())
}
