//! An HTTP proxy in front of an S3 server that misbehaves on demand: answers 503, cuts bodies, hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What is done to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// 503 SlowDown.
    Unavailable,
    /// 500 InternalError.
    Internal,
    /// The answer ends after some KiB.
    Cut,
    /// No answer.
    Hang,
}

/// The proxy. One request per connection, so that each can be hit.
pub struct Proxy {
    /// Its own address.
    pub endpoint: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    fault: AtomicUsize,
    /// Every n-th request is hit.
    every: AtomicU64,
    requests: AtomicU64,
    hit: AtomicU64,
}

const FAULTS: [Fault; 5] = [Fault::None, Fault::Unavailable, Fault::Internal, Fault::Cut, Fault::Hang];

impl Proxy {
    /// In front of `endpoint`.
    pub async fn start(endpoint: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let upstream = endpoint.trim_start_matches("http://").to_owned();
        let state: Arc<State> = Arc::default();
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (upstream, state) = (upstream.clone(), shared.clone());
                tokio::spawn(async move {
                    let _ = serve(client, &upstream, &state).await;
                });
            }
        });
        Proxy { endpoint: format!("http://{address}"), state }
    }

    /// Hits every `every`-th request from now on.
    pub fn set(&self, fault: Fault, every: u64) {
        self.state.every.store(every, Ordering::SeqCst);
        self.state.fault.store(FAULTS.iter().position(|f| *f == fault).expect("listed"), Ordering::SeqCst);
    }

    /// Requests seen, and how many of them were hit.
    pub fn counts(&self) -> (u64, u64) {
        (self.state.requests.load(Ordering::SeqCst), self.state.hit.load(Ordering::SeqCst))
    }
}

async fn serve(mut client: TcpStream, upstream: &str, state: &State) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let mut piece = [0; 4096];
        let n = client.read(&mut piece).await?;
        if n == 0 {
            return Ok(());
        }
        head.extend_from_slice(&piece[..n]);
    }
    let end = head.windows(4).position(|w| w == b"\r\n\r\n").expect("looked for") + 4;
    let body = head.split_off(end);
    let text = String::from_utf8_lossy(&head).into_owned();
    let length: usize =
        text.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse().unwrap_or(0))).unwrap_or(0);
    let number = state.requests.fetch_add(1, Ordering::SeqCst);
    let fault = FAULTS[state.fault.load(Ordering::SeqCst)];
    let hit = fault != Fault::None && number.is_multiple_of(state.every.load(Ordering::SeqCst).max(1));
    if hit {
        state.hit.fetch_add(1, Ordering::SeqCst);
    }
    let fault = if hit { fault } else { Fault::None };
    match fault {
        Fault::Unavailable | Fault::Internal => {
            drain(&mut client, length.saturating_sub(body.len())).await?;
            let (status, code) =
                if fault == Fault::Unavailable { ("503 Service Unavailable", "SlowDown") } else { ("500 Internal Server Error", "InternalError") };
            let xml = format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message><RequestId>injected-{number}</RequestId></Error>"
            );
            let answer =
                format!("HTTP/1.1 {status}\r\ncontent-type: application/xml\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{xml}", xml.len());
            return client.write_all(answer.as_bytes()).await;
        }
        Fault::Hang => {
            tokio::time::sleep(std::time::Duration::from_secs(60)).await;
            return Ok(());
        }
        Fault::None | Fault::Cut => {}
    }
    let mut server = TcpStream::connect(upstream).await?;
    // One request per connection: the client opens another for the next.
    let lines: Vec<&str> = text.trim_end().lines().filter(|l| !l.to_ascii_lowercase().starts_with("connection:")).collect();
    server.write_all(format!("{}\r\nconnection: close\r\n\r\n", lines.join("\r\n")).as_bytes()).await?;
    server.write_all(&body).await?;
    let mut left = length.saturating_sub(body.len());
    let mut piece = vec![0; 64 << 10];
    while left > 0 {
        let n = client.read(&mut piece).await?;
        if n == 0 {
            return Ok(());
        }
        server.write_all(&piece[..n]).await?;
        left = left.saturating_sub(n);
    }
    let mut sent = 0;
    loop {
        let n = server.read(&mut piece).await?;
        if n == 0 {
            return client.shutdown().await;
        }
        if fault == Fault::Cut && sent + n > 2048 {
            client.write_all(&piece[..(2048usize.saturating_sub(sent)).min(n)]).await?;
            return Ok(());
        }
        client.write_all(&piece[..n]).await?;
        sent += n;
    }
}

async fn drain(client: &mut TcpStream, mut left: usize) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    while left > 0 {
        let n = client.read(&mut piece).await?;
        if n == 0 {
            break;
        }
        left = left.saturating_sub(n);
    }
    Ok(())
}
