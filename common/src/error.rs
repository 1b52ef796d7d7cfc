//! One closed set of error kinds, and the one table that maps a kind to what each way in calls it.
//!
//! Every crate returns this error; it is logged once, where it is handled. A message names the thing and the mend, in
//! lower case. Whether a call may be tried again is part of the error: nobody guesses from its text.

use std::fmt;

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $code:literal, $retry:literal, $errno:ident;)*) => {
        /// What went wrong, in the terms a caller can act on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
        pub enum ErrorKind { $($(#[$doc])* $kind),* }

        impl ErrorKind {
            /// All kinds, in the order of their codes.
            pub const ALL: &'static [ErrorKind] = &[$(ErrorKind::$kind),*];

            /// The number that stands for this kind on the wire and in the journal; never reused.
            pub const fn code(self) -> u32 {
                match self { $(ErrorKind::$kind => $code),* }
            }

            /// The kind of a number; an unknown one (from a newer peer) is `Internal`.
            pub const fn from_code(code: u32) -> Self {
                match code { $($code => ErrorKind::$kind,)* _ => ErrorKind::Internal }
            }

            /// Whether the same call may succeed later without anybody mending anything.
            pub const fn is_retryable(self) -> bool {
                match self { $(ErrorKind::$kind => $retry),* }
            }

            /// The errno that a file system call answers.
            pub const fn errno(self) -> nix::errno::Errno {
                match self { $(ErrorKind::$kind => nix::errno::Errno::$errno),* }
            }
        }
    };
}

kinds! {
    /// The path, block or worker does not exist. Of an under store: only ever a plain 404.
    NotFound = 1, false, ENOENT;
    /// The path exists already.
    AlreadyExists = 2, false, EEXIST;
    /// A component of the path is a file.
    NotADirectory = 3, false, ENOTDIR;
    /// A file was needed and a folder is there.
    IsADirectory = 4, false, EISDIR;
    /// The folder has entries.
    NotEmpty = 5, false, ENOTEMPTY;
    /// The caller may not do this.
    PermissionDenied = 6, false, EACCES;
    /// The token or secret is missing, wrong, expired, or for something else.
    Unauthenticated = 7, false, EACCES;
    /// The call makes no sense as it stands.
    InvalidArgument = 8, false, EINVAL;
    /// A name or path is longer than its limit.
    NameTooLong = 9, false, ENAMETOOLONG;
    /// The mount is read-only.
    ReadOnly = 10, false, EROFS;
    /// A tier or store has no room.
    NoSpace = 11, true, ENOSPC;
    /// A named limit was hit.
    LimitExceeded = 12, true, EAGAIN;
    /// Somebody else holds the lease, or a change of this path is still on its way to the under store.
    Busy = 13, true, EBUSY;
    /// The call is older than what is remembered of its client, or its lease is over.
    Expired = 14, false, ESTALE;
    /// The object in the under store is not the version that was opened.
    FileChanged = 15, false, ESTALE;
    /// A checksum, length or magic number is wrong.
    Corrupt = 16, true, EIO;
    /// The peer cannot be reached or is not ready.
    Unavailable = 17, true, EIO;
    /// No answer within the limit.
    Timeout = 18, true, ETIMEDOUT;
    /// Not built, or not possible here.
    Unsupported = 19, false, EOPNOTSUPP;
    /// The under store answered with an error.
    UnderStore = 20, true, EIO;
    /// A mistake of ours.
    Internal = 21, false, EIO;
    /// A file would be larger than one can be here.
    TooLarge = 22, false, EFBIG;
    /// A worker has blocks of another cluster than its master's.
    WrongCluster = 23, false, EIO;
}

impl ErrorKind {
    /// The kind's name as a person reads it: `not found`, `file changed`.
    pub fn words(self) -> String {
        let mut out = String::new();
        for c in format!("{self:?}").chars() {
            if c.is_ascii_uppercase() && !out.is_empty() {
                out.push(' ');
            }
            out.push(c.to_ascii_lowercase());
        }
        out
    }
}

/// An error: its kind, what was being done to what, and the cause.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    retryable: bool,
}

impl Error {
    /// An error with the kind's own answer to "may it be tried again?".
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), retryable: kind.is_retryable() }
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The text without the kind.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// The same error with another answer to "may it be tried again?".
    #[must_use]
    pub fn with_retryable(mut self, retryable: bool) -> Self {
        self.retryable = retryable;
        self
    }

    /// The same error with what was being done put in front.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// An I/O error while `doing`, its kind taken from the errno.
    pub fn io(doing: impl fmt::Display, source: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            // A shortage of this process, which says nothing of the file.
            _ if matches!(source.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE | nix::libc::ENOMEM)) => ErrorKind::LimitExceeded,
            Io::NotFound => ErrorKind::NotFound,
            Io::AlreadyExists => ErrorKind::AlreadyExists,
            Io::PermissionDenied => ErrorKind::PermissionDenied,
            Io::StorageFull | Io::QuotaExceeded => ErrorKind::NoSpace,
            Io::FileTooLarge => ErrorKind::TooLarge,
            Io::TimedOut => ErrorKind::Timeout,
            Io::NotADirectory => ErrorKind::NotADirectory,
            Io::IsADirectory => ErrorKind::IsADirectory,
            Io::DirectoryNotEmpty => ErrorKind::NotEmpty,
            Io::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            Io::InvalidFilename => ErrorKind::NameTooLong,
            Io::ConnectionRefused | Io::ConnectionReset | Io::ConnectionAborted | Io::BrokenPipe | Io::UnexpectedEof | Io::NotConnected => {
                ErrorKind::Unavailable
            }
            _ => ErrorKind::Internal,
        };
        Error::new(kind, format!("{doing}: {source}"))
    }
}

/// `io(…).map_err(at("opening {path}"))` without a closure at each call.
pub fn at(doing: impl fmt::Display) -> impl FnOnce(std::io::Error) -> Error {
    move |e| Error::io(doing, &e)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.kind.words())
    }
}

impl std::error::Error for Error {}

/// Short constructors: `err!(NotFound, "{path} does not exist")`.
#[macro_export]
macro_rules! err {
    ($kind:ident, $($arg:tt)*) => {
        $crate::Error::new($crate::ErrorKind::$kind, format!($($arg)*))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_round_trip() {
        let mut seen = std::collections::HashSet::new();
        for kind in ErrorKind::ALL {
            assert!(seen.insert(kind.code()));
            assert_eq!(ErrorKind::from_code(kind.code()), *kind);
        }
        assert_eq!(ErrorKind::from_code(9999), ErrorKind::Internal);
        assert_eq!(ErrorKind::FileChanged.words(), "file changed");
    }
}
