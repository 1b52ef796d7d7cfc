//! Names: made, moved, taken away. The second part of `Mount`.
//!
//! A file that is being made has no complete content that could be moved: it is handed over first. A name is changed with the locks of all files held that the
//! change is about, so that nothing is handed over to a name that leads elsewhere by then. What somebody reads through this process is moved out of sight before its name is taken away.

use crate::attributes::Names;
use crate::mount::{HIDDEN, Handle, Mount, New, hidden};
use crate::nodes::{Node, Opened, Use};
use crate::staged::Attributes;
use forebay_common::{AbsPath, ErrorKind, Result, err};
use forebay_proto::{FileStatus, XAttr};
use std::sync::Arc;

impl Mount {
    /// Gives the caller what it makes, where this process makes it as somebody else and may give it away.
    pub async fn own(&self, path: &AbsPath, status: FileStatus, uid: u32, gid: u32, mode: u32) -> Result<FileStatus> {
        let wanted = Attributes {
            owner: (self.names.uid(&status.owner) != uid).then(|| Names::user(uid)),
            group: (self.names.gid(&status.group) != gid).then(|| Names::group(gid)),
            mode: (status.mode & 0o7777 != mode & 0o7777).then_some(mode & 0o7777),
            modified: None,
            accessed: None,
        };
        if wanted.is_empty() {
            return Ok(status);
        }
        match self.fs.set_attributes(path, wanted.request()).await {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                tracing::debug!(error = %e, %path, "what was made belongs to whom the master takes this mount for");
                Ok(status)
            }
            other => other,
        }
    }

    /// Whose a new entry is: in a folder with the set-group-id bit the folder's group's.
    pub fn group_of_new(&self, parent: &Node, gid: u32) -> (u32, bool) {
        let status = parent.status();
        let inherits = status.mode & 0o2000 != 0;
        (if inherits { self.names.gid(&status.group) } else { gid }, inherits)
    }

    pub async fn mkdir(&self, new: New) -> Result<Arc<Node>> {
        let New { parent, name, mode, uid, gid } = &new;
        let (parent, name, uid) = (*parent, name.as_slice(), *uid);
        self.check_writable()?;
        Self::check_name(name)?;
        let path = self.nodes.path_below(parent, name)?;
        let (gid, inherits) = self.group_of_new(&*self.nodes.get(parent)?, *gid);
        let mode = mode & 0o7777 | if inherits { 0o2000 } else { 0 };
        let status = self.fs.mkdir_as(&path, false, false, mode).await?;
        let status = self.own(&path, status, uid, gid, mode).await?;
        self.nodes.removed(parent, name);
        Ok(self.nodes.show(parent, name, status))
    }

    /// A regular file that nobody opens, a pipe, a socket, a device.
    pub async fn mknod(&self, new: New, device: u64) -> Result<Arc<Node>> {
        let kind = new.mode >> 12;
        if kind != 0 && kind != nix::libc::S_IFREG >> 12 {
            return self.make_node(&new, kind, b"", device).await;
        }
        let exclusive = nix::libc::O_EXCL | nix::libc::O_WRONLY;
        let (node, handle, _) = self.create(&new, exclusive).await?;
        if let Err(e) = self.release(handle).await {
            self.nodes.forget(node.id, 1);
            return Err(e);
        }
        Ok(node)
    }

    pub async fn symlink(&self, new: New, target: &[u8]) -> Result<Arc<Node>> {
        self.make_node(&new, nix::libc::S_IFLNK >> 12, target, 0).await
    }

    async fn make_node(&self, new: &New, kind: u32, target: &[u8], device: u64) -> Result<Arc<Node>> {
        self.check_writable()?;
        Self::check_name(&new.name)?;
        let path = self.nodes.path_below(new.parent, &new.name)?;
        let (gid, _) = self.group_of_new(&*self.nodes.get(new.parent)?, new.gid);
        let mode = new.mode & 0o7777;
        let status = self.fs.make_node(&path, kind, mode, target, device).await?;
        let status = self.own(&path, status, new.uid, gid, mode).await?;
        self.nodes.removed(new.parent, &new.name);
        Ok(self.nodes.show(new.parent, &new.name, status))
    }

    /// Where a link leads.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>> {
        let status = self.nodes.get(id)?.status();
        if status.target.is_empty() { Err(err!(InvalidArgument, "no link")) } else { Ok(status.target.to_vec()) }
    }

    /// Readers that fetch bytes as they go must not lose the file: it is moved out of sight until they are done. `opened` is `node`'s.
    async fn hide(&self, node: &Node, opened: &mut Opened, path: &AbsPath) -> Result<bool> {
        if opened.readers == 0 || opened.hidden.is_some() || opened.staged.is_some() || self.has_other_name(node, path).await? {
            return Ok(false);
        }
        let parent = path.parent().ok_or_else(|| err!(InvalidArgument, "/ cannot be deleted"))?;
        let hiding = parent.join(&[HIDDEN, format!("{:016x}", rand::random::<u64>()).as_bytes()].concat())?;
        self.fs.rename(path, &hiding, false).await?;
        self.note_moved(node, &hiding);
        self.hiding.lock().unwrap_or_else(|e| e.into_inner()).insert(hiding.clone());
        opened.hidden = Some(hiding);
        Ok(true)
    }

    /// Whether a file stays that loses this name, under another one that is known here.
    async fn has_other_name(&self, node: &Node, path: &AbsPath) -> Result<bool> {
        for other in self.nodes.other_paths(node, path) {
            match self.fs.get_status(&other).await {
                Ok(status) if status.file_id == node.status().file_id => return Ok(true),
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(false)
    }

    /// What was hidden takes its name again.
    async fn show_again(&self, node: &Node, opened: &mut Opened, path: &AbsPath) {
        let Some(hidden) = opened.hidden.take() else { return };
        match self.fs.rename(&hidden, path, false).await {
            Ok(()) => {
                self.note_moved(node, path);
                self.hiding.lock().unwrap_or_else(|e| e.into_inner()).remove(&hidden);
            }
            Err(e) => {
                tracing::error!(error = %e, %path, %hidden, "a file that was to be replaced and was not stays under another name: move it back");
                self.hiding.lock().unwrap_or_else(|e| e.into_inner()).remove(&hidden);
            }
        }
    }

    /// Whoever has a file open looks it up under its new name from now on.
    pub fn note_moved(&self, node: &Node, path: &AbsPath) {
        let handles = self.handles.read().unwrap_or_else(|e| e.into_inner());
        for handle in handles.values() {
            if let Handle::Reads { node: of, reader } | Handle::Passes { node: of, reader } = &**handle
                && of.id == node.id
            {
                reader.note_moved(path.clone());
            }
        }
    }

    pub async fn unlink(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let path = self.nodes.path_below(parent, name)?;
        let Some(node) = self.nodes.named(parent, name) else { return self.fs.delete(&path, false).await };
        if node.folder {
            return Err(err!(IsADirectory, "a folder"));
        }
        // Held until the name leads nowhere: what is handed over meanwhile would make the file again.
        let mut opened = node.opened.lock().await;
        match opened.staged.clone() {
            // Its name, which was held for it, goes with it.
            Some(staged) if staged.is_new() => staged.forget().await,
            None if self.hide(&node, &mut opened, &path).await? => {}
            staged => {
                // Under its other names it is what was written.
                if let Some(staged) = staged.filter(|_| node.status().other_names > 0) {
                    self.hand_over(&node, &staged).await?;
                }
                self.fs.delete(&path, false).await?;
            }
        }
        self.nodes.removed(parent, name);
        self.note_name(&node);
        Ok(())
    }

    /// A name of a node went: whoever has it open looks it up under one that is left.
    fn note_name(&self, node: &Node) {
        if let Ok(path) = self.nodes.path(node.id)
            && !node.is_gone()
        {
            self.note_moved(node, &path);
        }
    }

    /// One more name of a file.
    pub async fn link(&self, id: u64, parent: u64, name: &[u8]) -> Result<Arc<Node>> {
        self.check_writable()?;
        Self::check_name(name)?;
        let (node, target) = (self.nodes.get(id)?, self.nodes.path_below(parent, name)?);
        let opened = node.opened.lock().await;
        if node.is_gone() {
            return Err(err!(NotFound, "this file was deleted"));
        }
        // What is being made has no complete file yet that could have a second name.
        if let Some(staged) = opened.staged.clone().filter(|staged| staged.is_new()) {
            self.hand_over(&node, &staged).await?;
        }
        let status = self.fs.link(&self.sure_path(&node).await?, &target).await?;
        drop(opened);
        self.nodes.removed(parent, name);
        self.nodes.linked(&node, status.clone());
        Ok(self.nodes.show(parent, name, status))
    }

    /// The extended attributes of a node.
    pub async fn x_attrs(&self, id: u64) -> Result<Vec<XAttr>> {
        let node = self.nodes.get(id)?;
        if node.is_gone() || matches!(node.in_use(), Use::Staged(staged) if staged.is_new()) {
            return Ok(Vec::new());
        }
        self.fs.x_attrs(&self.sure_path(&node).await?).await
    }

    /// Sets one, or takes it away without a value.
    pub async fn set_x_attr(&self, id: u64, x: XAttr, value: Option<bytes::Bytes>, may_create: bool, may_replace: bool) -> Result<()> {
        self.check_writable()?;
        let node = self.nodes.get(id)?;
        if node.is_gone() {
            return Err(err!(NotFound, "this file was deleted"));
        }
        let opened = node.opened.lock().await;
        // They are kept with the complete file.
        if let Some(staged) = opened.staged.clone().filter(|staged| staged.is_new()) {
            self.hand_over(&node, &staged).await?;
        }
        self.fs.set_x_attr(&self.sure_path(&node).await?, x, value, may_create, may_replace).await
    }

    pub async fn rmdir(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.check_writable()?;
        let path = self.nodes.path_below(parent, name)?;
        if !self.fs.get_status(&path).await?.folder {
            return Err(err!(NotADirectory, "a file"));
        }
        let mut done = self.fs.delete(&path, false).await;
        if done.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotEmpty) && self.clear_hidden(&path).await? {
            done = self.fs.delete(&path, false).await;
        }
        done?;
        self.nodes.removed(parent, name);
        Ok(())
    }

    /// Deletes what a mount that died has left hidden in a folder. `false`: there is more than that.
    async fn clear_hidden(&self, path: &AbsPath) -> Result<bool> {
        let entries = self.fs.list(path, false).await?;
        let entries = entries.iter().map(|entry| AbsPath::parse(&entry.path)).collect::<Result<Vec<_>>>()?;
        let left_behind = |path: &AbsPath| path.name().is_some_and(hidden) && !self.hiding.lock().unwrap_or_else(|e| e.into_inner()).contains(path);
        if !entries.iter().all(left_behind) {
            return Ok(false);
        }
        for path in entries {
            self.fs.delete(&path, false).await?;
        }
        Ok(true)
    }

    pub async fn rename(&self, parent: u64, name: &[u8], new_parent: u64, new_name: &[u8], overwrite: bool) -> Result<()> {
        self.check_writable()?;
        Self::check_name(new_name)?;
        let (from, to) = (self.nodes.path_below(parent, name)?, self.nodes.path_below(new_parent, new_name)?);
        let source = self.nodes.named(parent, name);
        let target = self.nodes.named(new_parent, new_name).filter(|target| overwrite && !target.folder);
        let target = target.filter(|target| source.as_ref().is_none_or(|source| source.id != target.id && !source.folder));
        // Held, in the order of their numbers, until the names lead to where they shall.
        let mut held = match &source {
            Some(node) if node.folder => self.nodes.written_below(node.id),
            Some(node) => vec![node.clone()],
            None => Vec::new(),
        };
        held.extend(target.clone());
        held.sort_by_key(|node| node.id);
        held.dedup_by_key(|node| node.id);
        let mut locked = Vec::with_capacity(held.len());
        for node in &held {
            locked.push((node, node.opened.lock().await));
        }
        let is_target = |node: &Node| target.as_ref().is_some_and(|target| target.id == node.id);
        // What is being made has no complete file that could be moved. Before the target is touched: this may fail.
        for (node, opened) in locked.iter().filter(|(node, _)| !is_target(node)) {
            if let Some(staged) = opened.staged.clone().filter(|staged| staged.is_new()) {
                self.hand_over(node, &staged).await?;
            }
        }
        for (node, opened) in locked.iter_mut().filter(|(node, _)| is_target(node)) {
            match opened.staged.clone().filter(|staged| staged.is_new()) {
                Some(staged) => staged.let_name_go().await,
                None => {
                    // Under its other names it is what was written.
                    if let Some(staged) = opened.staged.clone().filter(|_| node.status().other_names > 0) {
                        self.hand_over(node, &staged).await?;
                    }
                    self.hide(node, opened, &to).await?;
                }
            }
        }
        if let Err(e) = self.fs.rename(&from, &to, overwrite).await {
            for (node, opened) in locked.iter_mut().filter(|(node, _)| is_target(node)) {
                self.show_again(node, opened, &to).await;
            }
            return Err(e);
        }
        if let Some(source) = source.filter(|source| !source.folder) {
            self.note_moved(&source, &to);
        }
        self.nodes.moved(parent, name, new_parent, new_name);
        if let Some(target) = target {
            self.note_name(&target);
        }
        Ok(())
    }
}
