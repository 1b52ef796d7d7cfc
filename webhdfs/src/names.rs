//! What the master answers itself: names, attributes, sums; and where bytes are to be had.

use crate::Call;
use crate::reply::{Refusal, file_status, json_of};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use forebay_client::FileSystem;
use forebay_common::{AbsPath, ErrorKind, err};
use forebay_proto::{FileStatus, SetAttributesRequest, WorkerReport};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

/// Entries of one part of a long listing, as `dfs.ls.limit` there.
const BATCH_ENTRIES: usize = 1_000;
/// What stands in a path as it is.
pub const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

fn missing(path: &AbsPath) -> Refusal {
    Refusal::of(err!(NotFound, "File does not exist: {path}"))
}

async fn status(call: &Call<'_>) -> Result<FileStatus, Refusal> {
    let found = call.fs.get_status(&call.path).await;
    found.map_err(|e| if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) { missing(&call.path) } else { Refusal::of(e) })
}

async fn children(call: &Call<'_>) -> Result<Vec<Value>, Refusal> {
    let own = status(call).await?;
    if !own.folder {
        return Ok(vec![file_status(&own, "")]);
    }
    let mut all = call.fs.list(&call.path, false).await.map_err(Refusal::of)?;
    all.sort_by(|a, b| a.path.cmp(&b.path));
    let name = |path: &[u8]| String::from_utf8_lossy(path.rsplit(|b| *b == b'/').next().unwrap_or_default()).into_owned();
    Ok(all.iter().map(|status| file_status(status, &name(&status.path))).collect())
}

async fn summary(call: &Call<'_>) -> Result<Value, Refusal> {
    let own = status(call).await?;
    let (mut files, mut folders, mut length, mut space) = (0u64, 0u64, 0u64, 0u64);
    let mut add = |status: &FileStatus| {
        if status.folder {
            folders += 1;
        } else {
            files += 1;
            length = length.saturating_add(status.length);
            space = space.saturating_add(status.length.saturating_mul(u64::from(status.replication_min.max(1))));
        }
    };
    add(&own);
    if own.folder {
        let each = |batch: Vec<FileStatus>| {
            batch.iter().for_each(&mut add);
            Ok(())
        };
        call.fs.list_each(&call.path, true, each).await.map_err(Refusal::of)?;
    }
    Ok(json!({ "ContentSummary": {
        "directoryCount": folders, "fileCount": files, "length": length, "quota": -1, "spaceConsumed": space, "spaceQuota": -1,
        "ecPolicy": "", "typeQuota": {},
    } }))
}

fn target(call: &Call<'_>) -> Result<AbsPath, Refusal> {
    call.params.required("destination")?.parse().map_err(Refusal::of)
}

/// As HDFS's older `rename`: into a folder that is there; false where it cannot be done.
async fn rename(call: &Call<'_>) -> Result<bool, Refusal> {
    let mut target = target(call)?;
    match call.fs.get_status(&target).await {
        Ok(there) if there.folder => {
            let Some(name) = call.path.name() else { return Ok(false) };
            target = target.join(name).map_err(Refusal::of)?;
        }
        Ok(_) => return Ok(target == call.path),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(Refusal::of(e)),
    }
    match call.fs.rename(&call.path, &target, false).await {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists | ErrorKind::InvalidArgument | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Err(e) => Err(Refusal::of(e)),
    }
}

async fn mkdirs(call: &Call<'_>) -> Result<bool, Refusal> {
    let before = call.fs.exists(&call.path).await.map_err(Refusal::of)?;
    call.fs.mkdir(&call.path, true, true).await.map_err(Refusal::of)?;
    if let (false, Some(mode)) = (before, call.params.mode()?) {
        set(call, SetAttributesRequest { mode: Some(mode), ..SetAttributesRequest::default() }).await?;
    }
    Ok(true)
}

async fn set(call: &Call<'_>, request: SetAttributesRequest) -> Result<(), Refusal> {
    call.fs.set_attributes(&call.path, request).await.map(drop).map_err(Refusal::of)
}

async fn delete(call: &Call<'_>) -> Result<bool, Refusal> {
    match call.fs.delete(&call.path, call.params.flag("recursive", false)?).await {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) if e.kind() == ErrorKind::NotEmpty => Err(Refusal::of(err!(NotEmpty, "`{} is non empty': Directory is not empty", call.path))),
        Err(e) => Err(Refusal::of(e)),
    }
}

