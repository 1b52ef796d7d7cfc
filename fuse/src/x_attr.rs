//! Extended attributes, as the kernel asks for them: names with their namespace, sizes before bytes. The part of `handler` that is about them.
//!
//! `user.*` and `trusted.*` are kept by the namespace; others are refused, or are not there, without asking anybody.

use crate::handler::{Handler, errno};
use crate::mount::STATISTICS_NODE;
use forebay_common::ErrorKind;
use forebay_proto::XAttr;
use fuser::{Errno, ReplyEmpty, ReplyXattr};
use nix::libc;
use std::ffi::OsStr;

/// What the names of attributes begin with that are kept, by the number of their namespace.
const X_ATTR_PREFIXES: [&str; 2] = ["user.", "trusted."];
/// Bytes of name and value that the namespace takes.
const X_ATTR_MAX_BYTES: usize = 16_384;

/// An attribute by its name here; `None` for one of a namespace that is not kept.
fn x_attr(name: &OsStr) -> Option<XAttr> {
    let name = name.to_str()?;
    let of = |(namespace, prefix): (usize, &&str)| {
        let name = name.strip_prefix(prefix).filter(|name| !name.is_empty())?.to_owned();
        Some(XAttr { namespace: namespace as u32, name, ..XAttr::default() })
    };
    X_ATTR_PREFIXES.iter().enumerate().find_map(of)
}

fn has<'a>(all: &'a [XAttr], x: &XAttr) -> Option<&'a XAttr> {
    all.iter().find(|other| other.namespace == x.namespace && other.name == x.name)
}

/// Answers with the size that is asked for first, then with the bytes.
fn sized(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    match size as usize {
        0 => reply.size(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        room if room < bytes.len() => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

impl Handler {
    pub fn set_x_attr(&self, node: u64, name: &OsStr, value: &[u8], flags: i32, reply: ReplyEmpty) {
        let Some(x) = x_attr(name) else { return reply.error(Errno::EOPNOTSUPP) };
        if x.name.len() + value.len() > X_ATTR_MAX_BYTES {
            return reply.error(Errno::ENOSPC);
        }
        let value = bytes::Bytes::copy_from_slice(value);
        let (must_create, must_replace) = (flags & libc::XATTR_CREATE != 0, flags & libc::XATTR_REPLACE != 0);
        let mount = self.mount.clone();
        self.spawn(async move {
            let done = async {
                if must_create || must_replace {
                    let there = has(&mount.x_attrs(node).await?, &x).is_some();
                    match (there, must_create) {
                        (true, true) => return Ok(Some(Errno::EEXIST)),
                        (false, false) => return Ok(Some(Errno::ENODATA)),
                        _ => {}
                    }
                }
                match mount.set_x_attr(node, x, Some(value), !must_replace, !must_create).await {
                    // One too many.
                    Err(e) if e.kind() == ErrorKind::InvalidArgument => Ok(Some(Errno::ENOSPC)),
                    other => other.map(|()| None),
                }
            };
            match done.await {
                Ok(None) => reply.ok(),
                Ok(Some(refused)) => reply.error(refused),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    pub fn get_x_attr(&self, node: u64, name: &OsStr, size: u32, reply: ReplyXattr) {
        // Asked for `security.capability` before each write: nothing of that kind is kept, and nobody is asked.
        let Some(x) = x_attr(name).filter(|_| node != STATISTICS_NODE) else { return reply.error(Errno::ENODATA) };
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.x_attrs(node).await {
                Ok(all) => match has(&all, &x) {
                    Some(x) => sized(reply, size, &x.value),
                    None => reply.error(Errno::ENODATA),
                },
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    pub fn list_x_attrs(&self, node: u64, size: u32, reply: ReplyXattr) {
        if node == STATISTICS_NODE {
            return sized(reply, size, b"");
        }
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.x_attrs(node).await {
                Ok(all) => {
                    let names = all.iter().filter_map(|x| Some((X_ATTR_PREFIXES.get(x.namespace as usize)?, &x.name)));
                    let names: Vec<u8> = names.flat_map(|(prefix, name)| [prefix.as_bytes(), name.as_bytes(), &[0]].concat()).collect();
                    sized(reply, size, &names);
                }
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    pub fn remove_x_attr(&self, node: u64, name: &OsStr, reply: ReplyEmpty) {
        let Some(x) = x_attr(name) else { return reply.error(Errno::EOPNOTSUPP) };
        let mount = self.mount.clone();
        self.spawn(async move {
            let done = async {
                if has(&mount.x_attrs(node).await?, &x).is_none() {
                    return Ok(false);
                }
                mount.set_x_attr(node, x, None, false, false).await.map(|()| true)
            };
            match done.await {
                Ok(true) => reply.ok(),
                Ok(false) => reply.error(Errno::ENODATA),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }
}
