//! What a client asks about the cluster.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::locate;
use crate::worker::WorkerView;
use forebay_common::{Result, WorkerId};
use forebay_hdfs::hadoop::common as wire_common;
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::WorkerReport;
use std::sync::atomic::Ordering;

type Answer<T> = Result<T, Thrown>;

/// Bytes per checksum and per packet that clients use who ask: Hadoop's own defaults.
const BYTES_PER_CHECKSUM: u32 = 512;
const WRITE_PACKET_BYTES: u32 = 64 << 10;
const FILE_BUFFER_BYTES: u32 = 4_096;

pub async fn get_server_defaults(h: &Hadoop, _: &Asker, _: wire::GetServerDefaultsRequestProto) -> Answer<wire::GetServerDefaultsResponseProto> {
    let server_defaults = wire::FsServerDefaultsProto {
        block_size: h.core.config.block_size.as_u64(),
        bytes_per_checksum: BYTES_PER_CHECKSUM,
        write_packet_size: WRITE_PACKET_BYTES,
        replication: 1,
        file_buffer_size: FILE_BUFFER_BYTES,
        encrypt_data_transfer: Some(false),
        // Without a trash of the server's the shell deletes at once.
        trash_interval: Some(0),
        checksum_type: Some(wire::ChecksumTypeProto::ChecksumCrc32c as i32),
        key_provider_uri: Some(String::new()),
        policy_id: Some(0),
        snapshot_trash_root_enabled: Some(false),
    };
    Ok(wire::GetServerDefaultsResponseProto { server_defaults })
}

fn workers(h: &Hadoop) -> Vec<(WorkerView, WorkerReport)> {
    let present = h.core.soft.workers.present();
    let reports = h.core.soft.workers.report();
    let id = |r: &WorkerReport| r.address.as_ref().map(|a| WorkerId(a.worker_id));
    reports.into_iter().filter_map(|r| Some((present.iter().find(|w| id(&r) == Some(w.id))?.clone(), r))).collect()
}

pub async fn get_fs_stats(h: &Hadoop, _: &Asker, _: wire::GetFsStatusRequestProto) -> Answer<wire::GetFsStatsResponseProto> {
    let all = workers(h);
    let tiers = || all.iter().flat_map(|(_, r)| &r.tiers);
    let (capacity, used): (u64, u64) = (tiers().map(|t| t.total_bytes).sum(), tiers().map(|t| t.used_bytes).sum());
    Ok(wire::GetFsStatsResponseProto {
        capacity,
        used,
        remaining: capacity.saturating_sub(used),
        missing_repl_one_blocks: Some(0),
        blocks_in_future: Some(0),
        pending_deletion_blocks: Some(0),
        ..wire::GetFsStatsResponseProto::default()
    })
}

pub async fn get_fs_replicated_block_stats(
    _: &Hadoop,
    _: &Asker,
    _: wire::GetFsReplicatedBlockStatsRequestProto,
) -> Answer<wire::GetFsReplicatedBlockStatsResponseProto> {
    Ok(wire::GetFsReplicatedBlockStatsResponseProto::default())
}

pub async fn get_fs_ec_block_group_stats(
    _: &Hadoop,
    _: &Asker,
    _: wire::GetFsEcBlockGroupStatsRequestProto,
) -> Answer<wire::GetFsEcBlockGroupStatsResponseProto> {
    Ok(wire::GetFsEcBlockGroupStatsResponseProto::default())
}

fn datanodes(h: &Hadoop, kind: wire::DatanodeReportTypeProto) -> Vec<wire::DatanodeInfoProto> {
    use wire::DatanodeReportTypeProto::*;
    let wanted = |leaving: bool| match kind {
        All | Live => true,
        Decommissioning => leaving,
        Dead | EnteringMaintenance | InMaintenance => false,
    };
    workers(h).iter().filter(|(w, _)| wanted(w.leaving)).map(|(w, r)| locate::datanode(w, &r.tiers)).collect()
}

