//! What is answered: JSON as Hadoop's `JsonUtil` writes it, and exceptions by their class.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use forebay_common::{Error, ErrorKind};
use forebay_hdfs::exception::class_of;
use forebay_proto::FileStatus;
use serde_json::{Value, json};

/// An exception.
#[derive(Debug)]
pub struct Refusal {
    class: String,
    message: String,
    status: StatusCode,
}

impl Refusal {
    pub fn of(e: Error) -> Refusal {
        let class = match e.kind() {
            ErrorKind::InvalidArgument => "java.lang.IllegalArgumentException",
            ErrorKind::Unsupported => "java.lang.UnsupportedOperationException",
            kind => class_of(kind),
        };
        // As `ExceptionHandler` there: what is no other class is an IOException, which is a 403.
        let status = match e.kind() {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::InvalidArgument | ErrorKind::Unsupported => StatusCode::BAD_REQUEST,
            ErrorKind::Unauthenticated => StatusCode::UNAUTHORIZED,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::FORBIDDEN,
        };
        Refusal { class: class.to_owned(), message: e.message().to_owned(), status }
    }

    /// What has no class of its own there.
    pub fn io(message: String) -> Refusal {
        Refusal { class: "java.io.IOException".to_owned(), message, status: StatusCode::FORBIDDEN }
    }

    /// The same under another class of `java.lang`.
    pub fn named(mut self, class: &str) -> Refusal {
        self.class = format!("java.lang.{class}");
        self
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let short = self.class.rsplit('.').next().unwrap_or_default();
        let body = json!({ "RemoteException": { "exception": short, "javaClassName": self.class, "message": self.message } });
        (self.status, [("content-type", "application/json")], body.to_string()).into_response()
    }
}

pub fn json_of(value: &Value) -> Response {
    (StatusCode::OK, [("content-type", "application/json")], value.to_string()).into_response()
}

/// A status; `name` is empty where the path was named by the caller.
pub fn file_status(status: &FileStatus, name: &str) -> Value {
    let nobody = |name: &str| if name.is_empty() { "nobody".to_owned() } else { name.to_owned() };
    json!({
        "accessTime": if status.folder { 0 } else { status.modified_ms },
        "blockSize": if status.folder { 0 } else { status.block_size_bytes },
        "childrenNum": 0,
        "fileId": status.file_id,
        "group": nobody(&status.group),
        "length": status.length,
        "modificationTime": status.modified_ms,
        "owner": nobody(&status.owner),
        "pathSuffix": name,
        "permission": format!("{:o}", status.mode),
        "replication": if status.folder { 0 } else { status.replication_min.max(1) },
        "storagePolicy": 0,
        "type": if status.folder { "DIRECTORY" } else { "FILE" },
    })
}
