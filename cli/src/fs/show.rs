//! What is there: ls, stat, location, du, df, count.

use crate::output::{self, Output, bytes, percent, time};
use forebay_client::FileSystem;
use forebay_common::{AbsPath, Result, err};
use forebay_proto::{BlockInfo, FileStatus, WorkerAddress};
use serde_json::{Value, json};
use std::collections::HashMap;

fn path_text(status: &FileStatus) -> String {
    String::from_utf8_lossy(&status.path).into_owned()
}

/// Everything below a path that may be read, and the folders that may not.
async fn list(fs: &FileSystem, path: &AbsPath, recursive: bool) -> Result<(Vec<FileStatus>, Vec<AbsPath>)> {
    let mut entries = Vec::new();
    let denied = fs
        .list_each(path, recursive, |batch| {
            entries.extend(batch);
            Ok(())
        })
        .await?;
    Ok((entries, denied))
}

/// Says what is missing in what was shown. Errors: `PermissionDenied` when anything is.
fn complete(denied: &[AbsPath]) -> Result<()> {
    for folder in denied {
        eprintln!("forebay: {folder} may not be read: what is below it is not shown");
    }
    if denied.is_empty() { Ok(()) } else { Err(err!(PermissionDenied, "{} folders are missing in this", denied.len())) }
}

fn mode_text(status: &FileStatus) -> String {
    let letter = |bit: u32, c: char| if status.mode & bit != 0 { c } else { '-' };
    let kind = if status.folder { 'd' } else { '-' };
    std::iter::once(kind).chain((0..9).map(|i| letter(0o400 >> i, ['r', 'w', 'x'][i % 3]))).collect()
}

/// The fields that scripts read.
fn status_json(s: &FileStatus) -> Value {
    json!({
        "path": path_text(s), "file_id": s.file_id, "length": s.length, "block_size_bytes": s.block_size_bytes, "folder": s.folder,
        "completed": s.completed, "persisted": s.persisted, "pinned": s.pinned, "ttl_ms": s.ttl_ms, "owner": s.owner, "group": s.group,
        "mode": format!("{:04o}", s.mode), "ufs_path": s.ufs_path, "modified_ms": s.modified_ms, "mount_point": s.mount_point, "to_be_persisted": s.to_be_persisted,
        "replication_min": s.replication_min, "replication_max": s.replication_max,
        "config": s.config.iter().map(|c| (c.name.clone(), Value::from(c.value.clone()))).collect::<serde_json::Map<_, _>>(),
        "ttl_expires_at_ms": s.ttl_expires_at_ms, "ttl_action": if s.ttl_ms < 0 { "none" } else if s.ttl_frees { "free" } else { "delete" },
    })
}

pub async fn ls(fs: &FileSystem, path: &AbsPath, recursive: bool, limit: Option<u32>, output: Output) -> Result<()> {
    let (entries, denied) = match limit {
        Some(limit) => (fs.list_first(path, limit).await?, Vec::new()),
        None => list(fs, path, recursive).await?,
    };
    output.show(&entries.iter().map(status_json).collect(), || {
        output::table(
            &[],
            &[3],
            entries.iter().map(|s| {
                let size = if s.folder { "-".to_owned() } else { s.length.to_string() };
                let state = match (s.folder, s.completed, s.persisted) {
                    (true, ..) if s.mount_point => "MOUNT",
                    (true, ..) => "DIR",
                    (false, false, _) => "WRITING",
                    (false, true, true) => "PERSISTED",
                    (false, true, false) if s.to_be_persisted => "TO_BE_PERSISTED",
                    (false, true, false) => "CACHE_ONLY",
                };
                vec![mode_text(s), s.owner.clone(), s.group.clone(), size, state.to_owned(), time(s.modified_ms), output::printable(&path_text(s))]
            }),
        )
    })?;
    complete(&denied)
}

pub fn blocks_json(blocks: &[BlockInfo], workers: &[WorkerAddress]) -> Value {
    let hosts: HashMap<u64, &WorkerAddress> = workers.iter().map(|w| (w.worker_id, w)).collect();
    let location = |l: &forebay_proto::BlockLocation| {
        let host = hosts.get(&l.worker_id).map_or(String::new(), |w| format!("{}:{}", w.host, w.data_port));
        json!({ "worker": format!("{:016x}", l.worker_id), "host": host, "tier": l.tier, "cached_bytes": l.cached_bytes })
    };
    blocks
        .iter()
        .map(|b| json!({ "id": b.id, "offset": b.offset, "length": b.length, "locations": b.locations.iter().map(location).collect::<Vec<_>>() }))
        .collect()
}

