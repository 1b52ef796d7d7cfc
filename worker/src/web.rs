//! `/metrics` (Prometheus text) and `/healthz`.

use axum::{Router, routing::get};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves until `shutdown`, with `more` routes beside its own.
pub async fn serve(listener: TcpListener, more: Router, shutdown: CancellationToken) {
    let app = Router::new()
        .route("/metrics", get(|| async { ([("content-type", "text/plain; version=0.0.4")], forebay_common::metrics::render()) }))
        .route("/healthz", get(|| async { "ok\n" }))
        .merge(more);
    if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await {
        tracing::error!(error = %e, "web server ended");
    }
}
