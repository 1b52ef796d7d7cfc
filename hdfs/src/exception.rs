//! The names by which Hadoop's clients know errors, both ways.
//!
//! The class name is what a client acts on: `FileSystem` unwraps the ones it knows, a failover proxy goes to the next NameNode on
//! `StandbyException`, everything else is shown as it is. Source: `org.apache.hadoop.ipc.RemoteException` and the `unwrap…` lists of
//! `DFSClient` 3.4.1.

use forebay_common::{Error, ErrorKind};

/// The class of each kind. `Unauthenticated` and the like have none of their own in Hadoop.
pub fn class_of(kind: ErrorKind) -> &'static str {
    use ErrorKind::*;
    match kind {
        NotFound => "java.io.FileNotFoundException",
        AlreadyExists => "org.apache.hadoop.fs.FileAlreadyExistsException",
        NotADirectory => "org.apache.hadoop.fs.ParentNotDirectoryException",
        NotEmpty => "org.apache.hadoop.fs.PathIsNotEmptyDirectoryException",
        PermissionDenied | Unauthenticated => "org.apache.hadoop.security.AccessControlException",
        InvalidArgument => "org.apache.hadoop.HadoopIllegalArgumentException",
        NameTooLong => "org.apache.hadoop.hdfs.protocol.FSLimitException$PathComponentTooLongException",
        Expired => "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException",
        Unsupported => "java.lang.UnsupportedOperationException",
        Unavailable | Timeout | LimitExceeded => "org.apache.hadoop.ipc.RetriableException",
        IsADirectory | ReadOnly | NoSpace | TooLarge | Busy | FileChanged | Corrupt | UnderStore | Internal | WrongCluster => "java.io.IOException",
    }
}

/// The error that a remote exception is.
pub fn error_of(class: &str, message: &str) -> Error {
    use ErrorKind::*;
    let kind = match class.rsplit(['.', '$']).next().unwrap_or(class) {
        "FileNotFoundException" => NotFound,
        "FileAlreadyExistsException" => AlreadyExists,
        "ParentNotDirectoryException" => NotADirectory,
        "PathIsNotEmptyDirectoryException" => NotEmpty,
        "AccessControlException" => PermissionDenied,
        "PathComponentTooLongException" => NameTooLong,
        "StandbyException" | "RetriableException" | "SafeModeException" => Unavailable,
        "UnsupportedOperationException" | "RpcNoSuchMethodException" | "RpcNoSuchProtocolException" => Unsupported,
        _ => UnderStore,
    };
    // A stack trace follows the first line.
    Error::new(kind, format!("{class}: {}", message.lines().next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_what_they_stand_for() {
        for kind in [ErrorKind::NotFound, ErrorKind::AlreadyExists, ErrorKind::NotADirectory, ErrorKind::NotEmpty, ErrorKind::PermissionDenied] {
            assert_eq!(error_of(class_of(kind), "x\n\tat y").kind(), kind);
        }
        assert_eq!(error_of("java.io.IOException", "x\n\tat y").message(), "java.io.IOException: x");
    }
}
