//! `/metrics` (Prometheus text), `/healthz` (alive), and `/readyz` (the master knows it).

use crate::report::Registration;
use axum::http::StatusCode;
use axum::{Router, routing::get};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Serves until `shutdown`, with `more` routes beside its own. `registered`: what the master has said of this worker.
pub async fn serve(listener: TcpListener, more: Router, registered: watch::Receiver<Registration>, shutdown: CancellationToken) {
    let ready = move || {
        let is = match &*registered.borrow() {
            Registration::Done => (StatusCode::OK, "ok\n".to_owned()),
            Registration::Unanswered => (StatusCode::SERVICE_UNAVAILABLE, "the master has not answered yet\n".to_owned()),
            Registration::Refused(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
        };
        async move { is }
    };
    let app = Router::new()
        .route("/metrics", get(|| async { ([("content-type", "text/plain; version=0.0.4")], forebay_common::metrics::render()) }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .merge(more);
    if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await {
        tracing::error!(error = %e, "web server ended");
    }
}
