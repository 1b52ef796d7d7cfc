//! A real S3 server on loopback over a folder: `forebay-peer-s3 FOLDER PORT`, signatures checked against
//! `S3_ACCESS_KEY` and `S3_SECRET_KEY`. Port 0 takes any free one. Prints `READY http://…` when it listens.
//!
//! For the demo and the tests only; the server is the `s3s-fs` crate.

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, port] = arguments.as_slice() else { return Err("usage: forebay-peer-s3 FOLDER PORT".into()) };
    std::fs::create_dir_all(folder)?;
    let store = s3s_fs::FileSystem::new(folder).map_err(|e| format!("{e:?}"))?;
    let mut service = S3ServiceBuilder::new(store);
    service.set_auth(SimpleAuth::from_single(std::env::var("S3_ACCESS_KEY")?, std::env::var("S3_SECRET_KEY")?));
    let service = service.build();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port.parse()?)).await?;
    println!("READY http://{}", listener.local_addr()?);
    let server = Builder::new(TokioExecutor::new());
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let connection = server.serve_connection(TokioIo::new(socket), service.clone()).into_owned();
        tokio::spawn(async move {
            // A client that hangs up in the middle is its own business.
            let _ = connection.await;
        });
    }
}
