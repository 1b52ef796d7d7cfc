//! A real HDFS that outlives its own death, and Hadoop's shell as a third party's eye: both by `tests/peers/hdfs/hdfs.sh`.
//!
//! For the suites of the HDFS under store. The server may be killed and started again on its data, at the same addresses.
//! Permissions are checked; who runs the test is superuser. For a second or more after a start the NameNode answers in safe mode:
//! it tells of names, but neither changes them nor says where blocks are. `start` and `start_again` return when that is over.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A NameNode and a DataNode, in one process.
pub struct Hdfs {
    child: Child,
    /// `hdfs://127.0.0.1:PORT`.
    pub uri: String,
    /// `http://127.0.0.1:PORT`, for WebHDFS.
    pub web: String,
    dir: PathBuf,
    keys: Vec<String>,
}

/// The name service of `config_files`.
pub const NAMESERVICE: &str = "cluster";

/// Nobody listens on it: connections are refused at once.
const DEAD: &str = "127.0.0.1:1";

fn script(command: &str) -> Command {
    let mut script = Command::new("bash");
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/hdfs/hdfs.sh")).arg(command).stdin(Stdio::null());
    script
}

/// The script becomes the server, so the child's id is the server's.
fn spawn(dir: &Path, keys: &[String], format: bool) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("hdfs.log")).expect("log");
    let mut command = script("run");
    command.arg(format!("dir={}", dir.join("hdfs").display())).arg(format!("format={format}")).args(keys);
    command.stdout(Stdio::piped()).stderr(log).spawn().expect("spawn")
}

impl Hdfs {
    /// Starts one with a new file system in a folder, on free ports.
    pub async fn start(dir: &Path) -> Hdfs {
        Hdfs::start_with(dir, &[]).await
    }

    /// The same with more keys of `hdfs.sh run`, or of Hadoop: `n=3`, `dfs.blocksize=1048576`.
    pub async fn start_with(dir: &Path, keys: &[&str]) -> Hdfs {
        let keys: Vec<String> = keys.iter().map(|k| (*k).to_owned()).collect();
        let child = spawn(dir, &keys, true);
        let mut hdfs = Hdfs { child, uri: String::new(), web: String::new(), dir: dir.to_owned(), keys };
        hdfs.ready().await;
        hdfs
    }

    /// Waits until it serves, and learns where. The first time ever it downloads Hadoop before that.
    async fn ready(&mut self) {
        let mut reader = BufReader::new(self.child.stdout.take().expect("stdout"));
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            while !line.starts_with("READY ") {
                line.clear();
                if !reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                    return;
                }
            }
            let _ = sender.send(line);
            let _ = std::io::copy(&mut reader, &mut std::io::sink());
        });
        let Ok(line) = receiver.await else {
            panic!("HDFS ended at once:\n{}", std::fs::read_to_string(self.dir.join("hdfs.log")).unwrap_or_default());
        };
        let mut words = line.split_whitespace().skip(1);
        self.uri = words.next().expect("URI").to_owned();
        self.web = format!("http://{}", words.find_map(|w| w.strip_prefix("http=")).expect("web address"));
    }

    /// `kill -9`. What was acknowledged stays in the folder.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().expect("wait");
    }

    /// Starts it on the data it has, at the same addresses; kills it first if it runs.
    pub async fn start_again(&mut self) {
        self.kill();
        let before = self.uri.clone();
        self.child = spawn(&self.dir, &self.keys, false);
        self.ready().await;
        assert_eq!(self.uri, before, "the same address");
    }

    /// Runs `hdfs dfs` against it, as the user who runs the test; some seconds.
    pub fn shell(&self, args: &[&str]) -> Output {
        let mut command = script("shell");
        command.arg(format!("-Dfs.defaultFS={}", self.uri)).args(args).env_remove("HADOOP_CONF_DIR");
        command.output().expect("hdfs.sh")
    }

    /// Writes a folder of Hadoop's configuration files and returns it: a highly available name service of two NameNodes, of
    /// which the first is dead and the second is this one, so that every client has to fail over.
    pub fn config_files(&self, dir: &Path) -> PathBuf {
        let folder = dir.join("hadoop");
        std::fs::create_dir_all(&folder).expect("folder");
        let address = self.uri.trim_start_matches("hdfs://");
        let provider = "org.apache.hadoop.hdfs.server.namenode.ha.ConfiguredFailoverProxyProvider";
        let core = [("fs.defaultFS".to_owned(), format!("hdfs://{NAMESERVICE}"))];
        let hdfs = [
            ("dfs.nameservices".to_owned(), NAMESERVICE.to_owned()),
            (format!("dfs.ha.namenodes.{NAMESERVICE}"), "nn1,nn2".to_owned()),
            (format!("dfs.namenode.rpc-address.{NAMESERVICE}.nn1"), DEAD.to_owned()),
            (format!("dfs.namenode.rpc-address.{NAMESERVICE}.nn2"), address.to_owned()),
            (format!("dfs.client.failover.proxy.provider.{NAMESERVICE}"), provider.to_owned()),
            ("dfs.replication".to_owned(), "1".to_owned()),
        ];
        std::fs::write(folder.join("core-site.xml"), xml(&core)).expect("core-site.xml");
        std::fs::write(folder.join("hdfs-site.xml"), xml(&hdfs)).expect("hdfs-site.xml");
        folder
    }
}

impl Drop for Hdfs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn xml(properties: &[(String, String)]) -> String {
    let lines: String = properties.iter().map(|(k, v)| format!("  <property><name>{k}</name><value>{v}</value></property>\n")).collect();
    format!("<?xml version=\"1.0\"?>\n<configuration>\n{lines}</configuration>\n")
}
