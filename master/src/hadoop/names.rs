//! What is there, and changes of names.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::locate;
use super::status::{self, NO_QUOTA};
use crate::mount::{self, Resolved, Told};
use crate::namespace::{self, EXECUTE, READ};
use crate::store::Reader;
use forebay_common::{AbsPath, ErrorKind, InodeId, Result};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::store::Inode;
use forebay_proto::{DeleteRequest, MkdirRequest, RenameRequest};
use prost::Message;
use tokio::sync::mpsc;

type Answer<T> = Result<T, Thrown>;

/// Entries of one listing, as `dfs.ls.limit`.
const LISTING_ENTRIES: usize = 1_000;
/// Located blocks of one listing, after which it ends early.
const LISTING_BLOCKS: usize = 10_000;
async fn status_of(h: &Hadoop, a: &Asker, src: &str, located: bool) -> Answer<Option<wire::HdfsFileStatusProto>> {
    let Some((path, resolved)) = h.look(a, src).await? else { return Ok(None) };
    let found = resolved.found(&path)?;
    let locations = if located && !found.inode.folder { Some(locate::all_blocks(h, a, &path, &found.inode, &resolved)?) } else { None };
    Ok(Some(status::encode(b"", &found.inode, locations)))
}

pub async fn get_file_info(h: &Hadoop, a: &Asker, r: wire::GetFileInfoRequestProto) -> Answer<wire::GetFileInfoResponseProto> {
    Ok(wire::GetFileInfoResponseProto { fs: status_of(h, a, &r.src, false).await? })
}

pub async fn get_file_link_info(h: &Hadoop, a: &Asker, r: wire::GetFileLinkInfoRequestProto) -> Answer<wire::GetFileLinkInfoResponseProto> {
    Ok(wire::GetFileLinkInfoResponseProto { fs: status_of(h, a, &r.src, false).await? })
}

pub async fn get_located_file_info(h: &Hadoop, a: &Asker, r: wire::GetLocatedFileInfoRequestProto) -> Answer<wire::GetLocatedFileInfoResponseProto> {
    Ok(wire::GetLocatedFileInfoResponseProto { fs: status_of(h, a, r.src(), true).await? })
}

pub async fn get_listing(h: &Hadoop, a: &Asker, r: wire::GetListingRequestProto) -> Answer<wire::GetListingResponseProto> {
    let Some((path, resolved)) = h.look(a, &r.src).await? else { return Ok(wire::GetListingResponseProto { dir_list: None }) };
    let found = resolved.found(&path)?;
    let located = |path: &AbsPath, inode: &Inode, resolved: &Resolved| -> Answer<Option<wire::LocatedBlocksProto>> {
        if r.need_location && !inode.folder { Ok(Some(locate::all_blocks(h, a, path, inode, resolved)?)) } else { Ok(None) }
    };
    if !found.inode.folder {
        let entry = status::encode(b"", &found.inode, located(&path, &found.inode, &resolved)?);
        return Ok(wire::GetListingResponseProto {
            dir_list: Some(wire::DirectoryListingProto { partial_listing: vec![entry], remaining_entries: 0 }),
        });
    }
    namespace::check(&h.core.identity.who(&a.user), &found.inode, READ | EXECUTE, &path)?;
    // The pages that follow are of the same look.
    if r.start_after.is_empty() {
        h.core.syncer.sync_folder(&h.core, &path, &resolved).await?;
    }
    let after = if r.start_after.is_empty() { None } else { Some(&r.start_after[..]) };
    let mut children = h.core.store.view().children(found.id(), after, LISTING_ENTRIES + 1)?;
    let mut more = children.len() > LISTING_ENTRIES;
    children.truncate(LISTING_ENTRIES);
    let (mut entries, mut blocks) = (Vec::with_capacity(children.len()), 0);
    for (name, inode) in children {
        if blocks > LISTING_BLOCKS {
            more = true;
            break;
        }
        let child = path.join(&name)?;
        let locations = if r.need_location && !inode.folder { Some(locate::all_blocks_below(h, a, &child, &inode, &resolved)?) } else { None };
        blocks += locations.as_ref().map_or(0, |l| l.blocks.len());
        entries.push(status::encode(&name, &inode, locations));
    }
    // Clients only look whether it is 0.
    let listing = wire::DirectoryListingProto { partial_listing: entries, remaining_entries: u32::from(more) };
    Ok(wire::GetListingResponseProto { dir_list: Some(listing) })
}

