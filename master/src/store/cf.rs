//! Column families of the state store; names are a format on disk.

/// One column family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cf {
    /// (parent id, name) -> `store::Inode`; a listing is one range scan.
    Dentry,
    /// inode id -> `store::Link`.
    Link,
    /// first block id of a run -> count (u64), inode id (u64); no run crosses a multiple of `RUN_SPAN`.
    Block,
    /// mount id -> `store::Mount`.
    Mount,
    /// lease id -> `store::Lease`.
    Lease,
    /// pending id -> `store::Pending`.
    Pending,
    /// (parent id, name) -> pending id: a name that is gone here and may still be in the under store.
    Tombstone,
    /// (client id, sequence) -> `journal::Reply`.
    Reply,
    /// client id -> `store::ClientReplies` (its numbers only).
    Client,
    /// (Unix milliseconds, inode id) -> nothing: what ends then.
    Ttl,
    /// persist id -> `store::Persist`: files that are to get to their under store.
    Persist,
    /// inode id -> nothing: files that wish for copies.
    Replicated,
    /// inode id -> nothing: paths with settings of their own.
    PathConfig,
    /// file id -> `FileLocks`.
    Lock,
    /// session id -> `LockSession`.
    LockSession,
    /// session id, then file id -> nothing: files of which it holds locks.
    LockedFile,
    /// job id -> `Job`.
    Job,
    /// `store::Counters`, `store::Applied`, `store::Cluster`, and workers that leave.
    Meta,
    /// The number of the store's format. Versions that do not know this family open no store that has it.
    Format,
}

impl Cf {
    /// All of them.
    pub const ALL: [Cf; 19] = [
        Cf::Dentry,
        Cf::Link,
        Cf::Block,
        Cf::Mount,
        Cf::Lease,
        Cf::Pending,
        Cf::Tombstone,
        Cf::Reply,
        Cf::Client,
        Cf::Ttl,
        Cf::Persist,
        Cf::Replicated,
        Cf::PathConfig,
        Cf::Lock,
        Cf::LockSession,
        Cf::LockedFile,
        Cf::Job,
        Cf::Meta,
        Cf::Format,
    ];

    /// Whose records come and go while others look at all that are there.
    pub const fn is_passing(self) -> bool {
        matches!(self, Cf::Lease | Cf::Pending | Cf::Persist | Cf::Ttl | Cf::Lock | Cf::LockSession | Cf::LockedFile)
    }

    /// The name on disk.
    pub const fn name(self) -> &'static str {
        match self {
            Cf::Dentry => "dentry",
            Cf::Link => "link",
            Cf::Block => "block",
            Cf::Mount => "mount",
            Cf::Lease => "lease",
            Cf::Pending => "pending",
            Cf::Tombstone => "tombstone",
            Cf::Reply => "reply",
            Cf::Client => "client",
            Cf::Ttl => "ttl",
            Cf::Persist => "persist",
            Cf::Replicated => "replicated",
            Cf::PathConfig => "path_config",
            Cf::Lock => "lock",
            Cf::LockSession => "lock_session",
            Cf::LockedFile => "locked_file",
            Cf::Job => "job",
            Cf::Meta => "meta",
            Cf::Format => "format",
        }
    }
}