/// Answers an operation on names.
pub async fn answer(call: Call<'_>, op: &str) -> Result<Response, Refusal> {
    let done = |done: bool| Ok(json_of(&json!({ "boolean": done })));
    let user = call.user;
    match op {
        "GETFILESTATUS" => Ok(json_of(&json!({ "FileStatus": file_status(&status(&call).await?, "") }))),
        "LISTSTATUS" => Ok(json_of(&json!({ "FileStatuses": { "FileStatus": children(&call).await? } }))),
        "LISTSTATUS_BATCH" => {
            let after = call.params.get("startafter").unwrap_or_default();
            let all: Vec<Value> = children(&call).await?.into_iter().filter(|s| after.is_empty() || s["pathSuffix"].as_str() > Some(after)).collect();
            let left = all.len().saturating_sub(BATCH_ENTRIES);
            let part: Vec<Value> = all.into_iter().take(BATCH_ENTRIES).collect();
            Ok(json_of(&json!({ "DirectoryListing": { "partialListing": { "FileStatuses": { "FileStatus": part } }, "remainingEntries": left } })))
        }
        "GETCONTENTSUMMARY" => Ok(json_of(&summary(&call).await?)),
        "GETHOMEDIRECTORY" => Ok(json_of(&json!({ "Path": format!("/user/{user}") }))),
        "GETTRASHROOT" => Ok(json_of(&json!({ "Path": format!("/user/{user}/.Trash") }))),
        "GETDELEGATIONTOKEN" => Ok(json_of(&json!({ "Token": null }))),
        "GETSERVERDEFAULTS" => Ok(json_of(&json!({ "FsServerDefaults": {
            "replication": 3, "encryptDataTransfer": false, "defaultStoragePolicyId": 7, "writePacketSize": 65_536, "fileBufferSize": 4_096,
            "checksumType": 2, "trashInterval": 0, "keyProviderUri": "", "blockSize": 134_217_728, "bytesPerChecksum": 512,
        } }))),
        "MKDIRS" => done(mkdirs(&call).await?),
        "RENAME" => done(rename(&call).await?),
        "DELETE" => done(delete(&call).await?),
        "SETPERMISSION" => {
            let mode = call.params.mode()?.unwrap_or(0o755);
            status(&call).await?;
            set(&call, SetAttributesRequest { mode: Some(mode), ..SetAttributesRequest::default() }).await?;
            Ok(StatusCode::OK.into_response())
        }
        "SETOWNER" => {
            let (owner, group) = (call.params.get("owner").map(str::to_owned), call.params.get("group").map(str::to_owned));
            if owner.is_none() && group.is_none() {
                return Err(Refusal::of(err!(InvalidArgument, "Both owner and group are empty.")));
            }
            status(&call).await?;
            set(&call, SetAttributesRequest { owner, group, ..SetAttributesRequest::default() }).await?;
            Ok(StatusCode::OK.into_response())
        }
        "SETTIMES" => {
            status(&call).await?;
            let given = call.params.get("modificationtime").filter(|text| *text != "-1").map(str::to_owned);
            if given.is_some() {
                let modified_ms = call.params.number("modificationtime")?;
                set(&call, SetAttributesRequest { modified_ms, ..SetAttributesRequest::default() }).await?;
            }
            Ok(StatusCode::OK.into_response())
        }
        _ => {
            let more = "hdfs:// has more";
            Err(Refusal::of(err!(
                Unsupported,
                "{op} is not offered over WebHDFS: reading, writing, listing, status, sums, attributes, rename and delete are; {more}"
            )))
        }
    }
}

/// Sends the caller to a worker: of a file that is read to one that has the bytes, else to any. `own` asks on the cluster's behalf.
pub async fn redirect(call: Call<'_>, op: &str, own: &FileSystem) -> Result<Response, Refusal> {
    let mut holders = Vec::new();
    if op == "OPEN" {
        let found = status(&call).await?;
        if found.folder {
            return Err(Refusal::of(err!(NotFound, "Path is not a file: {}", call.path)));
        }
        let offset = call.params.number("offset")?.unwrap_or(0);
        if offset > found.length {
            return Err(Refusal::io(format!("Offset={offset} out of the range [0, {}); {op}, path={}", found.length, call.path)));
        }
        let with_blocks = call.fs.get_status_with_blocks(&call.path, true).await.map_err(Refusal::of)?;
        let block = with_blocks.blocks.iter().find(|b| (b.offset..b.offset + b.length.max(1)).contains(&offset));
        holders.extend(block.into_iter().flat_map(|b| b.locations.iter().map(|l| l.worker_id)));
    }
    let report = own.report().await.map_err(Refusal::of)?;
    let here: Vec<&WorkerReport> = report.workers.iter().filter(|w| !w.lost && w.address.as_ref().is_some_and(|a| a.web_port > 0)).collect();
    let has = |worker: &&&WorkerReport| worker.address.as_ref().is_some_and(|a| holders.contains(&a.worker_id));
    let chosen = here.iter().find(has).or_else(|| here.get(rand_index(here.len())));
    let address = chosen
        .and_then(|w| w.address.as_ref())
        .ok_or_else(|| Refusal::of(err!(Unavailable, "Failed to find datanode, suggest to check cluster health.")))?;
    let path = utf8_percent_encode(&String::from_utf8_lossy(call.path.as_bytes()), PATH).to_string();
    let location = format!("http://{}:{}/webhdfs/v1{path}?{}", address.host, address.web_port, call.params.encode());
    if call.params.flag("noredirect", false)? {
        return Ok(json_of(&json!({ "Location": location })));
    }
    Ok((StatusCode::TEMPORARY_REDIRECT, [("location", location), ("content-type", "application/octet-stream".to_owned())]).into_response())
}

/// Any of `count`.
fn rand_index(count: usize) -> usize {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos() as usize);
    now / 1_000 % count.max(1)
}