/// Folders of one call.
const BATCHED_PATHS: usize = 100;

/// Several folders in one answer; where it ends, the client asks again from there.
pub async fn get_batched_listing(h: &Hadoop, a: &Asker, r: wire::GetBatchedListingRequestProto) -> Answer<wire::GetBatchedListingResponseProto> {
    if r.paths.len() > BATCHED_PATHS {
        return Err(Thrown::io(format!("{} paths in one batched listing: {BATCHED_PATHS} are allowed", r.paths.len())));
    }
    let from = match r.start_after.is_empty() {
        true => wire::BatchedListingKeyProto::default(),
        false => wire::BatchedListingKeyProto::decode(r.start_after.clone()).map_err(|e| Thrown::io(format!("not where a listing ended: {e}")))?,
    };
    let (mut listings, mut entries, mut after) = (Vec::new(), 0, from.start_after.clone());
    for (index, src) in r.paths.iter().enumerate().skip(from.path_index as usize) {
        let request = wire::GetListingRequestProto { src: src.clone(), start_after: after.clone(), need_location: r.need_location };
        let listed = match get_listing(h, a, request).await {
            Ok(listed) => listed.dir_list.ok_or_else(|| Thrown::not_found(format!("File {src} does not exist"))),
            Err(e) => Err(e),
        };
        let parent_idx = u32::try_from(index).unwrap_or(u32::MAX);
        let listed = match listed {
            Ok(listed) => listed,
            // Of this folder alone.
            Err(e) => {
                let exception = Some(wire::RemoteExceptionProto { class_name: e.class.to_owned(), message: Some(e.message) });
                listings.push(wire::BatchedDirectoryListingProto { partial_listing: Vec::new(), parent_idx, exception });
                after = bytes::Bytes::new();
                continue;
            }
        };
        entries += listed.partial_listing.len();
        let last = listed.partial_listing.last().map(|entry| entry.path.clone()).unwrap_or_default();
        let more_here = listed.remaining_entries > 0;
        listings.push(wire::BatchedDirectoryListingProto { partial_listing: listed.partial_listing, parent_idx, exception: None });
        if more_here || (entries >= LISTING_ENTRIES && index + 1 < r.paths.len()) {
            let (path_index, start_after) = if more_here { (parent_idx, last) } else { (parent_idx + 1, bytes::Bytes::new()) };
            let key = wire::BatchedListingKeyProto { checksum: bytes::Bytes::new(), path_index, start_after };
            return Ok(wire::GetBatchedListingResponseProto { listings, has_more: true, start_after: key.encode_to_vec().into() });
        }
        after = bytes::Bytes::new();
    }
    Ok(wire::GetBatchedListingResponseProto { listings, has_more: false, start_after: bytes::Bytes::new() })
}

/// Entries that wait to be added up.
const SUM_QUEUE: usize = 1_024;

/// What a tree holds.
#[derive(Default)]
struct Sums {
    length: u64,
    files: u64,
    folders: u64,
    space: u64,
    quota_names: u64,
    quota_bytes: u64,
}

/// Adds up a tree, in step with its under store. Errors: a folder that the caller may not list.
async fn sums_of(h: &Hadoop, a: &Asker, src: &str) -> Answer<Sums> {
    let (path, resolved) = h.find(a, src).await?;
    let top = resolved.found(&path)?.inode.clone();
    let given = |quota: u64| if quota > 0 { quota } else { NO_QUOTA };
    let mut sums = Sums { quota_names: given(top.quota_names), quota_bytes: given(top.quota_bytes), ..Sums::default() };
    let mut add = |inode: &Inode| {
        if inode.folder {
            sums.folders += 1;
        } else {
            sums.files += 1;
            sums.length = sums.length.saturating_add(inode.length);
            sums.space = sums.space.saturating_add(inode.length.saturating_mul(u64::from(status::replication(inode))));
        }
    };
    add(&top);
    if top.folder {
        let (core, who) = (h.core.clone(), h.core.identity.who(&a.user));
        let (sender, mut receiver) = mpsc::channel::<Told>(SUM_QUEUE);
        let walking = tokio::spawn(async move { mount::entries(&core, &who, path, &sender).await });
        while let Some(told) = receiver.recv().await {
            match told {
                Ok(entry) => add(&entry.inode),
                // The walk ends with its receiver.
                Err((_, e)) => return Err(e.into()),
            }
        }
        walking.await.map_err(|e| forebay_common::err!(Internal, "summing up: {e}"))?;
    }
    Ok(sums)
}

