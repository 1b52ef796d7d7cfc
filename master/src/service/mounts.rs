//! Mounting: the store must answer first, and must not overlap one that is mounted.

use crate::core::Core;
use crate::mount::{MountOptions, raw};
use crate::store::Reader;
use forebay_common::{AbsPath, Result, err};
use forebay_proto::journal::{self, command::Op};
use forebay_proto::{Caller, Done, ListMountsRequest, ListMountsResponse, MountPoint, UpdateMountRequest, store};
use forebay_ufs::{UfsUri, UnderStore};
use std::collections::HashMap;

/// Checks a store, then mounts it. `caller` is `None` for mounts of the configuration.
pub async fn mount(core: &Core, caller: Option<&Caller>, path: &AbsPath, uri: &str, read_only: bool, options: HashMap<String, String>) -> Result<()> {
    let uri = UfsUri::parse(uri)?;
    answering(core, path, &uri, &options).await?;
    for other in core.store.view().mounts()? {
        let theirs = other.uri.clone();
        let nested = |a: &str, b: &str| a == b || a.starts_with(&format!("{}/", b.trim_end_matches('/')));
        if nested(&theirs, &uri.to_string()) || nested(&uri.to_string(), &theirs) {
            return Err(err!(
                AlreadyExists,
                "{uri} overlaps {theirs}, which is mounted on {}: the same object would be cached twice and change behind the other's back",
                String::from_utf8_lossy(&other.path)
            ));
        }
    }
    let op = Op::AddMount(journal::AddMount { path: raw(path), uri: uri.to_string(), read_only, options });
    match caller {
        Some(_) => core.change(caller, op).await.map(drop),
        None => core.own_change(op).await.map(drop),
    }
}

/// Changes some options of a mount, for a caller.
pub async fn change(core: &Core, request: UpdateMountRequest) -> Result<Done> {
    let who = core.who(request.caller.as_ref())?;
    if !who.superuser {
        return Err(err!(PermissionDenied, "user {} is not a superuser: only those change mounts", who.user));
    }
    let path = AbsPath::parse(&request.path)?;
    let known = core.store.view().mounts()?.into_iter().find(|m| m.path == path.as_bytes());
    let known = known.ok_or_else(|| err!(NotFound, "{path} is not a mount: `forebay fs mount` lists them"))?;
    let mut options = known.options;
    for name in &request.unset {
        if options.remove(name).is_none() {
            return Err(err!(InvalidArgument, "{path} has no option {name} that could be taken away"));
        }
    }
    options.extend(request.set);
    let uri = UfsUri::parse(&known.uri)?;
    answering(core, &path, &uri, &options).await?;
    let read_only = request.read_only.unwrap_or(known.read_only);
    let op = Op::UpdateMount(journal::UpdateMount { path: raw(&path), read_only, options });
    core.change(request.caller.as_ref(), op).await?;
    Ok(Done {})
}

/// Gives a mount other options, once the store has answered to them.
pub async fn update(core: &Core, path: &AbsPath, uri: &UfsUri, read_only: bool, options: HashMap<String, String>) -> Result<()> {
    answering(core, path, uri, &options).await?;
    core.own_change(Op::UpdateMount(journal::UpdateMount { path: raw(path), read_only, options })).await.map(drop)
}

/// Errors: options that are none, a store that does not answer.
async fn answering(core: &Core, path: &AbsPath, uri: &UfsUri, options: &HashMap<String, String>) -> Result<()> {
    let parsed = MountOptions::parse(options, &core.config)?;
    let ufs = UnderStore::open(uri, &parsed.ufs).map_err(|e| e.context(format!("mounting {uri}")))?;
    ufs.check().await.map_err(|e| e.context(format!("mounting {uri} on {path}: the store must answer before it is mounted")))
}

/// The mount table, secrets hidden.
pub fn list(core: &Core, request: &ListMountsRequest) -> Result<ListMountsResponse> {
    core.who(request.caller.as_ref())?;
    let mut mounts = core.store.view().mounts()?;
    mounts.sort_by(|a, b| a.path.cmp(&b.path));
    let hide = |(name, value): (String, String)| {
        let shown = if forebay_common::config::is_secret_option(&name) { forebay_common::config::REDACTED.to_owned() } else { value };
        (name, shown)
    };
    let shown = |m: store::Mount| MountPoint {
        mount_id: m.id,
        path: m.path,
        uri: m.uri,
        read_only: m.read_only,
        options: m.options.into_iter().map(hide).collect(),
    };
    Ok(ListMountsResponse { mounts: mounts.into_iter().map(shown).collect() })
}
