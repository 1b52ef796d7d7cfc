//! The words of the command line.

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use forebay_common::config::{Medium, TierConfig, TierDir, WorkerConfig};
use forebay_common::{Result, err};
use serde_json::Value;
use std::path::PathBuf;

/// The pool of hot data right in front of compute: a distributed cache over S3, HDFS and file systems.
#[derive(Parser)]
#[command(name = "forebay", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Configuration file (default: $FOREBAY_CONFIG, ~/.config/forebay/forebay.toml, /etc/forebay/forebay.toml)
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The master to talk to (also $FOREBAY_MASTER)
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub master: Option<String>,
    /// Print JSON for machines
    #[arg(long, global = true)]
    pub json: bool,
    /// What to log to standard error, like info or forebay_worker=debug (also $RUST_LOG)
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Master and worker in one process: the quickest way to try it
    Local(LocalArgs),
    /// The master: namespace, journal, mounts
    Master,
    /// A worker: caches blocks, serves clients
    Worker(WorkerArgs),
    /// Mount the namespace as a file system (FUSE)
    Mount(MountArgs),
    /// Files and folders
    #[command(subcommand)]
    Fs(FsCommand),
    /// Reports and checks
    #[command(subcommand)]
    Fsadmin(FsadminCommand),
    /// Long work that was begun with load, cp, persist, setReplication
    #[command(subcommand)]
    Job(JobCommand),
    /// The CSI driver: volumes of pods that are folders of the namespace, on each node, and with --controller volumes for claims (the chart runs it)
    Csi(CsiArgs),
    /// Have mounts while their process is replaced: one that is told to end (SIGTERM) leaves its mount here, and the next one (`mount --take-over`) finds it; programs wait meanwhile
    Keeper(KeeperArgs),
    /// What Fluid has done in the pods of a CacheRuntime (helm/examples/fluid-runtime-class.yaml)
    #[command(subcommand)]
    Fluid(FluidCommand),
    /// Make folders and give them to a user: in containers, whose image has no shell
    Prepare {
        /// Who is to have them
        #[arg(long, value_name = "UID:GID")]
        owner: String,
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
    },
    /// Measure a running cluster, each figure beside a reference of the same run
    Bench(forebay_bench::Options),
    /// Configuration: every value and where it came from
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
pub enum FluidCommand {
    /// Mount the dataset's under stores and unmount what is none of its; prints what is mounted then, as Fluid wants it (mountUFS)
    Mount,
    /// What is cached and how much room there is, as Fluid wants it (reportSummary)
    Summary,
    /// Have the paths cached that Fluid names in FLUID_DATALOAD_DATA_PATH (DataLoad)
    Load,
    /// Whether the mount of a client's pod answers: a probe's command knows no variables
    Check,
}

#[derive(Args)]
pub struct MountArgs {
    /// A folder of this machine
    pub mountpoint: PathBuf,
    /// The folder of the namespace to mount
    #[arg(long, default_value = "/", value_name = "PATH")]
    pub path: String,
    /// Change nothing through it (also -o ro)
    #[arg(long)]
    pub read_only: bool,
    /// Options, separated by commas, each also in section [fuse] of the configuration: attr_ttl_ms, entry_ttl_ms, threads, passthrough,
    /// read_ahead_kb, staging_dir, control_dir, allow_other, hard, shared_locks, prefetch_files, nodes_memory
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Take a mount that is there over from its process, with what is open in it: an upgrade that programs do not notice. Where none is there, mount
    #[arg(long)]
    pub take_over: bool,
    /// Stay until it is unmounted, or this is told to stop (SIGTERM)
    #[arg(long, short = 'f')]
    pub foreground: bool,
    /// Begin the mount anew when its process is killed or fails: at once, by a process that does nothing else
    #[arg(long, conflicts_with = "check")]
    pub supervise: bool,
    /// Make the folder where it is missing
    #[arg(long)]
    pub mkdir: bool,
    /// Mount nothing: say whether the mount that is there answers
    #[arg(long, conflicts_with_all = ["foreground", "read_only", "mkdir"])]
    pub check: bool,
    /// Where the process in the background logs to (default: /var/log/forebay/mount-….log, or in the user's data folder)
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
}

