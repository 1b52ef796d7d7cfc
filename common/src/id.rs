//! Newtypes for identifiers, so that a block id can never be handed over as an inode id.
//!
//! Inode, block and mount ids are allocated inside `apply` and never used twice; a worker id is drawn once at random
//! when its data directory is made, and lives in that directory.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number itself.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A file or folder of the namespace. `InodeId::ROOT` is `/`.
    InodeId
}
id! {
    /// A block: a positive 63-bit number whose bytes never change meaning.
    BlockId
}
id! {
    /// A worker, by the random number in its data directory.
    WorkerId
}
id! {
    /// A row of the mount table.
    MountId
}

impl InodeId {
    /// The inode of `/`.
    pub const ROOT: InodeId = InodeId(1);
}