pub async fn get_content_summary(h: &Hadoop, a: &Asker, r: wire::GetContentSummaryRequestProto) -> Answer<wire::GetContentSummaryResponseProto> {
    let sums = sums_of(h, a, &r.path).await?;
    let summary = wire::ContentSummaryProto {
        length: sums.length,
        file_count: sums.files,
        directory_count: sums.folders,
        quota: sums.quota_names,
        space_consumed: sums.space,
        space_quota: sums.quota_bytes,
        snapshot_length: Some(0),
        snapshot_file_count: Some(0),
        snapshot_directory_count: Some(0),
        snapshot_space_consumed: Some(0),
        erasure_coding_policy: Some(String::new()),
        ..wire::ContentSummaryProto::default()
    };
    Ok(wire::GetContentSummaryResponseProto { summary })
}

pub async fn get_quota_usage(h: &Hadoop, a: &Asker, r: wire::GetQuotaUsageRequestProto) -> Answer<wire::GetQuotaUsageResponseProto> {
    let sums = sums_of(h, a, &r.path).await?;
    let usage = wire::QuotaUsageProto {
        file_and_directory_count: sums.files + sums.folders,
        quota: sums.quota_names,
        space_consumed: sums.space,
        space_quota: sums.quota_bytes,
        type_quota_infos: None,
    };
    Ok(wire::GetQuotaUsageResponseProto { usage })
}

pub async fn mkdirs(h: &Hadoop, a: &Asker, r: wire::MkdirsRequestProto) -> Answer<wire::MkdirsResponseProto> {
    let (path, resolved) = h.resolve(a, &r.src).await?;
    if resolved.walk.is_complete() {
        if resolved.found(&path)?.inode.folder {
            return Ok(wire::MkdirsResponseProto { result: true });
        }
        return Err(Thrown::exists(format!("Path is not a directory: {path}")));
    }
    let request = MkdirRequest {
        caller: Some(a.caller(0)),
        path: path.as_bytes().to_vec().into(),
        recursive: r.create_parent,
        exist_ok: true,
        mode: r.masked.perm & 0o1777,
        unmasked_mode: r.unmasked.as_ref().map_or(0, |unmasked| unmasked.perm & 0o1777),
    };
    h.fs.mkdir_inner(request).await?;
    Ok(wire::MkdirsResponseProto { result: true })
}

/// As Java's own exception says it; a stack follows there.
fn not_empty(path: &AbsPath) -> Thrown {
    Thrown::from(forebay_common::err!(NotEmpty, "`{path} is non empty': Directory is not empty\n"))
}

pub async fn delete(h: &Hadoop, a: &Asker, r: wire::DeleteRequestProto) -> Answer<wire::DeleteResponseProto> {
    let path = h.path(&r.src)?;
    if path.is_root() {
        let empty = h.core.store.view().children(InodeId::ROOT, None, 1)?.is_empty();
        // Never deleted; a real one says so in these two ways.
        return if r.recursive || empty { Ok(wire::DeleteResponseProto { result: false }) } else { Err(not_empty(&path)) };
    }
    let request = DeleteRequest { caller: Some(a.caller(0)), path: path.as_bytes().to_vec().into(), recursive: r.recursive };
    match h.fs.delete_inner(request).await {
        Ok(_) => Ok(wire::DeleteResponseProto { result: true }),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(wire::DeleteResponseProto { result: false }),
        Err(e) if e.kind() == ErrorKind::NotEmpty => Err(not_empty(&path)),
        Err(e) => Err(e.into()),
    }
}