pub async fn get_datanode_report(h: &Hadoop, _: &Asker, r: wire::GetDatanodeReportRequestProto) -> Answer<wire::GetDatanodeReportResponseProto> {
    Ok(wire::GetDatanodeReportResponseProto { di: datanodes(h, r.r#type()) })
}

pub async fn get_datanode_storage_report(
    h: &Hadoop,
    _: &Asker,
    r: wire::GetDatanodeStorageReportRequestProto,
) -> Answer<wire::GetDatanodeStorageReportResponseProto> {
    let reports = datanodes(h, r.r#type()).into_iter().map(|info| {
        let uuid = info.id.datanode_uuid.clone();
        let storage_uuid = locate::worker_of(&uuid).map_or(uuid, locate::storage);
        let report = wire::StorageReportProto {
            capacity: info.capacity,
            dfs_used: info.dfs_used,
            remaining: info.remaining,
            block_pool_used: info.block_pool_used,
            storage: Some(wire::DatanodeStorageProto { storage_uuid: storage_uuid.clone(), ..wire::DatanodeStorageProto::default() }),
            #[allow(deprecated, reason = "a required field of Hadoop's message")]
            storage_uuid,
            ..wire::StorageReportProto::default()
        };
        wire::DatanodeStorageReportProto { datanode_info: info, storage_reports: vec![report] }
    });
    Ok(wire::GetDatanodeStorageReportResponseProto { datanode_storage_reports: reports.collect() })
}

pub async fn get_slow_datanode_report(
    _: &Hadoop,
    _: &Asker,
    _: wire::GetSlowDatanodeReportRequestProto,
) -> Answer<wire::GetSlowDatanodeReportResponseProto> {
    Ok(wire::GetSlowDatanodeReportResponseProto::default())
}

/// In safe mode Hadoop's clients change nothing; our own do. A start leads to none.
pub async fn set_safe_mode(h: &Hadoop, a: &Asker, r: wire::SetSafeModeRequestProto) -> Answer<wire::SetSafeModeResponseProto> {
    use wire::SafeModeActionProto::*;
    let wanted = match r.action() {
        SafemodeGet => return Ok(wire::SetSafeModeResponseProto { result: h.safe_mode.load(Ordering::Relaxed) }),
        SafemodeEnter => true,
        SafemodeLeave | SafemodeForceExit => false,
    };
    if !h.core.identity.who(&a.user).superuser {
        let name = r.action().as_str_name().to_lowercase();
        return Err(Thrown::denied(format!("Access denied for user {}. Superuser privilege is required for operation {name}", a.user)));
    }
    h.safe_mode.store(wanted, Ordering::Relaxed);
    tracing::warn!(user = a.user, on = wanted, "safe mode of the Hadoop front");
    Ok(wire::SetSafeModeResponseProto { result: wanted })
}

/// Errors: `SafeModeException` for a change while safe mode is on.
pub fn check_safe_mode(h: &Hadoop, method: &str) -> Answer<()> {
    let class = "org.apache.hadoop.hdfs.server.namenode.SafeModeException";
    if !CHANGES.contains(&method) || !h.safe_mode.load(Ordering::Relaxed) {
        return Ok(());
    }
    Err(Thrown::new(class, forebay_common::ErrorKind::Unavailable, format!("Cannot {method}. Name node is in safe mode.")))
}

/// Calls that change something.
const CHANGES: &[&str] = &[
    "mkdirs",
    "delete",
    "rename",
    "rename2",
    "setPermission",
    "setOwner",
    "setTimes",
    "setReplication",
    "create",
    "addBlock",
    "abandonBlock",
    "complete",
    "fsync",
    "recoverLease",
];

pub async fn get_ha_service_state(h: &Hadoop, _: &Asker, _: wire::HaServiceStateRequestProto) -> Answer<wire::HaServiceStateResponseProto> {
    let leads = h.core.journal.read_barrier().is_ok();
    let state = if leads { wire_common::HaServiceStateProto::Active } else { wire_common::HaServiceStateProto::Standby };
    Ok(wire::HaServiceStateResponseProto { state: state as i32 })
}

/// Reads are in step already.
pub async fn msync(_: &Hadoop, _: &Asker, _: wire::MsyncRequestProto) -> Answer<wire::MsyncResponseProto> {
    Ok(wire::MsyncResponseProto {})
}

/// With simple authentication there are no delegation tokens, and clients take that for an answer.
pub async fn get_delegation_token(
    _: &Hadoop,
    _: &Asker,
    _: wire_common::GetDelegationTokenRequestProto,
) -> Answer<wire_common::GetDelegationTokenResponseProto> {
    Ok(wire_common::GetDelegationTokenResponseProto { token: None })
}

pub async fn rolling_upgrade(_: &Hadoop, _: &Asker, r: wire::RollingUpgradeRequestProto) -> Answer<wire::RollingUpgradeResponseProto> {
    match r.action() {
        wire::RollingUpgradeActionProto::Query => Ok(wire::RollingUpgradeResponseProto { rolling_upgrade_info: None }),
        _ => Err(Thrown::new("java.lang.UnsupportedOperationException", forebay_common::ErrorKind::Unsupported, "Forebay has no rolling upgrade")),
    }
}

/// Bytes travel as they are.
pub async fn get_data_encryption_key(
    _: &Hadoop,
    _: &Asker,
    _: wire::GetDataEncryptionKeyRequestProto,
) -> Answer<wire::GetDataEncryptionKeyResponseProto> {
    Ok(wire::GetDataEncryptionKeyResponseProto { data_encryption_key: None })
}

/// A client met bytes that did not match their checksums. The worker looks at what it has before it serves it, and the scrubber at all
/// of it: what the report adds is a line in the log.
pub async fn report_bad_blocks(_: &Hadoop, a: &Asker, r: wire::ReportBadBlocksRequestProto) -> Answer<wire::ReportBadBlocksResponseProto> {
    for block in &r.blocks {
        tracing::warn!(block = block.b.block_id, client = %a.ip, "a Hadoop client met a wrong checksum");
    }
    Ok(wire::ReportBadBlocksResponseProto {})
}
