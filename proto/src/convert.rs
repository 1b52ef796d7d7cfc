//! Errors across the wire: a gRPC status carries our error as its details, so that no kind is lost on the way.

use crate::ErrorInfo;
use forebay_common::{Error, ErrorKind};
use prost::Message;
use tonic::{Code, Status};

impl From<&Error> for ErrorInfo {
    fn from(e: &Error) -> Self {
        ErrorInfo { kind: e.kind().code(), message: e.message().to_owned(), retryable: e.is_retryable() }
    }
}

impl From<ErrorInfo> for Error {
    fn from(e: ErrorInfo) -> Self {
        Error::new(ErrorKind::from_code(e.kind), e.message).with_retryable(e.retryable)
    }
}

/// The gRPC code of a kind, for clients that know nothing of ours.
pub fn grpc_code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unauthenticated => Code::Unauthenticated,
        ErrorKind::InvalidArgument | ErrorKind::NameTooLong => Code::InvalidArgument,
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::NotEmpty | ErrorKind::ReadOnly | ErrorKind::WrongCluster => {
            Code::FailedPrecondition
        }
        ErrorKind::NoSpace | ErrorKind::LimitExceeded => Code::ResourceExhausted,
        ErrorKind::Busy | ErrorKind::Expired | ErrorKind::FileChanged => Code::Aborted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Unavailable | ErrorKind::UnderStore => Code::Unavailable,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
        ErrorKind::TooLarge => Code::OutOfRange,
    }
}

/// Our error as a status.
pub fn to_status(e: &Error) -> Status {
    Status::with_details(grpc_code(e.kind()), e.message(), ErrorInfo::from(e).encode_to_vec().into())
}

/// A status as our error; one that did not come from us becomes `Unavailable` or what its code says.
pub fn from_status(status: &Status) -> Error {
    if !status.details().is_empty()
        && let Ok(info) = ErrorInfo::decode(status.details())
        && info.kind != 0
    {
        return info.into();
    }
    let kind = match status.code() {
        Code::NotFound => ErrorKind::NotFound,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidArgument,
        Code::PermissionDenied => ErrorKind::PermissionDenied,
        Code::Unauthenticated => ErrorKind::Unauthenticated,
        Code::ResourceExhausted => ErrorKind::LimitExceeded,
        Code::Internal | Code::DataLoss => ErrorKind::Internal,
        _ => ErrorKind::Unavailable,
    };
    let mut message = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(c) = cause {
        let text = c.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = c.source();
    }
    Error::new(kind, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in ErrorKind::ALL {
            let e = Error::new(*kind, "thing: mend").with_retryable(!kind.is_retryable());
            let back = from_status(&to_status(&e));
            assert_eq!((back.kind(), back.message(), back.is_retryable()), (*kind, "thing: mend", !kind.is_retryable()));
        }
    }
}
