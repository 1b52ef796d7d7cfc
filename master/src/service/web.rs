//! `/metrics` (Prometheus text), `/healthz` (alive), `/readyz` (serving), and `/v1/events`, where object stores tell what changed.
//!
//! The port answers before the master does: while the journal is replayed `/readyz` says how far that is, and whatever is asked besides is told to wait.

use crate::core::Core;
use crate::journal::Replay;
use crate::mount::take_event;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get, routing::post};
use std::sync::{Arc, OnceLock};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

async fn events(State(core): State<Arc<Core>>, body: Bytes) -> (StatusCode, String) {
    match take_event(&core, &body) {
        Ok(taken) => (StatusCode::OK, format!("{{\"taken\":{taken}}}\n")),
        Err(e) => (StatusCode::BAD_REQUEST, format!("{e}\n")),
    }
}

/// Ready when this master leads and its journal goes on.
async fn ready(State(core): State<Arc<Core>>) -> (StatusCode, String) {
    match core.journal.read_barrier() {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
    }
}

/// What is served once the master is up.
#[derive(Clone, Default)]
pub struct Web {
    pub replay: Arc<Replay>,
    full: Arc<OnceLock<Router>>,
}

impl Web {
    /// The master is up: from now on everything is served, `more` routes beside our own.
    pub fn open(&self, more: Router, core: Arc<Core>) {
        let app = Router::new()
            .route("/readyz", get(ready))
            // axum takes bodies of 2 MiB at most; a notification names 1,000 objects at most.
            .route("/v1/events", post(events))
            .with_state(core)
            .merge(more);
        let _ = self.full.set(app);
    }

    async fn answer(self, request: Request) -> Response {
        if let Some(full) = self.full.get() {
            return tower::ServiceExt::oneshot(full.clone(), request).await.into_response();
        }
        (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", self.replay)).into_response()
    }

    /// Serves until `shutdown`.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let app = Router::new()
            .route("/metrics", get(|| async { ([("content-type", "text/plain; version=0.0.4")], forebay_common::metrics::render()) }))
            .route("/healthz", get(|| async { "ok\n" }))
            .fallback(move |request: Request| self.clone().answer(request));
        if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await {
            tracing::error!(error = %e, "web server ended");
        }
    }
}
