//! Attributes of files and folders, and those that only a real HDFS has: answered as by a cluster that does not use them.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::status;
use crate::mount::raw;
use forebay_common::Result;
use forebay_common::limits::REPLICAS_MAX;
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::{SetAttributes, SetReplication, command::Op};
use std::sync::atomic::Ordering;

type Answer<T> = Result<T, Thrown>;

/// "Leave it as it is", of a time.
const NO_TIME: u64 = u64::MAX;
/// The storage policy that HDFS has by default.
const HOT: u32 = 7;

async fn set(h: &Hadoop, a: &Asker, src: &str, change: impl FnOnce(&mut SetAttributes)) -> Answer<()> {
    let (path, _) = h.find(a, src).await?;
    let mut op = SetAttributes { path: raw(&path), ..SetAttributes::default() };
    change(&mut op);
    h.core.change(Some(&a.caller(0)), Op::SetAttributes(op)).await?;
    Ok(())
}

pub async fn set_permission(h: &Hadoop, a: &Asker, r: wire::SetPermissionRequestProto) -> Answer<wire::SetPermissionResponseProto> {
    set(h, a, &r.src, |op| op.mode = Some(r.permission.perm & 0o1777)).await?;
    Ok(wire::SetPermissionResponseProto {})
}

pub async fn set_owner(h: &Hadoop, a: &Asker, r: wire::SetOwnerRequestProto) -> Answer<wire::SetOwnerResponseProto> {
    set(h, a, &r.src, |op| (op.owner, op.group) = (r.username.filter(|n| !n.is_empty()), r.groupname.filter(|n| !n.is_empty()))).await?;
    Ok(wire::SetOwnerResponseProto {})
}

pub async fn set_times(h: &Hadoop, a: &Asker, r: wire::SetTimesRequestProto) -> Answer<wire::SetTimesResponseProto> {
    let given = |ms: u64| (ms != NO_TIME).then_some(ms);
    set(h, a, &r.src, |op| (op.modified_ms, op.accessed_ms) = (given(r.mtime), given(r.atime))).await?;
    Ok(wire::SetTimesResponseProto {})
}

/// So many whole copies are kept up, as far as there are workers.
pub async fn set_replication(h: &Hadoop, a: &Asker, r: wire::SetReplicationRequestProto) -> Answer<wire::SetReplicationResponseProto> {
    let (path, resolved) = h.resolve(a, &r.src).await?;
    let inode = if resolved.walk.is_complete() { resolved.found(&path)?.inode.clone() } else { Default::default() };
    if inode.id == 0 || inode.folder {
        return Ok(wire::SetReplicationResponseProto { result: false });
    }
    if r.replication > REPLICAS_MAX {
        return Err(Thrown::io(format!("Requested replication factor of {} is greater than configured maximum of {REPLICAS_MAX}", r.replication)));
    }
    let op = SetAttributes { path: raw(&path), hadoop_replication: Some(r.replication), ..SetAttributes::default() };
    h.core.change(Some(&a.caller(0)), Op::SetAttributes(op)).await?;
    if inode.completed {
        let op = SetReplication { file_ids: vec![inode.id], min: r.replication, max: inode.replication_max };
        h.core.change(Some(&a.caller(1)), Op::SetReplication(op)).await?;
        h.core.soft.replicas_dirty.store(true, Ordering::Relaxed);
    }
    Ok(wire::SetReplicationResponseProto { result: true })
}

/// Access control lists are not kept yet: what there is are the permission bits.
pub async fn get_acl_status(h: &Hadoop, a: &Asker, r: wire::GetAclStatusRequestProto) -> Answer<wire::GetAclStatusResponseProto> {
    let (path, resolved) = h.find(a, &r.src).await?;
    let inode = &resolved.found(&path)?.inode;
    let (owner, group) = status::owner_and_group(inode);
    let result =
        wire::AclStatusProto { owner, group, sticky: inode.mode & 0o1000 != 0, entries: Vec::new(), permission: Some(status::permission(inode)) };
    Ok(wire::GetAclStatusResponseProto { result })
}

pub async fn get_x_attrs(h: &Hadoop, a: &Asker, r: wire::GetXAttrsRequestProto) -> Answer<wire::GetXAttrsResponseProto> {
    h.find(a, &r.src).await?;
    if let Some(wanted) = r.x_attrs.first() {
        return Err(Thrown::io(format!("At least one of the attributes provided was not found: {}", wanted.name)));
    }
    Ok(wire::GetXAttrsResponseProto { x_attrs: Vec::new() })
}

pub async fn list_x_attrs(h: &Hadoop, a: &Asker, r: wire::ListXAttrsRequestProto) -> Answer<wire::ListXAttrsResponseProto> {
    h.find(a, &r.src).await?;
    Ok(wire::ListXAttrsResponseProto { x_attrs: Vec::new() })
}

fn hot() -> wire::BlockStoragePolicyProto {
    let types = |types: Vec<wire::StorageTypeProto>| wire::StorageTypesProto { storage_types: types.into_iter().map(|t| t as i32).collect() };
    wire::BlockStoragePolicyProto {
        policy_id: HOT,
        name: "HOT".to_owned(),
        creation_policy: types(vec![wire::StorageTypeProto::Disk]),
        creation_fallback_policy: Some(types(Vec::new())),
        replication_fallback_policy: Some(types(vec![wire::StorageTypeProto::Archive])),
    }
}

pub async fn get_storage_policies(_: &Hadoop, _: &Asker, _: wire::GetStoragePoliciesRequestProto) -> Answer<wire::GetStoragePoliciesResponseProto> {
    Ok(wire::GetStoragePoliciesResponseProto { policies: vec![hot()] })
}

pub async fn get_storage_policy(h: &Hadoop, a: &Asker, r: wire::GetStoragePolicyRequestProto) -> Answer<wire::GetStoragePolicyResponseProto> {
    h.find(a, &r.path).await?;
    Ok(wire::GetStoragePolicyResponseProto { storage_policy: hot() })
}

pub async fn get_erasure_coding_policy(
    h: &Hadoop,
    a: &Asker,
    r: wire::GetErasureCodingPolicyRequestProto,
) -> Answer<wire::GetErasureCodingPolicyResponseProto> {
    h.find(a, &r.src).await?;
    Ok(wire::GetErasureCodingPolicyResponseProto { ec_policy: None })
}

pub async fn get_ez_for_path(h: &Hadoop, a: &Asker, r: wire::GetEzForPathRequestProto) -> Answer<wire::GetEzForPathResponseProto> {
    h.resolve(a, &r.src).await?;
    Ok(wire::GetEzForPathResponseProto { zone: None })
}

pub async fn list_encryption_zones(
    _: &Hadoop,
    _: &Asker,
    _: wire::ListEncryptionZonesRequestProto,
) -> Answer<wire::ListEncryptionZonesResponseProto> {
    Ok(wire::ListEncryptionZonesResponseProto { zones: Vec::new(), has_more: false })
}
