//! What local file systems have beyond names and bytes: links, pipes, several names of a file, extended attributes. The mount's part of `file_system`.

use super::file_system::Service;
use crate::apply::check_x_attr;
use crate::mount::raw;
use crate::namespace::{self, READ};
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{Result, err};
use forebay_proto::journal::{self, command::Op};
use forebay_proto::*;

impl Service {
    pub(super) async fn make_node_inner(&self, request: MakeNodeRequest) -> Result<GetStatusResponse> {
        let (_, path, _) = self.resolve_new(request.caller.as_ref(), &request.path, Some(true)).await?;
        let op = journal::MakeNode { path: raw(&path), kind: request.kind, mode: request.mode, target: request.target, device: request.device };
        let reply = self.0.change(request.caller.as_ref(), Op::MakeNode(op)).await?;
        let (_, _, status) = self.status_by_id(reply.file_id)?;
        Ok(GetStatusResponse { status: Some(status), ..GetStatusResponse::default() })
    }

    pub(super) async fn link_inner(&self, request: LinkRequest) -> Result<GetStatusResponse> {
        let (_, source, _) = self.resolve(request.caller.as_ref(), &request.source).await?;
        let (_, target, _) = self.resolve_new(request.caller.as_ref(), &request.target, Some(true)).await?;
        let op = journal::HardLink { source: raw(&source), target: raw(&target) };
        let reply = self.0.change(request.caller.as_ref(), Op::HardLink(op)).await?;
        let (_, _, status) = self.status_by_id(reply.file_id)?;
        Ok(GetStatusResponse { status: Some(status), ..GetStatusResponse::default() })
    }

    pub(super) async fn get_x_attrs_inner(&self, request: GetXAttrsRequest) -> Result<GetXAttrsResponse> {
        let (who, path, resolved) = self.resolve(request.caller.as_ref(), &request.path).await?;
        let found = resolved.found(&path)?;
        namespace::check(&who, &found.inode, READ, &path)?;
        let x_attrs = found.inode.x_attrs.iter().filter(|x| check_x_attr(&who, x.namespace, "").is_ok()).cloned().collect();
        Ok(GetXAttrsResponse { x_attrs })
    }

    pub(super) async fn set_x_attr_inner(&self, request: SetXAttrRequest) -> Result<Done> {
        let (_, path, _) = self.resolve(request.caller.as_ref(), &request.path).await?;
        if request.name.is_empty() || request.name.len() > NAME_MAX_BYTES {
            return Err(err!(InvalidArgument, "an attribute's name has 1 to {NAME_MAX_BYTES} bytes"));
        }
        let op = journal::SetXAttr {
            path: raw(&path),
            namespace: request.namespace,
            name: request.name,
            value: request.value,
            may_create: request.may_create,
            may_replace: request.may_replace,
        };
        self.0.change(request.caller.as_ref(), Op::SetXAttr(op)).await?;
        Ok(Done {})
    }
}
