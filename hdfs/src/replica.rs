//! The messages of ClientDatanodeProtocol that are spoken: `getReplicaVisibleLength`. Its other calls are an administrator's.

use crate::hadoop::hdfs::ExtendedBlockProto;

/// The interface that clients of a DataNode call.
pub const CLIENT_DATANODE_PROTOCOL: &str = "org.apache.hadoop.hdfs.protocol.ClientDatanodeProtocol";

/// Asks how much of a block can be read.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetReplicaVisibleLengthRequest {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub block: Option<ExtendedBlockProto>,
}

/// The answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetReplicaVisibleLengthResponse {
    /// In bytes.
    #[prost(uint64, required, tag = "1")]
    pub length: u64,
}
