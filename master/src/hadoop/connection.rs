//! The master as a service of Hadoop RPC: who may call, for whom, and what comes of a call.

use super::Hadoop;
use super::asker::{Asker, short_name};
use super::dispatch;
use super::exception::Thrown;
use bytes::Bytes;
use forebay_common::{Error, Result, counter, err};
use forebay_hdfs::hadoop::common::IpcConnectionContextProto;
use forebay_hdfs::ipc::{self, Call};
use forebay_hdfs::server::{Limits, Service};
use std::net::IpAddr;

counter!(pub CALLS, "forebay_master_hadoop_calls_total", "calls of Hadoop clients");
counter!(FAILED, "forebay_master_hadoop_calls_failed_total", "calls of Hadoop clients that were answered with an exception");

impl Service for Hadoop {
    fn limits(&self) -> Limits {
        let config = &self.core.config;
        Limits { frame_max_bytes: usize::try_from(config.hadoop_frame_max.as_u64()).unwrap_or(usize::MAX), calls_max: config.hadoop_calls_max }
    }

    /// Errors: somebody acts for another who may not.
    fn admit(&self, context: &IpcConnectionContextProto) -> Result<String> {
        let info = context.user_info.clone().unwrap_or_default();
        let (effective, real) = (info.effective_user().to_owned(), info.real_user().to_owned());
        let (effective, real) = (short_name(&effective), short_name(&real));
        if effective.is_empty() {
            return Err(err!(Unauthenticated, "the connection does not say which user it is for"));
        }
        if !real.is_empty() && real != effective && !self.core.security.proxy_users.iter().any(|user| user == real) {
            return Err(err!(PermissionDenied, "User: {real} is not allowed to impersonate {effective}: see security.proxy_users"));
        }
        Ok(effective.to_owned())
    }

    async fn answer(&self, user: &str, ip: IpAddr, call: &Call) -> Bytes {
        CALLS.inc();
        let asker = Asker { user: user.to_owned(), ip, client_id: call.id.client_id.clone(), call_id: call.id.call_id };
        match dispatch::answer(self, &asker, call).await {
            Ok(answer) => answer,
            Err(thrown) => {
                FAILED.inc();
                tracing::debug!(method = call.method, class = thrown.class, message = thrown.message, "a call of a Hadoop client failed");
                ipc::failure(&call.id, thrown.severity, thrown.class, &thrown.message)
            }
        }
    }
}

impl From<Thrown> for Error {
    fn from(thrown: Thrown) -> Error {
        Error::new(thrown.kind, thrown.message)
    }
}
