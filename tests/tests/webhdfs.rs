//! WebHDFS: Hadoop's own client of it beside a real HDFS, and plain HTTP.

use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_tests::cluster::p;
use forebay_tests::hadoop::{Done, commands, plain};
use forebay_tests::hdfs::Hdfs;
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, eventually, pattern};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Commands of the stock shell. `{in}`: files of this machine; `{out}`: a folder of it.
const ROWS: &str = "\
-mkdir|-p|/w/a
-mkdir|/w/a
-mkdir|/none/x
-put|{in}/small|/w/small
-put|{in}/small|/w/small
-put|-f|{in}/small|/w/small
-put|{in}/big|/w/big
-put|{in}/small|/w/a b+c&d=e
-cat|/w/small
-cat|/w/a b+c&d=e
-cat|/w/none
-cat|/w/a
-tail|/w/big
-head|/w/small
-get|/w/big|{out}/got
-ls|/w
-ls|/w/none
-ls|-R|/w
-ls|/w/small
-stat|%F %n %b %a|/w/small
-stat|%F %n %a|/w/a
-count|/w
-du|/w
-du|-s|/w
-test|-e|/w/small
-test|-d|/w/small
-test|-z|/w/small
-touchz|/w/empty
-chmod|600|/w/small
-chmod|1777|/w/a
-chown|ann:team|/w/small
-ls|/w/small
-chmod|600|/w/none
-mv|/w/small|/w/a
-mv|/w/none|/w/x
-mv|/w/a/small|/w/renamed
-mv|/w/renamed|/w/empty
-cp|/w/renamed|/w/copied
-cat|/w/copied
-touch|-m|-t|20200102:030405|/w/copied
-rmdir|/w/a
-rm|/w/none
-rm|/w/a
-rm|-skipTrash|/w/copied
-rm|-r|/w
-ls|/
";

/// (S-31) The stock shell over `webhdfs://` does and says what it does over that of a real HDFS.
#[tokio::test(flavor = "multi_thread")]
async fn the_shell_over_http_says_what_it_says_of_a_real_hdfs() {
    let cluster = Cluster::start(2, &[]).await;
    let group = nix::unistd::Group::from_gid(nix::unistd::getgid()).unwrap().unwrap().name;
    let hdfs = Hdfs::start_with(cluster.dir.path(), &[&format!("dfs.permissions.superusergroup={group}")]).await;
    let local = cluster.dir.path().join("in");
    std::fs::create_dir_all(&local).unwrap();
    std::fs::write(local.join("small"), "hello\n").unwrap();
    std::fs::write(local.join("big"), pattern(1, 0, 3_000_000)).unwrap();
    let (theirs, ours) = (hdfs.web.replace("http://", "webhdfs://"), format!("webhdfs://{}", cluster.web_address()));
    let (mut said, mut rows): (Vec<Vec<Done>>, Vec<Vec<String>>) = (Vec::new(), Vec::new());
    for (uri, name) in [(theirs, "out-hdfs"), (ours, "out-forebay")] {
        let out = cluster.dir.path().join(name);
        std::fs::create_dir_all(&out).unwrap();
        let lines = ROWS.replace("{in}", &local.to_string_lossy()).replace("{out}", &out.to_string_lossy());
        rows = lines.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect();
        let done = commands(&uri, &["-Ddfs.replication=1"], cluster.dir.path(), &rows);
        said.push(done.into_iter().map(|d| Done { out: plain(&d.out, &uri, &out), err: plain(&d.err, &uri, &out), ..d }).collect());
        assert!(std::fs::read(out.join("got")).unwrap() == pattern(1, 0, 3_000_000), "{uri}");
    }
    let wrong: Vec<String> = rows
        .iter()
        .zip(said[0].iter().zip(&said[1]))
        .filter(|(_, (theirs, ours))| theirs != ours)
        .map(|(row, (theirs, ours))| format!("{row:?}\n  HDFS    {theirs:?}\n  Forebay {ours:?}"))
        .collect();
    eprintln!("{} commands over WebHDFS, {} differ", rows.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(said[0].iter().filter(|d| d.exit == 0).count() > rows.len() / 2, "most of them are to succeed");
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value))
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
}

/// One request. `claims`: the length that is said, where it is not the body's.
async fn http(method: &str, url: &str, body: &[u8], claims: Option<usize>) -> Answer {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).await.unwrap();
    let length = claims.unwrap_or(body.len());
    let head = format!("{method} /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    if claims.is_some() {
        stream.shutdown().await.unwrap();
    }
    let mut raw = Vec::new();
    let _ = stream.read_to_end(&mut raw).await;
    let at = raw.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(raw.len());
    let head = String::from_utf8_lossy(&raw[..at]).into_owned();
    let status = head.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    Answer { status, head, body: raw.get(at + 4..).unwrap_or_default().to_vec() }
}

