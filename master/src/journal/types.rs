//! openraft's type parameters for our journal.

use forebay_proto::journal::{self, Command, Reply};
use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;

/// The id of the only node until groups of masters are supported.
pub const NODE_ID: u64 = 1;

openraft::declare_raft_types!(
    /// Entries hold batches of commands; answers come back one per command.
    pub TypeConfig:
        D = Batch,
        R = BatchReply,
        NodeId = u64,
        Node = openraft::BasicNode,
        SnapshotData = std::io::Cursor<Vec<u8>>,
);

/// The commands of one entry.
#[derive(Clone, Debug, Default)]
pub struct Batch(Arc<Vec<Command>>);

impl Batch {
    /// Of these commands, in this order.
    pub fn new(commands: Vec<Command>) -> Self {
        Batch(Arc::new(commands))
    }

    /// The commands.
    pub fn commands(&self) -> &[Command] {
        &self.0
    }

    /// As it is stored.
    pub fn to_record(&self) -> journal::Batch {
        journal::Batch { commands: self.0.to_vec() }
    }
}

impl Serialize for Batch {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.to_record().encode_to_vec())
    }
}

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Vec::<u8>::deserialize(d)?;
        journal::Batch::decode(raw.as_slice()).map(|b| Batch::new(b.commands)).map_err(serde::de::Error::custom)
    }
}

/// One answer per command of the entry; none for entries of openraft's own.
#[derive(Clone, Debug, Default)]
pub struct BatchReply(pub Vec<Reply>);

impl Serialize for BatchReply {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.0.iter().map(Message::encode_to_vec))
    }
}

impl<'de> Deserialize<'de> for BatchReply {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Vec::<Vec<u8>>::deserialize(d)?;
        raw.iter().map(|r| Reply::decode(r.as_slice())).collect::<Result<_, _>>().map(BatchReply).map_err(serde::de::Error::custom)
    }
}
