//! Attributes of files and folders, and those that only a real HDFS has: answered as by a cluster that does not use them.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::status;
use crate::apply::check_x_attr;
use crate::mount::raw;
use crate::namespace;
use forebay_common::limits::REPLICAS_MAX;
use forebay_common::{ErrorKind, Result};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::journal::set_acl::Change;
use forebay_proto::journal::{SetAcl, SetAttributes, SetQuota, SetReplication, SetXAttr, command::Op};
use forebay_proto::{AclEntry, XAttr};
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

/// An entry as Hadoop's clients send it.
fn entry(e: &wire::AclEntryProto) -> AclEntry {
    AclEntry { scope: e.scope as u32, kind: e.r#type as u32, name: e.name.clone().unwrap_or_default(), perm: e.permissions as u32 }
}

const ACL_EXCEPTION: &str = "org.apache.hadoop.hdfs.protocol.AclException";

async fn change_acl(h: &Hadoop, a: &Asker, src: &str, change: Change, spec: &[wire::AclEntryProto]) -> Answer<()> {
    let (path, _) = h.find(a, src).await?;
    let op = SetAcl { path: raw(&path), change: change as i32, entries: spec.iter().map(entry).collect() };
    match h.core.change(Some(&a.caller(0)), Op::SetAcl(op)).await {
        // HDFS says the path in its message, and puts it behind every one.
        Err(e) if e.kind() == ErrorKind::InvalidArgument => {
            let named = if e.message().contains("only directories") { format!(" Path: {path}") } else { String::new() };
            Err(Thrown::new(ACL_EXCEPTION, e.kind(), format!("{}{named} Path: {path}", e.message())))
        }
        other => Ok(other.map(drop)?),
    }
}

pub async fn set_acl(h: &Hadoop, a: &Asker, r: wire::SetAclRequestProto) -> Answer<wire::SetAclResponseProto> {
    change_acl(h, a, &r.src, Change::Replace, &r.acl_spec).await?;
    Ok(wire::SetAclResponseProto {})
}

pub async fn modify_acl_entries(h: &Hadoop, a: &Asker, r: wire::ModifyAclEntriesRequestProto) -> Answer<wire::ModifyAclEntriesResponseProto> {
    change_acl(h, a, &r.src, Change::Merge, &r.acl_spec).await?;
    Ok(wire::ModifyAclEntriesResponseProto {})
}

pub async fn remove_acl_entries(h: &Hadoop, a: &Asker, r: wire::RemoveAclEntriesRequestProto) -> Answer<wire::RemoveAclEntriesResponseProto> {
    change_acl(h, a, &r.src, Change::Remove, &r.acl_spec).await?;
    Ok(wire::RemoveAclEntriesResponseProto {})
}

pub async fn remove_default_acl(h: &Hadoop, a: &Asker, r: wire::RemoveDefaultAclRequestProto) -> Answer<wire::RemoveDefaultAclResponseProto> {
    change_acl(h, a, &r.src, Change::RemoveDefault, &[]).await?;
    Ok(wire::RemoveDefaultAclResponseProto {})
}

pub async fn remove_acl(h: &Hadoop, a: &Asker, r: wire::RemoveAclRequestProto) -> Answer<wire::RemoveAclResponseProto> {
    change_acl(h, a, &r.src, Change::RemoveAll, &[]).await?;
    Ok(wire::RemoveAclResponseProto {})
}

/// What the permission bits do not say.
pub async fn get_acl_status(h: &Hadoop, a: &Asker, r: wire::GetAclStatusRequestProto) -> Answer<wire::GetAclStatusResponseProto> {
    let (path, resolved) = h.find(a, &r.src).await?;
    let inode = &resolved.found(&path)?.inode;
    let (owner, group) = status::owner_and_group(inode);
    let entries = inode.acl.iter().map(|e| wire::AclEntryProto {
        r#type: e.kind as i32,
        scope: e.scope as i32,
        permissions: e.perm as i32,
        name: Some(e.name.clone()).filter(|name| !name.is_empty()),
    });
    let result = wire::AclStatusProto {
        owner,
        group,
        sticky: inode.mode & 0o1000 != 0,
        entries: entries.collect(),
        permission: Some(status::permission(inode)),
    };
    Ok(wire::GetAclStatusResponseProto { result })
}

const FLAG_CREATE: u32 = wire::XAttrSetFlagProto::XattrCreate as u32;
const FLAG_REPLACE: u32 = wire::XAttrSetFlagProto::XattrReplace as u32;

/// An attribute as its name is printed: of Hadoop's clients it comes without the namespace.
fn printed(namespace: u32, name: &str) -> String {
    let namespace = ["user", "trusted", "security", "system", "raw"].get(namespace as usize).copied().unwrap_or("unknown");
    format!("{namespace}.{name}")
}

async fn change_x_attr(h: &Hadoop, a: &Asker, src: &str, x: Option<wire::XAttrProto>, flag: Option<u32>) -> Answer<()> {
    let (path, _) = h.find(a, src).await?;
    let x = x.ok_or_else(|| Thrown::io("an attribute is missing"))?;
    let (namespace, who) = (x.namespace as u32, h.core.identity.who(&a.user));
    check_x_attr(&who, namespace, &printed(namespace, &x.name))?;
    let op = SetXAttr {
        path: raw(&path),
        namespace,
        name: x.name.clone(),
        value: flag.map(|_| x.value.unwrap_or_default()),
        may_create: flag.is_some_and(|flag| flag & FLAG_CREATE != 0),
        may_replace: flag.is_some_and(|flag| flag & FLAG_REPLACE != 0),
    };
    match h.core.change(Some(&a.caller(0)), Op::SetXAttr(op)).await {
        // As HDFS throws it: of no class of its own.
        Err(e) if e.kind() == ErrorKind::InvalidArgument => Err(Thrown::io(e.message().to_owned())),
        other => Ok(other.map(drop)?),
    }
}

pub async fn set_x_attr(h: &Hadoop, a: &Asker, r: wire::SetXAttrRequestProto) -> Answer<wire::SetXAttrResponseProto> {
    change_x_attr(h, a, &r.src, r.x_attr, Some(r.flag.unwrap_or(0))).await?;
    Ok(wire::SetXAttrResponseProto {})
}

pub async fn remove_x_attr(h: &Hadoop, a: &Asker, r: wire::RemoveXAttrRequestProto) -> Answer<wire::RemoveXAttrResponseProto> {
    change_x_attr(h, a, &r.src, r.x_attr, None).await?;
    Ok(wire::RemoveXAttrResponseProto {})
}

/// The attributes of an inode that somebody may see.
async fn seen(h: &Hadoop, a: &Asker, src: &str, wanted: u32) -> Answer<Vec<XAttr>> {
    let (path, resolved) = h.find(a, src).await?;
    let who = h.core.identity.who(&a.user);
    let inode = &resolved.found(&path)?.inode;
    if wanted > 0 {
        namespace::check(&who, inode, wanted, &path)?;
    }
    Ok(inode.x_attrs.iter().filter(|x| check_x_attr(&who, x.namespace, "").is_ok()).cloned().collect())
}

fn x_attr(x: XAttr, with_value: bool) -> wire::XAttrProto {
    wire::XAttrProto { namespace: x.namespace as i32, name: x.name, value: Some(x.value).filter(|_| with_value) }
}

pub async fn get_x_attrs(h: &Hadoop, a: &Asker, r: wire::GetXAttrsRequestProto) -> Answer<wire::GetXAttrsResponseProto> {
    let who = h.core.identity.who(&a.user);
    for wanted in &r.x_attrs {
        check_x_attr(&who, wanted.namespace as u32, &printed(wanted.namespace as u32, &wanted.name))?;
    }
    let all = seen(h, a, &r.src, namespace::READ).await?;
    let mut x_attrs = Vec::new();
    for wanted in &r.x_attrs {
        let found = all.iter().find(|x| x.namespace == wanted.namespace as u32 && x.name == wanted.name);
        let found = found.ok_or_else(|| Thrown::io("At least one of the attributes provided was not found."))?;
        x_attrs.push(x_attr(found.clone(), true));
    }
    if r.x_attrs.is_empty() {
        x_attrs = all.into_iter().map(|x| x_attr(x, true)).collect();
    }
    Ok(wire::GetXAttrsResponseProto { x_attrs })
}

pub async fn list_x_attrs(h: &Hadoop, a: &Asker, r: wire::ListXAttrsRequestProto) -> Answer<wire::ListXAttrsResponseProto> {
    let all = seen(h, a, &r.src, 0).await?;
    Ok(wire::ListXAttrsResponseProto { x_attrs: all.into_iter().map(|x| x_attr(x, false)).collect() })
}

/// "As it is", and "no limit any more", of a quota.
const QUOTA_AS_IT_IS: u64 = i64::MAX as u64;
const QUOTA_NONE: u64 = u64::MAX;

pub async fn set_quota(h: &Hadoop, a: &Asker, r: wire::SetQuotaRequestProto) -> Answer<wire::SetQuotaResponseProto> {
    if r.storage_type.is_some() {
        return Err(Thrown::io("quotas by storage type are not offered: tiers are the cache's own affair"));
    }
    let given = |quota: u64| match quota {
        QUOTA_AS_IT_IS => Ok(None),
        QUOTA_NONE => Ok(Some(0)),
        quota if quota > 0 && quota < QUOTA_AS_IT_IS => Ok(Some(quota)),
        other => Err(Thrown::new(
            "java.lang.IllegalArgumentException",
            ErrorKind::InvalidArgument,
            format!("Invalid values for quota : {} and {}", other as i64, r.storagespace_quota as i64),
        )),
    };
    let (names, bytes) = (given(r.namespace_quota)?, given(r.storagespace_quota)?);
    let missing = || Thrown::not_found(format!("Directory does not exist: {}", r.path));
    let Some((path, resolved)) = h.look(a, &r.path).await? else { return Err(missing()) };
    if !resolved.found(&path)?.inode.folder {
        let class = "org.apache.hadoop.fs.PathIsNotDirectoryException";
        return Err(Thrown::new(class, ErrorKind::NotADirectory, format!("`{path}': Is not a directory")));
    }
    h.core.change(Some(&a.caller(0)), Op::SetQuota(SetQuota { path: raw(&path), names, bytes })).await?;
    Ok(wire::SetQuotaResponseProto {})
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