#[derive(Args)]
pub struct CsiArgs {
    /// The node's name in Kubernetes
    #[arg(long, env = "FOREBAY_CLIENT__NODE_NAME", default_value = "", hide_default_value = true)]
    pub node: String,
    /// The controller part: make volumes for claims of storage classes, one process for a cluster
    #[arg(long, conflicts_with_all = ["kubelet_dir", "inline_files"])]
    pub controller: bool,
    /// Kubelet's folder
    #[arg(long, default_value = "/var/lib/kubelet", value_name = "DIR")]
    pub kubelet_dir: PathBuf,
    /// Let inline volumes be of files, not of sockets alone: whoever may make a pod then reads and writes by this driver
    #[arg(long)]
    pub inline_files: bool,
    /// Where /healthz and /metrics are
    #[arg(long, default_value = "127.0.0.1:30002", value_name = "ADDRESS:PORT")]
    pub web: std::net::SocketAddr,
}

#[derive(Args)]
pub struct KeeperArgs {
    /// Control folders of the mounts (-o control_dir)
    #[arg(required = true, value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    /// How long a mount is kept; then it is taken away, and programs get an error instead of waiting
    #[arg(long, default_value = "120s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    pub wait: std::time::Duration,
    /// Where /healthz and /metrics are
    #[arg(long, default_value = "127.0.0.1:30003", value_name = "ADDRESS:PORT")]
    pub web: std::net::SocketAddr,
}

#[derive(Args)]
pub struct LocalArgs {
    /// Folder for journal, namespace and tiers (default: the user's data folder)
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Bytes of the MEM tier
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    pub mem: ByteSize,
    /// A tier, fastest first: MEM:64MiB, SSD:DIR:1GiB, HDD:DIR:10GiB; a medium named again adds a folder to its tier. Takes the
    /// place of --mem
    #[arg(long, value_name = "MEDIUM[:DIR]:SIZE", conflicts_with = "mem")]
    pub tier: Vec<TierArg>,
    /// Mount an under store, like --mount /s3=s3://bucket/prefix; may be repeated. Options follow after commas:
    /// /s3=s3://bucket,endpoint=http://host:9000,region=us-east-1
    #[arg(long, value_name = "PATH=URI")]
    pub mount: Vec<String>,
    /// Take any free port instead of the usual ones, and print them
    #[arg(long)]
    pub any_port: bool,
}

#[derive(Args)]
pub struct WorkerArgs {
    /// Bytes of the MEM tier
    #[arg(long, value_name = "SIZE")]
    pub mem: Option<ByteSize>,
    /// A tier, fastest first: MEM:DIR:64MiB, SSD:DIR:1GiB, HDD:DIR:10GiB; a medium named again adds a folder to its tier
    #[arg(long, value_name = "MEDIUM:DIR:SIZE", conflicts_with = "mem")]
    pub tier: Vec<TierArg>,
}

/// `MEDIUM[:DIR]:SIZE`.
#[derive(Clone, Debug)]
pub struct TierArg {
    medium: Medium,
    dir: Option<PathBuf>,
    quota: ByteSize,
}

impl std::str::FromStr for TierArg {
    type Err = String;

    fn from_str(raw: &str) -> Result<Self, String> {
        let usage = || format!("{raw:?}: write MEDIUM:DIR:SIZE, like SSD:/mnt/nvme0:100GiB");
        let (medium, rest) = raw.split_once(':').ok_or_else(usage)?;
        let (dir, size) = match rest.rsplit_once(':') {
            Some((dir, size)) => (Some(PathBuf::from(dir)), size),
            None => (None, rest),
        };
        let medium: Medium = medium.parse().map_err(|e: forebay_common::Error| e.message().to_owned())?;
        let quota = size.parse().map_err(|e| format!("{size:?} is no size: {e}"))?;
        if dir.as_ref().is_none_or(|d| d.as_os_str().is_empty()) && medium != Medium::Mem {
            return Err(format!("{raw:?}: which folder? write {}:DIR:{size}", medium.name()));
        }
        Ok(TierArg { medium, dir, quota })
    }
}

