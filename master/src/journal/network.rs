//! The network of a one-node group: there is nobody to call.

use super::types::TypeConfig;
use openraft::error::{InstallSnapshotError, RPCError, RaftError, Unreachable};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, RaftTypeConfig};

type NodeId = <TypeConfig as RaftTypeConfig>::NodeId;
type Failure<E> = RPCError<NodeId, BasicNode, E>;

/// Every call fails as unreachable.
pub struct NoPeers;

fn unreachable<E: std::error::Error>() -> Failure<E> {
    let why = std::io::Error::other("groups of several masters are not supported yet");
    RPCError::Unreachable(Unreachable::new(&why))
}

impl RaftNetworkFactory<TypeConfig> for NoPeers {
    type Network = NoPeers;

    async fn new_client(&mut self, _target: NodeId, _node: &BasicNode) -> NoPeers {
        NoPeers
    }
}

impl RaftNetwork<TypeConfig> for NoPeers {
    async fn append_entries(
        &mut self,
        _: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, Failure<RaftError<NodeId>>> {
        Err(unreachable())
    }

    async fn install_snapshot(
        &mut self,
        _: InstallSnapshotRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<InstallSnapshotResponse<NodeId>, Failure<RaftError<NodeId, InstallSnapshotError>>> {
        Err(unreachable())
    }

    async fn vote(&mut self, _: VoteRequest<NodeId>, _: RPCOption) -> Result<VoteResponse<NodeId>, Failure<RaftError<NodeId>>> {
        Err(unreachable())
    }
}
