//! The limits that are part of a format or of a protocol. Limits a person may tune live in `config`.

/// Bytes covered by one CRC32C; part of the block format.
pub const CHUNK_SIZE_BYTES: usize = 64 * 1024;
/// Longest name of one path component, in bytes (as on Linux).
pub const NAME_MAX_BYTES: usize = 255;
/// Longest path, in bytes.
pub const PATH_MAX_BYTES: usize = 4096;
/// Deepest path, in components.
pub const PATH_MAX_DEPTH: usize = 256;
/// Largest header of a data-plane frame, in bytes.
pub const FRAME_HEADER_MAX_BYTES: usize = 256 * 1024;
/// Largest body of a data-plane frame, in bytes.
pub const FRAME_BODY_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Requests of one data-plane session that may be under way at once; a further one is answered `LimitExceeded`.
pub const SESSION_REQUESTS_MAX: usize = 256;
/// Grants one session may hold.
pub const SESSION_GRANTS_MAX: usize = 4096;
/// Smallest and largest block size of files by default, in bytes.
pub const BLOCK_SIZE_RANGE_BYTES: std::ops::RangeInclusive<u64> = 64 * 1024..=(4 << 30);
/// Smallest block size of a file, in bytes: Hadoop's clients may ask for as little, where `master.hadoop_min_block_size` lets them.
pub const BLOCK_SIZE_MIN_BYTES: u64 = 512;
/// Smallest and largest page size, in bytes; powers of two only.
pub const PAGE_SIZE_RANGE_BYTES: std::ops::RangeInclusive<u64> = 64 * 1024..=(64 << 20);
/// Entries in one message of a listing.
pub const LIST_BATCH_ENTRIES: usize = 1000;
/// Block ids handed out by one command.
pub const BLOCKS_PER_ALLOCATION_MAX: u64 = 1024;
/// Names of one file: they are listed in its record.
pub const FILE_NAMES_MAX: usize = 1_024;
/// Locks of one file: they are one record.
pub const LOCKS_PER_FILE_MAX: usize = 4_096;
/// Files of which one session holds locks.
pub const LOCKED_FILES_MAX: u64 = 65_536;
/// Sessions that may hold locks.
pub const LOCK_SESSIONS_MAX: u64 = 16_384;
/// Files of which the locks of a session that is over are given back by one command.
pub const LOCKS_ENDED_AT_ONCE: usize = 1_000;
/// Blocks of one file that are shorter than the others, before its last.
pub const SHORT_BLOCKS_MAX: usize = 10_000;
/// Blocks of one file: with 64 KiB blocks 64 GiB, with the default 128 MiB 128 TiB.
pub const BLOCKS_PER_FILE_MAX: u64 = 1 << 20;
/// Block-report entries in one heartbeat.
pub const REPORT_BATCH_BLOCKS: usize = 10_000;
/// Whole copies of a file that may be asked for.
pub const REPLICAS_MAX: u32 = 64;
/// Jobs that run at once.
pub const JOBS_RUNNING_MAX: usize = 16;
/// Jobs that are remembered, running ones included.
pub const JOBS_KEPT: usize = 200;
/// Failures of one job that are remembered; further ones are counted.
pub const JOB_FAILURES_KEPT: usize = 100;