/// The first form, which answers `false` where the other throws, and moves into a folder that is there.
pub async fn rename(h: &Hadoop, a: &Asker, r: wire::RenameRequestProto) -> Answer<wire::RenameResponseProto> {
    let no = Ok(wire::RenameResponseProto { result: false });
    let (source, from) = h.resolve(a, &r.src).await?;
    let (mut target, mut to) = h.resolve(a, &r.dst).await?;
    // Asked again after it was done: the remembered answer counts, whatever is there by now.
    let request = |target: &AbsPath| RenameRequest {
        caller: Some(a.caller(0)),
        source: source.as_bytes().to_vec().into(),
        target: target.as_bytes().to_vec().into(),
        overwrite: false,
    };
    if !from.walk.is_complete() {
        return match h.fs.rename_inner(request(&target)).await {
            Ok(_) => Ok(wire::RenameResponseProto { result: true }),
            Err(e) if e.kind() == ErrorKind::NotFound => no,
            Err(e) => Err(e.into()),
        };
    }
    if source.is_root() {
        return no;
    }
    if to.walk.is_complete() && to.found(&target)?.inode.folder && target != source {
        let Some(name) = source.name() else { return no };
        (target, to) = h.resolve(a, &String::from_utf8_lossy(target.join(name)?.as_bytes())).await?;
    }
    if source == target {
        return Ok(wire::RenameResponseProto { result: !from.found(&source)?.inode.folder });
    }
    if to.walk.is_complete() || to.walk.missing.len() > 1 || target.starts_with(&source) {
        return no;
    }
    h.fs.rename_inner(request(&target)).await?;
    Ok(wire::RenameResponseProto { result: true })
}

pub async fn rename2(h: &Hadoop, a: &Asker, r: wire::Rename2RequestProto) -> Answer<wire::Rename2ResponseProto> {
    let (source, target) = (h.path(&r.src)?, h.path(&r.dst)?);
    if source == target {
        return Err(Thrown::exists(format!("The source {source} and destination {target} are the same")));
    }
    let request = RenameRequest {
        caller: Some(a.caller(0)),
        source: source.as_bytes().to_vec().into(),
        target: target.as_bytes().to_vec().into(),
        overwrite: r.overwrite_dest,
    };
    let (_, from) = h.resolve(a, &r.src).await?;
    if !from.walk.is_complete() {
        // Asked again after it was done: the remembered answer counts.
        return match h.fs.rename_inner(request).await {
            Ok(_) => Ok(wire::Rename2ResponseProto {}),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(Thrown::not_found(format!("rename source {source} is not found."))),
            Err(e) => Err(e.into()),
        };
    }
    h.resolve(a, &r.dst).await?;
    match h.fs.rename_inner(request).await {
        Ok(_) => Ok(wire::Rename2ResponseProto {}),
        Err(e) => Err(match e.kind() {
            ErrorKind::AlreadyExists => Thrown::exists(format!("rename destination {target} already exists")),
            ErrorKind::NotEmpty => Thrown::io(format!("rename destination directory is not empty: {target}")),
            ErrorKind::IsADirectory => Thrown::io(format!("Source {source} and destination {target} must both be directories")),
            ErrorKind::NotADirectory => Thrown::io(format!("Source {source} and destination {target} must both be directories")),
            ErrorKind::NotFound => {
                Thrown::not_found(format!("rename destination parent {} not found.", target.parent().unwrap_or_else(AbsPath::root)))
            }
            ErrorKind::InvalidArgument => Thrown::io(e.message()),
            _ => e.into(),
        }),
    }
}

pub async fn is_file_closed(h: &Hadoop, a: &Asker, r: wire::IsFileClosedRequestProto) -> Answer<wire::IsFileClosedResponseProto> {
    let (path, resolved) = h.find(a, &r.src).await?;
    let inode = &resolved.found(&path)?.inode;
    if inode.folder {
        return Err(Thrown::not_found(format!("Path is not a file: {path}")));
    }
    Ok(wire::IsFileClosedResponseProto { result: inode.completed })
}

pub async fn check_access(h: &Hadoop, a: &Asker, r: wire::CheckAccessRequestProto) -> Answer<wire::CheckAccessResponseProto> {
    let (path, resolved) = h.find(a, &r.path).await?;
    // The bits are those of a mode: read 4, write 2, execute 1.
    namespace::check(&h.core.identity.who(&a.user), &resolved.found(&path)?.inode, r.mode as u32 & 7, &path)?;
    Ok(wire::CheckAccessResponseProto {})
}

pub async fn get_preferred_block_size(
    h: &Hadoop,
    a: &Asker,
    r: wire::GetPreferredBlockSizeRequestProto,
) -> Answer<wire::GetPreferredBlockSizeResponseProto> {
    let (path, resolved) = h.find(a, &r.filename).await?;
    Ok(wire::GetPreferredBlockSizeResponseProto { bsize: resolved.found(&path)?.inode.block_size_bytes })
}
