//! From a method's name to its handler. What is not in the table is answered as "no such method", which clients take for what it is.

use super::asker::Asker;
use super::exception::Thrown;
use super::{Hadoop, attributes, cluster, locate, names, recovery, reopen, writing};
use bytes::Bytes;
use forebay_hdfs::client::CLIENT_PROTOCOL;
use forebay_hdfs::ipc::{self, Call, Severity};

macro_rules! table {
    ($hadoop:expr, $asker:expr, $call:expr; $($method:literal => $module:ident::$handler:ident,)*) => {
        match $call.method.as_str() {
            $($method => {
                let response = $module::$handler($hadoop, $asker, $call.decode()?).await?;
                Ok(ipc::success(&$call.id, &response))
            })*
            other => Err(Thrown::no_such_method(other, &$call.protocol)),
        }
    };
}

/// The answer of a call.
pub async fn answer(hadoop: &Hadoop, asker: &Asker, call: &Call) -> Result<Bytes, Thrown> {
    if call.protocol != CLIENT_PROTOCOL {
        let message = format!("Unknown protocol: {}", call.protocol);
        let thrown = Thrown::new("org.apache.hadoop.ipc.RpcNoSuchProtocolException", forebay_common::ErrorKind::Unsupported, message);
        return Err(Thrown { severity: Severity::NoSuchProtocol, ..thrown });
    }
    cluster::check_safe_mode(hadoop, &call.method)?;
    table! { hadoop, asker, call;
        "getFileInfo" => names::get_file_info,
        "getFileLinkInfo" => names::get_file_link_info,
        "getLocatedFileInfo" => names::get_located_file_info,
        "getListing" => names::get_listing,
        "getBatchedListing" => names::get_batched_listing,
        "getContentSummary" => names::get_content_summary,
        "getQuotaUsage" => names::get_quota_usage,
        "mkdirs" => names::mkdirs,
        "delete" => names::delete,
        "rename" => names::rename,
        "rename2" => names::rename2,
        "isFileClosed" => names::is_file_closed,
        "checkAccess" => names::check_access,
        "getPreferredBlockSize" => names::get_preferred_block_size,
        "setPermission" => attributes::set_permission,
        "setOwner" => attributes::set_owner,
        "setTimes" => attributes::set_times,
        "setReplication" => attributes::set_replication,
        "getAclStatus" => attributes::get_acl_status,
        "setQuota" => attributes::set_quota,
        "setAcl" => attributes::set_acl,
        "modifyAclEntries" => attributes::modify_acl_entries,
        "removeAclEntries" => attributes::remove_acl_entries,
        "removeDefaultAcl" => attributes::remove_default_acl,
        "removeAcl" => attributes::remove_acl,
        "setXAttr" => attributes::set_x_attr,
        "removeXAttr" => attributes::remove_x_attr,
        "getXAttrs" => attributes::get_x_attrs,
        "listXAttrs" => attributes::list_x_attrs,
        "getStoragePolicies" => attributes::get_storage_policies,
        "getStoragePolicy" => attributes::get_storage_policy,
        "getErasureCodingPolicy" => attributes::get_erasure_coding_policy,
        "getEZForPath" => attributes::get_ez_for_path,
        "listEncryptionZones" => attributes::list_encryption_zones,
        "getBlockLocations" => locate::get_block_locations,
        "create" => writing::create,
        "addBlock" => writing::add_block,
        "abandonBlock" => writing::abandon_block,
        "complete" => writing::complete,
        "fsync" => writing::fsync,
        "renewLease" => recovery::renew_lease,
        "recoverLease" => recovery::recover_lease,
        "updateBlockForPipeline" => recovery::update_block_for_pipeline,
        "updatePipeline" => recovery::update_pipeline,
        "getAdditionalDatanode" => recovery::get_additional_datanode,
        "append" => reopen::append,
        "truncate" => reopen::truncate,
        "concat" => reopen::concat,
        "getServerDefaults" => cluster::get_server_defaults,
        "getFsStats" => cluster::get_fs_stats,
        "getFsReplicatedBlockStats" => cluster::get_fs_replicated_block_stats,
        "getFsECBlockGroupStats" => cluster::get_fs_ec_block_group_stats,
        "getDatanodeReport" => cluster::get_datanode_report,
        "getDatanodeStorageReport" => cluster::get_datanode_storage_report,
        "getSlowDatanodeReport" => cluster::get_slow_datanode_report,
        "setSafeMode" => cluster::set_safe_mode,
        "getHAServiceState" => cluster::get_ha_service_state,
        "msync" => cluster::msync,
        "getDelegationToken" => cluster::get_delegation_token,
        "rollingUpgrade" => cluster::rolling_upgrade,
        "getDataEncryptionKey" => cluster::get_data_encryption_key,
        "reportBadBlocks" => cluster::report_bad_blocks,
    }
}
