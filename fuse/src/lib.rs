//! The FUSE mount: the namespace as files of this machine, for programs that know nothing else.
//!
//! `run` mounts and serves until the mount is taken away or the process is told to stop. `handler` takes the kernel's requests, `mount` (with `entries`, `opening` and `locking`) says what each
//! comes to, `device` is the kernel's side, `handover` gives a live mount to another process (`keeper` has it where that one is not there yet), `nodes` keeps what the kernel knows by number, `staged` files that are being written, `folder` open folders, `attributes` translates.
//!
//! Invariants: what `close` or `fsync` answered is in the namespace, as durable as its write type says; a reader sees one content of a file, the one that was
//! there when it was opened, and whoever opens later the newest; the kernel is asked to read a block by itself only when every
//! chunk of it was compared with its checksum.

mod attributes;
mod device;
mod entries;
mod extents;
mod folder;
mod handler;
mod handover;
pub mod keeper;
mod locking;
mod locks;
mod mount;
mod neighbours;
mod nodes;
mod opening;
mod session;
mod staged;
mod trim;
mod x_attr;

pub use mount::STATISTICS;
pub use session::{Event, Options, able, run};