/// (S-31) Plain HTTP: redirects, ranges, refusals with Hadoop's exceptions, users, and writes that do not come to their end.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_over_plain_http() {
    let cluster = Cluster::start(2, &[]).await;
    let fs = cluster.client().await;
    let bytes = pattern(4, 0, 3_000_000);
    write(&fs, "/f", &bytes, forebay_client::CreateOptions { mode: 0o600, ..Default::default() }).await;
    let base = format!("http://{}/webhdfs/v1", cluster.web_address());
    let get = async |query: &str| http("GET", &format!("{base}{query}"), b"", None).await;
    let sent_on = get("/f?op=OPEN&user.name=root&offset=1000000&length=1500000").await;
    assert_eq!(sent_on.status, 307, "{}", sent_on.head);
    let location = sent_on.header("location").unwrap().to_owned();
    let answer = http("GET", &location, b"", None).await;
    assert_eq!((answer.status, answer.header("content-length")), (200, Some("1500000")));
    assert!(answer.body == bytes[1_000_000..2_500_000]);
    assert_eq!(get("/f?op=OPEN&user.name=root&noredirect=true").await.json()["Location"].as_str().map(|l| l.contains("op=OPEN")), Some(true));
    // Who says nothing is nobody in particular, and may not read it, on no way.
    let denied = get("/f?op=GETFILESTATUS").await;
    assert_eq!(denied.json()["FileStatus"]["permission"], "600");
    let denied = http("GET", &location.replace("user%2Ename=root", "user%2Ename=ann"), b"", None).await;
    assert_eq!((denied.status, denied.json()["RemoteException"]["exception"].as_str()), (403, Some("AccessControlException")));
    for (query, status, exception) in [
        ("/none?op=GETFILESTATUS", 404, "FileNotFoundException"),
        ("/none?op=OPEN", 404, "FileNotFoundException"),
        ("/?op=OPEN", 404, "FileNotFoundException"),
        ("/f?op=NONSENSE", 400, "UnsupportedOperationException"),
        ("/f", 400, "IllegalArgumentException"),
        ("/f?op=OPEN&user.name=root&offset=x", 400, "IllegalArgumentException"),
        ("/f?op=OPEN&user.name=root&offset=3000001", 403, "IOException"),
        ("/f?op=CREATE", 400, "IllegalArgumentException"),
        ("/../f?op=GETFILESTATUS", 400, "IllegalArgumentException"),
    ] {
        let answer = get(query).await;
        assert_eq!((answer.status, answer.json()["RemoteException"]["exception"].as_str()), (status, Some(exception)), "{query}");
    }
    let put = async |path: &str, query: &str, body: &[u8], claims: Option<usize>| {
        let sent_on = http("PUT", &format!("{base}{path}?op=CREATE&user.name=root{query}"), b"", None).await;
        assert_eq!(sent_on.status, 307, "{}", sent_on.head);
        http("PUT", sent_on.header("location").unwrap(), body, claims).await
    };
    assert_eq!(put("/new/x", "", &bytes, None).await.status, 201);
    assert!(read_all(&fs, "/new/x").await == bytes);
    let again = put("/new/x", "", b"other", None).await;
    assert_eq!((again.status, again.json()["RemoteException"]["exception"].as_str()), (403, Some("FileAlreadyExistsException")));
    assert_eq!(put("/new/x", "&overwrite=true&permission=640", b"other", None).await.status, 201);
    assert!(read_all(&fs, "/new/x").await == b"other");
    assert_eq!(fs.get_status(&p("/new/x")).await.unwrap().mode, 0o640);
    // Half of it, and then nothing.
    put("/new/half", "", &bytes[..1_000_000], Some(2_000_000)).await;
    let there = async || fs.exists(&p("/new/half")).await.unwrap();
    eventually("nothing is left of it", 30, async || !there().await).await;
    let listed = get("/new?op=LISTSTATUS&user.name=root").await.json();
    assert_eq!(listed["FileStatuses"]["FileStatus"].as_array().map(Vec::len), Some(1), "{listed}");
    let delete = http("DELETE", &format!("{base}/new?op=DELETE&user.name=root"), b"", None).await;
    assert_eq!(delete.json()["RemoteException"]["exception"].as_str(), Some("PathIsNotEmptyDirectoryException"));
    assert_eq!(http("DELETE", &format!("{base}/new?op=DELETE&user.name=root&recursive=true"), b"", None).await.json()["boolean"], true);
    // Others are not let in where they may not write.
    let denied = http("PUT", &format!("{base}/mine?op=MKDIRS&user.name=ann"), b"", None).await;
    assert_eq!(denied.status, 403);
    let ann = FileSystem::connect(&ClientConfig { user: "ann".into(), ..cluster.client_config() }).await.unwrap();
    assert!(!ann.exists(&p("/mine")).await.unwrap());
}