/// The tiers as a configuration value; `mem` is the folder of a MEM tier that names none.
fn tiers(args: &[TierArg], mem: &std::path::Path) -> Value {
    let mut tiers: Vec<TierConfig> = Vec::new();
    for arg in args {
        let path = arg.dir.clone().unwrap_or_else(|| mem.to_owned());
        let dir = TierDir { path: std::path::absolute(&path).unwrap_or(path), quota: arg.quota, reserve: ByteSize::b(0) };
        match tiers.iter_mut().find(|t| t.medium == arg.medium) {
            Some(tier) => tier.dirs.push(dir),
            None => tiers.push(TierConfig { medium: arg.medium, dirs: vec![dir] }),
        }
    }
    serde_json::to_value(tiers).unwrap_or_default()
}

#[derive(Subcommand)]
pub enum FsCommand {
    /// List a folder
    Ls {
        path: String,
        /// Everything below it
        #[arg(short = 'R', long, conflicts_with = "limit")]
        recursive: bool,
        /// Only so many entries; the under store is asked for no more pages than that takes
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
    },
    /// Everything known of a file or folder
    Stat { path: String },
    /// Print a file
    Cat {
        path: String,
        /// Start here
        #[arg(long, default_value_t = 0)]
        offset: u64,
        /// Print this many bytes
        #[arg(long)]
        length: Option<u64>,
    },
    /// Print the first bytes of a file
    Head {
        path: String,
        #[arg(short = 'c', long, default_value_t = 1024)]
        bytes: u64,
    },
    /// Print the last bytes of a file
    Tail {
        path: String,
        #[arg(short = 'c', long, default_value_t = 1024)]
        bytes: u64,
    },
    /// Copy a file or folder within the namespace, also between mounts; the workers move the bytes
    #[command(visible_alias = "migrate")]
    Cp {
        source: String,
        target: String,
        /// Replace files that are there
        #[arg(short, long)]
        force: bool,
        /// Delete the source when all of it has arrived
        #[arg(long)]
        r#move: bool,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Move a file or folder
    Mv {
        source: String,
        target: String,
        /// Replace a file or an empty folder that is there
        #[arg(short, long)]
        force: bool,
    },
    /// Delete files and folders
    Rm {
        #[arg(required = true)]
        paths: Vec<String>,
        /// Folders with everything below them
        #[arg(short = 'R', short_alias = 'r', long)]
        recursive: bool,
    },
    /// Make folders
    Mkdir {
        #[arg(required = true)]
        paths: Vec<String>,
        /// Also those above; folders that are there are fine
        #[arg(short, long)]
        parents: bool,
    },
    /// Make an empty file, or set the modification time of one that is there
    Touch { path: String },
    /// Bytes below a path, and how many of them are cached
    Du {
        path: String,
        /// One line for the whole path
        #[arg(short, long)]
        summary: bool,
    },
    /// Room in the cache
    Df,
    /// Count folders, files and bytes below a path
    Count { path: String },
    /// Exit code 0 if it holds, 1 if not, 2 if that could not be found out
    Test {
        path: String,
        /// It exists
        #[arg(short)]
        exists: bool,
        /// It is a folder
        #[arg(short)]
        directory: bool,
        /// It is a file
        #[arg(short)]
        file: bool,
        /// It is a file with at least one byte, or a folder with at least one entry
        #[arg(short)]
        size: bool,
        /// It is a file without bytes
        #[arg(short)]
        zero: bool,
    },
    /// Copy a local file or folder into the namespace
    #[command(visible_alias = "copyFromLocal")]
    Put {
        source: PathBuf,
        target: String,
        /// Replace files that are there
        #[arg(short, long)]
        force: bool,
        /// through, async, cache_only or ufs_only (default: as the path or its mount says)
        #[arg(long)]
        write_type: Option<String>,
        /// Whole copies in the cache before a file is acknowledged, where it is not in an under store by then
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
        replicas: u32,
    },
    /// Copy a file or folder out of the namespace
    #[command(visible_alias = "copyToLocal")]
    Get {
        source: String,
        target: PathBuf,
        /// Replace files that are there
        #[arg(short, long)]
        force: bool,
    },
    /// Set permission bits
    Chmod { mode: String, path: String },
    /// Set owner and group
    Chown {
        #[arg(value_name = "OWNER[:GROUP]")]
        owner: String,
        path: String,
    },
    /// List mounts, or mount an under store
    Mount {
        path: Option<String>,
        uri: Option<String>,
        /// Refuse changes below it
        #[arg(long)]
        read_only: bool,
        /// Everybody may read and write what is found in the store (--option shared=true)
        #[arg(long)]
        shared: bool,
        /// An option; may be repeated. Of the mount: sync_interval_ms (-1: never, 0: always), block_size, page_size, quota and
        /// reserved (bytes of each worker that it may have, and that others leave to it), write_type, replicas, persist_delay_ms,
        /// passive_replicas, ufs_mode, bandwidth, requests_per_second, owner, group, mode. Of its store: docs/UNDER_STORES.md
        #[arg(long = "option", value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Take a mount away; its under store stays as it is
    Unmount { path: String },
    /// Give a mount other options
    #[command(name = "updateMount", alias = "update-mount")]
    UpdateMount {
        path: String,
        /// Refuse changes below it, or take them again
        #[arg(long, value_name = "true|false")]
        read_only: Option<bool>,
        /// An option to set; may be repeated
        #[arg(long = "option", value_name = "KEY=VALUE")]
        options: Vec<String>,
        /// An option to take away; may be repeated
        #[arg(long, value_name = "KEY")]
        unset: Vec<String>,
    },
    /// Bring a folder's names in step with its under store now, whatever its sync interval is
    #[command(name = "loadMetadata", alias = "load-metadata")]
    LoadMetadata {
        path: String,
        /// And everything below it
        #[arg(short = 'R', long)]
        recursive: bool,
    },
    /// Compare everything below a path with its under store
    #[command(name = "checkConsistency", alias = "check-consistency")]
    CheckConsistency {
        path: String,
        /// Take over what is in the under store
        #[arg(short, long)]
        repair: bool,
    },
    /// Have files cached, by all workers together
    Load {
        /// Files, folders, or globs like '/data/*/part-?'
        #[arg(required_unless_present = "list")]
        paths: Vec<String>,
        /// A local file that names more paths, one per line
        #[arg(long, value_name = "FILE")]
        list: Option<PathBuf>,
        /// Whole copies, on as many workers
        #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true)]
        replicas: u32,
        /// Into this tier: MEM, SSD or HDD
        #[arg(long)]
        tier: Option<String>,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Drop cached bytes; what is in no under store stays
    Free {
        /// Files, folders, or globs
        #[arg(required = true)]
        paths: Vec<String>,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Have files of the cache alone in their under store as well
    Persist {
        /// Files, folders, or globs
        #[arg(required = true)]
        paths: Vec<String>,
        #[command(flatten)]
        job: JobArgs,
    },
    /// How many whole copies of files the cache keeps, from now on
    #[command(name = "setReplication", alias = "set-replication")]
    SetReplication {
        /// Files, folders, or globs
        #[arg(required = true)]
        paths: Vec<String>,
        /// At least
        #[arg(long, default_value_t = 0)]
        min: u32,
        /// At most; 0: no limit
        #[arg(long, default_value_t = 0)]
        max: u32,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Keep the files at or below a path cached, as they are now: once cached their bytes are not evicted
    Pin { path: String },
    /// Let pinned files be evicted again
    Unpin { path: String },
    /// Delete, or drop from the cache, a file or folder when its time is over, counted from now
    #[command(name = "setTtl", alias = "set-ttl")]
    SetTtl {
        path: String,
        /// Like 90m, 7d or "1h 30m"; a bare number is of milliseconds
        time: String,
        /// What then
        #[arg(long, value_enum, default_value_t = TtlAction::Delete)]
        action: TtlAction,
    },
    /// Let a file or folder stay
    #[command(name = "unsetTtl", alias = "unset-ttl")]
    UnsetTtl { path: String },
    /// Which workers have which blocks
    Location { path: String },
}

/// How a job is run.
#[derive(Args)]
pub struct JobArgs {
    /// At most so many bytes per second, like 100MiB
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<ByteSize>,
    /// Do not wait until it is over
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Subcommand)]
pub enum JobCommand {
    /// All jobs, the newest first
    Ls,
    /// How far a job is, and what failed
    Stat { job: u64 },
    /// End a job; what it has done stays
    Cancel { job: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TtlAction {
    /// From the namespace and the under store
    Delete,
    /// From the cache alone
    Free,
}

#[derive(Subcommand)]
pub enum FsadminCommand {
    /// Which file a block belongs to, and where it is
    #[command(name = "getBlockInfo", alias = "get-block-info")]
    GetBlockInfo {
        /// The number that `fs stat` shows
        block: u64,
    },
    /// What the cluster has and does
    Report {
        #[arg(value_enum, default_value_t = ReportKind::Summary)]
        kind: ReportKind,
    },
    /// Have a worker leave: its grants are taken back, what is only there is copied elsewhere, and nothing new comes to it
    #[command(name = "decommissionWorker", alias = "decommission-worker")]
    DecommissionWorker {
        /// host:port as `report capacity` shows it, or its id (`--json`)
        #[arg(required_unless_present = "this")]
        worker: Option<String>,
        /// The worker whose data folder (`worker.data_dir`) is here, before it is stopped: started again it is taken in again, and once it is gone it is forgotten
        #[arg(long, conflicts_with = "worker")]
        this: bool,
        /// Do not wait until it has left
        #[arg(long)]
        no_wait: bool,
        /// Wait no longer than this, like 60s
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "no_wait")]
        timeout: Option<std::time::Duration>,
    },
    /// Take a worker in again that was to leave
    #[command(name = "enableWorker", alias = "enable-worker")]
    EnableWorker {
        /// host:port as `report capacity` shows it, or its id (`--json`)
        worker: String,
    },
    /// Give up only copies on workers that the master's data know nothing of, because an earlier state was put back (`report` says how many there are)
    #[command(name = "dropOrphans", alias = "drop-orphans")]
    DropOrphans {
        /// Their bytes are nowhere else: yes, drop them
        #[arg(long, required = true)]
        yes: bool,
    },
    /// What holds for single paths and all below them
    #[command(name = "pathConf", alias = "path-conf", subcommand)]
    PathConf(PathConfCommand),
    /// Close an under store for maintenance, or open it again
    Ufs {
        /// The path it is mounted on
        path: String,
        /// noAccess (only what is cached is served), readOnly or readWrite
        #[arg(long, value_parser = ["noAccess", "readOnly", "readWrite"])]
        mode: String,
    },
    /// Look for what is wrong, and say how to mend it
    Doctor,
}

#[derive(Subcommand)]
pub enum PathConfCommand {
    /// All paths with settings of their own
    List,
    /// Set sync_interval_ms (-1: never, 0: always), write_type or replicas
    Set {
        path: String,
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Take settings away
    Unset {
        path: String,
        #[arg(required = true, value_name = "KEY")]
        settings: Vec<String>,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum ReportKind {
    Summary,
    Capacity,
    Metrics,
    /// Under stores, and what they cost
    Ufs,
    /// Files that were acknowledged and are not in their under store yet
    #[value(name = "atRisk", alias = "at-risk")]
    AtRisk,
    /// Locks of files that mounts hold
    Locks,
}

#[derive(Subcommand)]
pub enum ConfigCommand {
    /// Every value and where it came from
    Show,
    /// Whether the configuration is good
    Check,
}

impl Cli {
    /// Servers say what they do; commands only what goes wrong.
    pub fn log_filter(&self) -> &str {
        match (&self.log, &self.command) {
            (Some(filter), _) => filter,
            (None, Command::Master | Command::Worker(_) | Command::Csi(_) | Command::Keeper(_)) => "info,openraft=warn",
            (None, Command::Local(_)) => "warn,openraft=error",
            // What fuser says of requests that were interrupted meanwhile is nobody's trouble.
            (None, Command::Mount(args)) if args.foreground => "info,fuser=off",
            (None, _) => "error,forebay::waiting=warn",
        }
    }

    /// Flags that stand for configuration values.
    pub fn flags(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut flags: Vec<(&'static str, Value)> = Vec::new();
        if let Some(master) = &self.master {
            flags.push(("client.master", master.as_str().into()));
        }
        match &self.command {
            Command::Worker(worker) => {
                if let Some(mem) = worker.mem {
                    flags.push(("worker.mem_quota", format!("{}B", mem.as_u64()).into()));
                }
                if !worker.tier.is_empty() {
                    flags.push(("worker.tiers", tiers(&worker.tier, &WorkerConfig::default().mem_dir)));
                }
            }
            Command::Local(local) => {
                local.flags(&mut flags);
            }
            _ => {}
        }
        Ok(flags)
    }
}

impl LocalArgs {
    fn flags(&self, flags: &mut Vec<(&'static str, Value)>) {
        flags.push(("worker.mem_quota", format!("{}B", self.mem.as_u64()).into()));
        if let Some(dir) = &self.data_dir {
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            let at = |name: &str| Value::from(dir.join(name).to_string_lossy().into_owned());
            flags.push(("master.data_dir", at("master")));
            flags.push(("worker.data_dir", at("worker")));
            flags.push(("worker.mem_dir", at("worker/mem")));
        }
        if !self.tier.is_empty() {
            let mem = self.data_dir.as_ref().map_or_else(|| WorkerConfig::default().mem_dir, |dir| dir.join("worker/mem"));
            flags.push(("worker.tiers", tiers(&self.tier, &mem)));
        }
        if self.any_port {
            for key in [
                "master.rpc_port",
                "master.web_port",
                "master.hadoop_port",
                "worker.data_port",
                "worker.web_port",
                "worker.hadoop_port",
                "worker.hadoop_ipc_port",
            ] {
                flags.push((key, 0.into()));
            }
        }
    }

    /// The mounts of the command line. Errors: `InvalidArgument` for what is not PATH=URI.
    pub fn mounts(&self) -> Result<Vec<forebay_common::config::MountConfig>> {
        self.mount.iter().map(|raw| parse_mount(raw)).collect()
    }
}

fn parse_mount(raw: &str) -> Result<forebay_common::config::MountConfig> {
    let bad = || err!(InvalidArgument, "--mount {raw:?}: write PATH=URI, like /s3=s3://bucket/prefix");
    let (path, rest) = raw.split_once('=').ok_or_else(bad)?;
    let mut parts = rest.split(',');
    let uri = parts.next().filter(|u| !u.is_empty()).ok_or_else(bad)?.to_owned();
    let mut read_only = false;
    let mut options = std::collections::BTreeMap::new();
    for part in parts {
        match part.split_once('=') {
            Some((name, value)) => drop(options.insert(name.to_owned(), forebay_common::config::OptionValue::Plain(value.to_owned()))),
            None if part == "read_only" => read_only = true,
            None => return Err(bad()),
        }
    }
    Ok(forebay_common::config::MountConfig { path: path.to_owned(), uri, read_only, options })
}
