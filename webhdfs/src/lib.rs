//! WebHDFS: files over HTTP, on the web ports of the master and the workers, for clients that have no Hadoop at all.
//!
//! The master answers what is about names, and sends whoever reads or writes bytes to a worker, as a NameNode does; the worker streams them. Both are clients
//! of their cluster like any other (`forebay-client`), on behalf of the user that a request names: no logic of the namespace, and no way around its
//! checks, is here. Called by `forebay master`, `worker` and `local`, which add these routes to a role's web server.
//!
//! Invariants: the bytes of a file that is written are complete, or the file is not there; a request holds at most one piece of a file in memory.
//! Source: "WebHDFS REST API" and `NamenodeWebHdfsMethods`, `ExceptionHandler`, `JsonUtil` of Hadoop 3.4.1.

mod bytes;
mod names;
mod params;
mod reply;

use axum::Router;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::Method;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, counter, err};
use params::Params;
use reply::Refusal;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;

counter!(CALLS, "forebay_webhdfs_requests_total", "requests over WebHDFS");
counter!(FAILED, "forebay_webhdfs_requests_failed_total", "requests over WebHDFS that were answered with an exception");

/// Users whose clients are kept: of those that were away longest the connection is closed.
const USERS_MAX: usize = 64;

/// Which half of the protocol a web server has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Names; bytes by redirection.
    Master,
    /// Bytes.
    Worker,
}

/// One web server's half.
struct Front {
    role: Role,
    config: ClientConfig,
    proxy_users: Vec<String>,
    clients: Mutex<HashMap<String, (FileSystem, Instant)>>,
}

/// The routes of a role, to be merged into its web server; `config` says where the master is, `proxy_users` who may act for others.
pub fn routes(role: Role, config: &ClientConfig, proxy_users: &[String]) -> Router {
    let front = Arc::new(Front { role, config: config.clone(), proxy_users: proxy_users.to_vec(), clients: Mutex::default() });
    Router::new().route("/webhdfs/v1", any(root)).route("/webhdfs/v1/", any(root)).route("/webhdfs/v1/{*path}", any(below)).with_state(front)
}

impl Front {
    /// A client that acts for a user.
    async fn client(&self, user: &str) -> Result<FileSystem> {
        if let Some((client, used)) = self.clients.lock().await.get_mut(user) {
            *used = Instant::now();
            return Ok(client.clone());
        }
        // Nobody waits for another one's connection.
        let client = FileSystem::connect(&ClientConfig { user: user.to_owned(), ..self.config.clone() }).await?;
        let mut clients = self.clients.lock().await;
        if clients.len() >= USERS_MAX {
            let oldest = clients.iter().min_by_key(|(_, (_, used))| *used).map(|(user, _)| user.clone());
            oldest.into_iter().for_each(|user| drop(clients.remove(&user)));
        }
        clients.insert(user.to_owned(), (client.clone(), Instant::now()));
        Ok(client)
    }
}

async fn root(State(front): State<Arc<Front>>, RawQuery(query): RawQuery, request: Request) -> Response {
    answer(&front, "/", query, request).await
}

async fn below(State(front): State<Arc<Front>>, Path(path): Path<String>, RawQuery(query): RawQuery, request: Request) -> Response {
    answer(&front, &format!("/{}", path.trim_start_matches('/')), query, request).await
}

async fn answer(front: &Front, path: &str, query: Option<String>, request: Request) -> Response {
    CALLS.inc();
    let params = Params::parse(query.as_deref().unwrap_or_default());
    match call(front, path, &params, request).await {
        Ok(response) => response,
        Err(refusal) => {
            FAILED.inc();
            refusal.into_response()
        }
    }
}

async fn call(front: &Front, path: &str, params: &Params, request: Request) -> Result<Response, Refusal> {
    let path: AbsPath = path.parse().map_err(|e: forebay_common::Error| Refusal::of(e).named("IllegalArgumentException"))?;
    let op = params.required("op")?.to_ascii_uppercase();
    let wanted = match op.as_str() {
        "CREATE" | "MKDIRS" | "RENAME" | "SETREPLICATION" | "SETOWNER" | "SETPERMISSION" | "SETTIMES" => Method::PUT,
        "DELETE" => Method::DELETE,
        "APPEND" | "CONCAT" | "TRUNCATE" => Method::POST,
        _ => Method::GET,
    };
    let method = request.method().clone();
    if method != wanted {
        return Err(Refusal::of(err!(InvalidArgument, "Invalid value for {method} operation \"op\": {op} is one of {wanted}")));
    }
    let user = params.user(&front.proxy_users)?;
    let call = Call { fs: front.client(user).await.map_err(Refusal::of)?, path, user, params };
    match (front.role, op.as_str()) {
        (Role::Worker, "OPEN") => bytes::open(call).await,
        (Role::Worker, "CREATE") => bytes::create(call, request.into_body()).await,
        (Role::Worker, _) => Err(Refusal::of(err!(Unsupported, "{op} is the master's to answer: on a worker there are OPEN and CREATE"))),
        (Role::Master, "OPEN" | "CREATE") => names::redirect(call, &op, &front.client(&front.config.user).await.map_err(Refusal::of)?).await,
        (Role::Master, _) => names::answer(call, &op).await,
    }
}

/// One request.
struct Call<'a> {
    fs: FileSystem,
    path: AbsPath,
    user: &'a str,
    params: &'a Params,
}