pub async fn stat(fs: &FileSystem, path: &AbsPath, output: Output) -> Result<()> {
    let answer = fs.get_status_with_blocks(path, true).await?;
    let status = answer.status.ok_or_else(|| err!(Internal, "the master answered without a status"))?;
    let mut value = status_json(&status);
    value["cached_percent"] = percent(status.cached_bytes, status.length).into();
    value["mem_percent"] = percent(status.mem_bytes, status.length).into();
    if status.folder {
        value["cached_percent"] = 0.into();
        value["mem_percent"] = 0.into();
    }
    value["blocks"] = blocks_json(&answer.blocks, &answer.workers);
    output.show(&value.clone(), || {
        let rows = value.as_object().into_iter().flatten().filter(|(k, _)| *k != "blocks");
        output::table(&[], &[], rows.map(|(k, v)| vec![k.clone(), v.as_str().map_or_else(|| v.to_string(), str::to_owned)]))?;
        print_blocks(&value["blocks"])
    })
}

fn print_blocks(blocks: &Value) -> Result<()> {
    for block in blocks.as_array().into_iter().flatten() {
        output::line(&format!("block {} at {}, {} bytes", block["id"], block["offset"], block["length"]))?;
        let locations = block["locations"].as_array().map_or(&[][..], Vec::as_slice);
        if locations.is_empty() {
            output::line("    not cached")?;
        }
        for l in locations {
            let text = |key: &str| l[key].as_str().unwrap_or("").to_owned();
            output::line(&format!("    {} bytes in {} of worker {} at {}", l["cached_bytes"], text("tier"), text("worker"), text("host")))?;
        }
    }
    Ok(())
}

pub async fn location(fs: &FileSystem, path: &AbsPath, output: Output) -> Result<()> {
    let answer = fs.get_status_with_blocks(path, true).await?;
    let blocks = blocks_json(&answer.blocks, &answer.workers);
    output.show(&blocks.clone(), || print_blocks(&blocks))
}

pub async fn du(fs: &FileSystem, path: &AbsPath, summary: bool, output: Output) -> Result<()> {
    let (entries, denied) = list(fs, path, true).await?;
    let (mut total, mut cached, mut files) = (0, 0, Vec::new());
    for entry in entries.iter().filter(|e| !e.folder) {
        let path = AbsPath::parse(&entry.path)?;
        let status = fs.get_status_with_blocks(&path, true).await?.status.unwrap_or_default();
        total += status.length;
        cached += status.cached_bytes;
        files.push((path, status));
    }
    let sum = json!({ "path": path.to_string(), "bytes": total, "cached_bytes": cached, "incomplete": !denied.is_empty() });
    let each: Vec<Value> = files.iter().map(|(p, s)| json!({ "path": p.to_string(), "bytes": s.length, "cached_bytes": s.cached_bytes })).collect();
    let json = if summary { sum } else { json!({ "total": sum, "files": each }) };
    output.show(&json, || {
        let row = |size: u64, cached: u64, path: String| {
            vec![bytes(size), format!("{} ({}%)", bytes(cached), percent(cached, size)), output::printable(&path)]
        };
        let mut rows: Vec<Vec<String>> = Vec::new();
        if !summary {
            rows.extend(files.iter().map(|(p, s)| row(s.length, s.cached_bytes, p.to_string())));
        }
        rows.push(row(total, cached, path.to_string()));
        output::table(&["SIZE", "CACHED", "PATH"], &[0, 1], rows)
    })?;
    complete(&denied)
}

pub async fn df(fs: &FileSystem, output: Output) -> Result<()> {
    let report = fs.report().await?;
    let tiers: Vec<_> = report.workers.iter().filter(|w| !w.lost).flat_map(|w| &w.tiers).collect();
    let (total, used): (u64, u64) = (tiers.iter().map(|t| t.total_bytes).sum(), tiers.iter().map(|t| t.used_bytes).sum());
    let json = json!({ "total_bytes": total, "used_bytes": used, "free_bytes": total.saturating_sub(used) });
    output.show(&json, || {
        let row =
            vec![bytes(total), bytes(used), bytes(total.saturating_sub(used)), format!("{}%", if total == 0 { 0 } else { percent(used, total) })];
        output::table(&["SIZE", "USED", "FREE", "USE"], &[0, 1, 2, 3], [row])
    })
}

pub async fn count(fs: &FileSystem, path: &AbsPath, output: Output) -> Result<()> {
    let (mut folders, mut files, mut size) = (0u64, 0u64, 0u64);
    let denied = fs
        .list_each(path, true, |batch| {
            for e in batch {
                if e.folder {
                    folders += 1
                } else {
                    files += 1
                }
                size += e.length;
            }
            Ok(())
        })
        .await?;
    if fs.get_status(path).await?.folder {
        folders += 1;
    }
    output.show(&json!({ "folders": folders, "files": files, "bytes": size }), || {
        output::table(&["FOLDERS", "FILES", "BYTES"], &[0, 1, 2], [vec![folders.to_string(), files.to_string(), size.to_string()]])
    })?;
    complete(&denied)
}
