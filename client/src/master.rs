//! Calls to the master: who is asking is stamped in, retryable failures are tried again under the same sequence number.

use forebay_common::config::ClientConfig;
use forebay_common::{ErrorKind, Result, err};
use forebay_proto::Caller;
use forebay_proto::admin_client::AdminClient;
use forebay_proto::convert::from_status;
use forebay_proto::file_system_client::FileSystemClient;
use std::future::Future;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// Changes one client may have under way: fewer than the replies that the master remembers of it.
const CHANGES_MAX: usize = 48;
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// A call that is tried again for longer than this says so.
const TOLD_AFTER: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const MESSAGE_MAX_BYTES: usize = 64 << 20;

pub struct Master {
    address: String,
    user: String,
    /// Client id and the last sequence drawn under it.
    identity: Mutex<(u64, u64)>,
    changes: Semaphore,
    timeout: Duration,
    pub files: FileSystemClient<Channel>,
    pub admin: AdminClient<Channel>,
}

/// Random, with the time of its making in the high half: never drawn twice.
fn draw_client_id() -> u64 {
    (forebay_common::clock::now_ms() / 1000) << 32 | u64::from(rand::random::<u32>() | 1)
}

fn own_user() -> String {
    let uid = nix::unistd::geteuid();
    nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |u| u.name)
}

impl Master {
    /// Connects when first used. Errors: an address that is none.
    pub fn new(config: &ClientConfig) -> Result<Master> {
        let port = config.master.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        if !port.is_some_and(|(host, port)| !host.is_empty() && port > 0) {
            return Err(err!(InvalidArgument, "client.master = {:?} is not host:port", config.master));
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", config.master))
            .map_err(|e| err!(InvalidArgument, "client.master = {:?} is not host:port: {e}", config.master))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20);
        let channel = endpoint.connect_lazy();
        Ok(Master {
            address: config.master.clone(),
            user: if config.user.is_empty() { own_user() } else { config.user.clone() },
            identity: Mutex::new((draw_client_id(), 0)),
            changes: Semaphore::new(CHANGES_MAX),
            timeout: Duration::from_millis(config.call_timeout_ms),
            files: FileSystemClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX_BYTES),
            admin: AdminClient::new(channel).max_decoding_message_size(MESSAGE_MAX_BYTES),
        })
    }

    /// The address, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How long a call is tried.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Who is asking a question.
    fn asker(&self) -> Option<Caller> {
        Some(Caller { user: self.user.clone(), ..Caller::default() })
    }

    /// Who is making a change: its own sequence number under the id of now.
    fn changer(&self) -> Option<Caller> {
        let mut identity = self.identity.lock().unwrap_or_else(|e| e.into_inner());
        identity.1 += 1;
        Some(Caller { user: self.user.clone(), client_id: identity.0, sequence: identity.1 })
    }

    /// Starts over under a new id, unless another call has done so since `used`.
    fn renew_identity(&self, used: u64) {
        let mut identity = self.identity.lock().unwrap_or_else(|e| e.into_inner());
        if identity.0 == used {
            *identity = (draw_client_id(), 0);
        }
    }

    /// A question. `call` is given the caller and may be called again.
    pub async fn ask<T, F, R>(&self, call: F) -> Result<T>
    where
        F: Fn(Option<Caller>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        self.attempts(|| call(self.asker()), false).await
    }

    /// A change: done once, however often it has to be sent.
    pub async fn change<T, F, R>(&self, call: F) -> Result<T>
    where
        F: Fn(Option<Caller>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let _permit = self.changes.acquire().await.map_err(|_| err!(Internal, "client is closed"))?;
        let caller = self.changer();
        match self.attempts(|| call(caller.clone()), true).await {
            // This client was silent for so long that the master forgot it: it starts over under a new id. Only a call that
            // was refused the first time it was sent may be sent again.
            Err(e) if e.kind() == ErrorKind::Expired && e.message().starts_with("this call is older") => {
                self.renew_identity(caller.as_ref().map_or(0, |c| c.client_id));
                let caller = self.changer();
                self.attempts(|| call(caller.clone()), true).await
            }
            other => other,
        }
    }

    async fn attempts<T, R>(&self, call: impl Fn() -> R, change: bool) -> Result<T>
    where
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.timeout;
        let mut backoff = BACKOFF_MIN;
        let mut sent = 0u32;
        let (began, mut told) = (Instant::now(), false);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut answered = false;
            let error = match tokio::time::timeout(left, call()).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => {
                    // Our masters put the error itself beside the status; one made on this side has nothing there.
                    answered = !status.details().is_empty();
                    from_status(&status)
                }
                Err(_) => err!(Timeout, "master {} did not answer within {} ms", self.address, self.timeout.as_millis()).with_retryable(false),
            };
            sent += 1;
            if change && sent > 1 && error.kind() == ErrorKind::Expired {
                return Err(error.context("a change was sent more than once"));
            }
            // What an under store could not do was tried often enough by the master and by the store's own layers.
            let again = error.is_retryable() && !matches!(error.kind(), ErrorKind::UnderStore | ErrorKind::Timeout | ErrorKind::NoSpace);
            if !again || Instant::now() + backoff >= deadline {
                return Err(match error.kind() {
                    ErrorKind::Unavailable if !answered => {
                        error.context(format!("master {} (is it running? FOREBAY_MASTER or --master names it)", self.address))
                    }
                    _ => error,
                });
            }
            if !told && began.elapsed() > TOLD_AFTER {
                told = true;
                tracing::warn!(target: "forebay::waiting", "master {}: {}; tried again for up to {} s", self.address, error, left.as_secs());
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
}
