//! `Thrown`: an exception as Hadoop's clients know it.

use forebay_common::{Error, ErrorKind};
use forebay_hdfs::exception::class_of;
use forebay_hdfs::ipc::Severity;

const NS_QUOTA_EXCEEDED: &str = "org.apache.hadoop.hdfs.protocol.NSQuotaExceededException";
const DS_QUOTA_EXCEEDED: &str = "org.apache.hadoop.hdfs.protocol.DSQuotaExceededException";

/// A class, a text, and how bad it is.
#[derive(Clone, Debug)]
pub struct Thrown {
    pub class: &'static str,
    pub message: String,
    pub severity: Severity,
    /// The kind, for handlers that answer it instead of throwing it.
    pub kind: ErrorKind,
}

impl Thrown {
    pub fn new(class: &'static str, kind: ErrorKind, message: impl Into<String>) -> Thrown {
        Thrown { class, message: message.into(), severity: Severity::Application, kind }
    }

    pub fn not_found(message: impl Into<String>) -> Thrown {
        Thrown::new(class_of(ErrorKind::NotFound), ErrorKind::NotFound, message)
    }

    pub fn parent_not_directory(message: impl Into<String>) -> Thrown {
        Thrown::new(class_of(ErrorKind::NotADirectory), ErrorKind::NotADirectory, message)
    }

    pub fn exists(message: impl Into<String>) -> Thrown {
        Thrown::new(class_of(ErrorKind::AlreadyExists), ErrorKind::AlreadyExists, message)
    }

    pub fn denied(message: impl Into<String>) -> Thrown {
        Thrown::new(class_of(ErrorKind::PermissionDenied), ErrorKind::PermissionDenied, message)
    }

    pub fn io(message: impl Into<String>) -> Thrown {
        Thrown::new("java.io.IOException", ErrorKind::InvalidArgument, message)
    }

    /// There is no such method: the shell prints it and goes on.
    pub fn no_such_method(method: &str, protocol: &str) -> Thrown {
        let message = format!("Unknown method {method} called on {protocol} protocol: Forebay does not offer it");
        Thrown { severity: Severity::NoSuchMethod, ..Thrown::new("org.apache.hadoop.ipc.RpcNoSuchMethodException", ErrorKind::Unsupported, message) }
    }

    /// The same error under another class.
    #[must_use]
    pub fn named(mut self, class: &'static str) -> Thrown {
        self.class = class;
        self
    }
}

impl From<Error> for Thrown {
    fn from(e: Error) -> Thrown {
        // The one kind that apply refuses with is of two classes there.
        if e.kind() == ErrorKind::NoSpace && e.message().starts_with("The NameSpace quota") {
            return Thrown::new(NS_QUOTA_EXCEEDED, e.kind(), e.message());
        }
        if e.kind() == ErrorKind::NoSpace && e.message().starts_with("The DiskSpace quota") {
            return Thrown::new(DS_QUOTA_EXCEEDED, e.kind(), e.message());
        }
        Thrown::new(class_of(e.kind()), e.kind(), e.message())
    }
}
