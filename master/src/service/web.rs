//! `/metrics` (Prometheus text), `/healthz`, and `/v1/events`, where object stores tell what changed.

use crate::core::Core;
use crate::mount::take_event;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Router, routing::get, routing::post};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

async fn events(State(core): State<Arc<Core>>, body: Bytes) -> (StatusCode, String) {
    match take_event(&core, &body) {
        Ok(taken) => (StatusCode::OK, format!("{{\"taken\":{taken}}}\n")),
        Err(e) => (StatusCode::BAD_REQUEST, format!("{e}\n")),
    }
}

/// Serves until `shutdown`, with `more` routes beside its own.
pub async fn serve(listener: TcpListener, more: Router, core: Arc<Core>, shutdown: CancellationToken) {
    let app = Router::new()
        .route("/metrics", get(|| async { ([("content-type", "text/plain; version=0.0.4")], forebay_common::metrics::render()) }))
        .route("/healthz", get(|| async { "ok\n" }))
        // axum takes bodies of 2 MiB at most; a notification names 1,000 objects at most.
        .route("/v1/events", post(events))
        .with_state(core)
        .merge(more);
    if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await {
        tracing::error!(error = %e, "web server ended");
    }
}
