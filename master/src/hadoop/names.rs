//! What is there, and changes of names.

use super::Hadoop;
use super::asker::Asker;
use super::exception::Thrown;
use super::status::{self, NO_QUOTA};
use super::{check_no_file_above, locate};
use crate::core::Core;
use crate::mount::Resolved;
use crate::namespace::{self, EXECUTE, READ, Who};
use crate::store::Reader;
use forebay_common::{AbsPath, ErrorKind, InodeId, Result};
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_proto::store::Inode;
use forebay_proto::{DeleteRequest, MkdirRequest, RenameRequest};

type Answer<T> = Result<T, Thrown>;

/// Entries of one listing, as `dfs.ls.limit`.
const LISTING_ENTRIES: usize = 1_000;
/// Located blocks of one listing, after which it ends early.
const LISTING_BLOCKS: usize = 10_000;
/// Children that are counted for a status; a folder with more is told to have that many.
const CHILDREN_COUNTED: usize = 10_000;

async fn status_of(h: &Hadoop, a: &Asker, src: &str, located: bool) -> Answer<Option<wire::HdfsFileStatusProto>> {
    let (path, resolved) = h.resolve(a, src).await?;
    if !resolved.walk.is_complete() {
        return Ok(None);
    }
    let found = resolved.found(&path)?;
    let children = if found.inode.folder { Some(h.core.store.view().children(found.id(), None, CHILDREN_COUNTED)?.len()) } else { None };
    let locations = if located && !found.inode.folder { Some(locate::all_blocks(h, a, &path, &found.inode, &resolved)?) } else { None };
    Ok(Some(status::encode(b"", &found.inode, children, locations)))
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
    let (path, resolved) = h.resolve(a, &r.src).await?;
    if !resolved.walk.is_complete() {
        return Ok(wire::GetListingResponseProto { dir_list: None });
    }
    let found = resolved.found(&path)?;
    let located = |path: &AbsPath, inode: &Inode, resolved: &Resolved| -> Answer<Option<wire::LocatedBlocksProto>> {
        if r.need_location && !inode.folder { Ok(Some(locate::all_blocks(h, a, path, inode, resolved)?)) } else { Ok(None) }
    };
    if !found.inode.folder {
        let entry = status::encode(b"", &found.inode, None, located(&path, &found.inode, &resolved)?);
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
        entries.push(status::encode(&name, &inode, None, locations));
    }
    // Clients only look whether it is 0.
    let listing = wire::DirectoryListingProto { partial_listing: entries, remaining_entries: u32::from(more) };
    Ok(wire::GetListingResponseProto { dir_list: Some(listing) })
}

/// What a tree holds.
#[derive(Default)]
struct Sums {
    length: u64,
    files: u64,
    folders: u64,
    space: u64,
}

/// Adds up a tree as it is known. Errors: a folder that the caller may not list.
fn sum(core: &Core, who: &Who, path: &AbsPath, top: &Inode) -> Result<Sums> {
    let mut sums = Sums::default();
    let mut add = |inode: &Inode| {
        if inode.folder {
            sums.folders += 1;
        } else {
            sums.files += 1;
            sums.length += inode.length;
            sums.space += inode.length * u64::from(status::replication(inode));
        }
    };
    add(top);
    let mut folders = if top.folder { vec![(path.clone(), top.clone())] } else { Vec::new() };
    while let Some((at, folder)) = folders.pop() {
        namespace::check(who, &folder, READ | EXECUTE, &at)?;
        let mut after: Option<Vec<u8>> = None;
        loop {
            let children = core.store.view().children(InodeId(folder.id), after.as_deref(), LISTING_ENTRIES)?;
            let whole = children.len() < LISTING_ENTRIES;
            after = children.last().map(|(name, _)| name.clone());
            for (name, inode) in children {
                add(&inode);
                if inode.folder {
                    folders.push((at.join(&name)?, inode));
                }
            }
            if whole {
                break;
            }
        }
    }
    Ok(sums)
}

async fn sums_of(h: &Hadoop, a: &Asker, src: &str) -> Answer<Sums> {
    let (path, resolved) = h.find(a, src).await?;
    let inode = resolved.found(&path)?.inode.clone();
    if inode.folder {
        h.core.syncer.sync_folder(&h.core, &path, &resolved).await?;
    }
    let (core, who) = (h.core.clone(), h.core.identity.who(&a.user));
    let summed = tokio::task::spawn_blocking(move || sum(&core, &who, &path, &inode)).await;
    Ok(summed.map_err(|e| forebay_common::err!(Internal, "summing up: {e}"))??)
}

pub async fn get_content_summary(h: &Hadoop, a: &Asker, r: wire::GetContentSummaryRequestProto) -> Answer<wire::GetContentSummaryResponseProto> {
    let sums = sums_of(h, a, &r.path).await?;
    let summary = wire::ContentSummaryProto {
        length: sums.length,
        file_count: sums.files,
        directory_count: sums.folders,
        quota: NO_QUOTA,
        space_consumed: sums.space,
        space_quota: NO_QUOTA,
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
        quota: NO_QUOTA,
        space_consumed: sums.space,
        space_quota: NO_QUOTA,
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
    };
    h.fs.mkdir_inner(request).await?;
    Ok(wire::MkdirsResponseProto { result: true })
}

pub async fn delete(h: &Hadoop, a: &Asker, r: wire::DeleteRequestProto) -> Answer<wire::DeleteResponseProto> {
    let path = h.path(&r.src)?;
    let request = DeleteRequest { caller: Some(a.caller(0)), path: path.as_bytes().to_vec().into(), recursive: r.recursive };
    match h.fs.delete_inner(request).await {
        Ok(_) => Ok(wire::DeleteResponseProto { result: true }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(wire::DeleteResponseProto { result: false }),
        Err(e) if e.kind() == ErrorKind::NotEmpty => {
            Err(Thrown { message: format!("{path} is non empty"), ..Thrown::from(e) }.named("org.apache.hadoop.fs.PathIsNotEmptyDirectoryException"))
        }
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
            Err(_) => no,
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
    match h.fs.rename_inner(request).await {
        Ok(_) => Ok(wire::Rename2ResponseProto {}),
        Err(e) if matches!(e.kind(), ErrorKind::NotEmpty | ErrorKind::IsADirectory | ErrorKind::NotADirectory) => {
            let (_, above) = h.resolve(a, &r.dst).await?;
            check_no_file_above(&above.walk, &target)?;
            Err(Thrown::io(format!("rename destination: {}", e.message())))
        }
        Err(e) if e.kind() == ErrorKind::InvalidArgument => Err(Thrown::io(e.message())),
        Err(e) => Err(e.into()),
    }
}

pub async fn is_file_closed(h: &Hadoop, a: &Asker, r: wire::IsFileClosedRequestProto) -> Answer<wire::IsFileClosedResponseProto> {
    let (path, resolved) = h.find(a, &r.src).await?;
    Ok(wire::IsFileClosedResponseProto { result: resolved.found(&path)?.inode.completed })
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
