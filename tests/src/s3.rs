//! An S3 server that checks signatures and honours If-Match: versitygw, built once by `tests/peers/versitygw.sh`.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running server with one empty bucket, `bucket`.
pub struct S3 {
    child: Option<Child>,
    port: u16,
    /// `http://127.0.0.1:PORT`.
    pub endpoint: String,
    /// Where its objects are, as files.
    pub folder: std::path::PathBuf,
}

/// Access key and secret.
pub const KEYS: (&str, &str) = ("testkey", "testsecret");

impl S3 {
    /// Starts one in a folder.
    pub async fn start(dir: &Path) -> S3 {
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("port").port();
        S3::start_at(dir, port).await
    }

    async fn start_at(dir: &Path, port: u16) -> S3 {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/versitygw.sh");
        let built = Command::new("bash").arg(&script).output().expect("versitygw.sh");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let binary = String::from_utf8(built.stdout).expect("path").trim().to_owned();
        let folder = dir.join("s3");
        for name in ["data/bucket", "iam"] {
            std::fs::create_dir_all(folder.join(name)).expect("folder");
        }
        let child = Command::new(binary)
            .env("ROOT_ACCESS_KEY", KEYS.0)
            .env("ROOT_SECRET_KEY", KEYS.1)
            .args(["--port", &format!("127.0.0.1:{port}"), "-q", "--keep-alive", "--iam-dir"])
            .arg(folder.join("iam"))
            .arg("posix")
            .arg(folder.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(dir.join("s3.log")).expect("log"))
            .spawn()
            .expect("spawn");
        let endpoint = format!("http://127.0.0.1:{port}");
        crate::eventually("S3 server up", 30, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
        S3 { child: Some(child), port, endpoint, folder: folder.join("data/bucket") }
    }

    /// `kill -9`; its objects stay.
    pub fn stop(mut self) -> Stopped {
        self.kill();
        Stopped(self.port)
    }

    /// `kill -9`, and a start on the same folder and port.
    pub async fn kill_and_start_again(self, dir: &Path) -> S3 {
        self.stop().start_again(dir).await
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Options of a mount of it, through another endpoint if one is given.
    pub fn options(&self, endpoint: Option<&str>) -> std::collections::BTreeMap<String, String> {
        [("endpoint", endpoint.unwrap_or(&self.endpoint)), ("region", "us-east-1"), ("access_key_id", KEYS.0), ("secret_access_key", KEYS.1)]
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One that is down.
pub struct Stopped(u16);

impl Stopped {
    /// Starts it on its folder and port.
    pub async fn start_again(self, dir: &Path) -> S3 {
        S3::start_at(dir, self.0).await
    }
}
