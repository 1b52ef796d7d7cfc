//! The way to the master: one connection, shared by the heartbeat and by writes that are about to publish.

use forebay_common::{Error, ErrorKind, Result, err};
use forebay_proto::HoldLeaseRequest;
use forebay_proto::convert::from_status;
use forebay_proto::worker_master_client::WorkerMasterClient;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// One call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is tried.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// The least a renewal waits for its answer.
pub const MASTER_ANSWER: Duration = Duration::from_secs(1);
/// Between two tries of a call that must be answered.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How long a write waits for a master that does not answer before it gives up publishing.
pub const MASTER_WAIT: Duration = Duration::from_secs(20);
const MESSAGE_MAX_BYTES: usize = 64 << 20;

/// Connects when first used, and again when the connection broke.
pub struct Master {
    address: String,
    client: WorkerMasterClient<Channel>,
    cluster_secret: bytes::Bytes,
}

impl Master {
    /// Errors: an address that is none.
    pub fn new(address: &str, cluster_secret: Vec<u8>) -> Result<Master> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| err!(InvalidArgument, "client.master = {address:?} is not host:port: {e}"))?
            .connect_timeout(CALL_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .tcp_nodelay(true)
            // A connection whose other end is gone without a word is noticed, and dialled anew.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(CALL_TIMEOUT)
            .keep_alive_while_idle(true);
        let client = WorkerMasterClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MESSAGE_MAX_BYTES)
            .max_encoding_message_size(MESSAGE_MAX_BYTES);
        Ok(Master { address: address.to_owned(), client, cluster_secret: cluster_secret.into() })
    }

    /// A client on the shared connection.
    pub fn client(&self) -> WorkerMasterClient<Channel> {
        self.client.clone()
    }

    /// What workers show to the master.
    pub fn secret(&self) -> bytes::Bytes {
        self.cluster_secret.clone()
    }

    /// The error of a call, naming the master.
    pub fn failed(&self, status: &Status) -> Error {
        self.named(from_status(status))
    }

    /// An error, naming the master.
    pub fn named(&self, e: Error) -> Error {
        e.context(format!("master {}", self.address))
    }

    /// Has a writer's lease hold on and returns until when it does at least. A master that does not answer is asked again
    /// until `deadline`.
    ///
    /// Errors: `Expired` when the lease is over, `Unavailable` when nobody answered in time.
    pub async fn hold_lease(&self, file_id: u64, lease_id: u64, deadline: Instant) -> Result<Instant> {
        loop {
            let asked = Instant::now();
            let request = HoldLeaseRequest { cluster_secret: self.secret(), file_id, lease_id };
            let answered = tokio::time::timeout_at(deadline, async { self.client().hold_lease(request).await }).await;
            match answered.unwrap_or_else(|_| Err(Status::unavailable("no answer in time"))) {
                Ok(held) => {
                    let until = asked + Duration::from_millis(held.into_inner().remaining_ms);
                    // An answer that took longer than the lease says nothing any more.
                    if until > Instant::now() {
                        return Ok(until);
                    }
                }
                Err(status) => {
                    let e = self.failed(&status);
                    if e.kind() == ErrorKind::Expired || !e.is_retryable() {
                        return Err(e);
                    }
                    if Instant::now() + RETRY_AFTER >= deadline {
                        return Err(e.context("whether the writer's lease still holds is not known, so nothing is published"));
                    }
                }
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}
