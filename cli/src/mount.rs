//! `forebay mount`, in the foreground or as a process of its own, and what `mount -t forebay` calls.

mod supervise;

use crate::args::MountArgs;
use crate::output::{self, Output};
use forebay_common::config::{Config, FuseConfig};
use forebay_common::{AbsPath, Error, Result, err};
use forebay_fuse::Event;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// What the process in the background says to the one that started it when the mount is there.
const READY: &str = "READY ";
/// What it says then of a mount that was another process's before (read by `forebay-csi` as well).
const TAKEN: &str = "taken over; ";
/// What it says when another process has taken the mount over (read by `forebay-csi` as well).
const GIVEN: &str = "GIVEN";
/// What it says when a keeper has the mount for the process that comes next.
const KEPT: &str = "KEPT";
/// Bytes of its log that are shown when it ends before that.
const LOG_SHOWN: usize = 4_000;
/// The name under which `mount -t forebay` calls this binary.
const HELPER: &str = "mount.forebay";

/// Options of mount(8) that say nothing to a file system like this one, or that mount(8) has dealt with.
const NOT_OURS: &[&str] = &[
    "defaults", "rw", "_netdev", "noauto", "auto", "nofail", "nouser", "user", "users", "dev", "nodev", "suid", "nosuid", "exec", "atime", "noatime",
    "relatime", "x-",
];

/// Mounts. Errors: options, the mount point, the master.
pub async fn run(args: MountArgs, config: &Config, output: Output) -> Result<()> {
    let (fuse, read_only) = options(&args, &config.fuse)?;
    let path = AbsPath::parse(args.path.as_bytes())?;
    let mountpoint = std::path::absolute(&args.mountpoint).map_err(|e| Error::io(args.mountpoint.display(), &e))?;
    if args.check {
        return check(&mountpoint, output).await;
    }
    if args.supervise && args.foreground {
        return supervise::run(&mountpoint).await;
    }
    if args.mkdir {
        forebay_common::mountpoint::make(&mountpoint)?;
    }
    if args.foreground {
        let shown = mountpoint.display().to_string();
        let options = forebay_fuse::Options { mountpoint, path, read_only: read_only || args.read_only, take_over: args.take_over };
        return forebay_fuse::run(&config.client, &fuse, options, &|event| {
            let _ = match event {
                Event::Ready { how, taken_over: false } => output::line(&format!("{READY}{shown}: {how}")),
                Event::Ready { how, taken_over: true } => output::line(&format!("{READY}{shown}: {TAKEN}{how}")),
                Event::Given => output::line(GIVEN),
                Event::Kept => output::line(KEPT),
            };
        })
        .await;
    }
    let log = args.log_file.clone().unwrap_or_else(|| default_log(&mountpoint));
    let how = in_background(&log)?;
    let json = serde_json::json!({ "mountpoint": mountpoint, "path": args.path, "log": log, "how": how });
    output
        .show(&json, || output::line(&format!("{} is mounted on {} ({how}); log: {}; umount {1} ends it", path, mountpoint.display(), log.display())))
}

/// How long a mount may take to tell its statistics.
const CHECK_WAIT: Duration = Duration::from_secs(4);

/// Whether a mount is there and its process answers. Errors: nothing of ours is there; it does not answer.
pub async fn check(mountpoint: &Path, output: Output) -> Result<()> {
    let file = mountpoint.join(OsStr::from_bytes(forebay_fuse::STATISTICS));
    // A thread of its own, which this process does not wait for: a read of a mount that hangs cannot be given up.
    let (said, heard) = tokio::sync::oneshot::channel();
    let asked = file.clone();
    std::thread::spawn(move || said.send(std::fs::read(&asked)));
    let shown = mountpoint.display();
    match tokio::time::timeout(CHECK_WAIT, heard).await {
        Ok(Ok(Ok(_))) => output.show(&serde_json::json!({ "mountpoint": mountpoint, "answers": true }), || output::line(&format!("{shown} answers"))),
        Ok(Ok(Err(e))) if e.kind() == std::io::ErrorKind::NotFound => Err(err!(NotFound, "no Forebay mount is on {shown}")),
        Ok(Ok(Err(e))) => Err(Error::io(format!("the mount on {shown}"), &e)),
        _ => Err(err!(Timeout, "the mount on {shown} does not answer within {} s", CHECK_WAIT.as_secs())),
    }
}

fn options(args: &MountArgs, defaults: &FuseConfig) -> Result<(FuseConfig, bool)> {
    let mut fuse = defaults.clone();
    let mut read_only = false;
    for option in args.options.iter().flat_map(|list| list.split(',')).filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            option if NOT_OURS.iter().any(|name| option == *name || (name.ends_with('-') && option.starts_with(name))) => {}
            option => fuse.set(option)?,
        }
    }
    Ok((fuse, read_only))
}

/// Beside the others of this user, named after the mount point.
fn default_log(mountpoint: &Path) -> PathBuf {
    let name = mountpoint.display().to_string().trim_matches('/').replace('/', "-");
    let dir = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/var/log/forebay")
    } else {
        directories::BaseDirs::new().map_or_else(std::env::temp_dir, |dirs| dirs.data_local_dir().join("forebay"))
    };
    dir.join(format!("mount-{name}.log"))
}

/// Starts the same command in the foreground of another session, and waits until the mount is there.
fn in_background(log: &Path) -> Result<String> {
    if let Some(dir) = log.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir.display(), &e))?;
    }
    let file = std::fs::File::options().create(true).append(true).open(log).map_err(|e| Error::io(log.display(), &e))?;
    let began = file.metadata().map_or(0, |metadata| metadata.len());
    let own = std::env::current_exe().map_err(|e| Error::io("the path of this program", &e))?;
    let mut command = Command::new(own);
    command.args(arguments().skip(1)).arg("--foreground").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file).process_group(0);
    let mut child = command.spawn().map_err(|e| Error::io("starting the mount's process", &e))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = BufReader::new(stdout).read_line(&mut line);
    }
    match line.strip_prefix(READY).and_then(|ready| ready.split_once(": ")) {
        Some((_, how)) => Ok(how.trim().to_owned()),
        None => {
            let _ = child.wait();
            let text = std::fs::read(log).unwrap_or_default();
            let said = String::from_utf8_lossy(&text[usize::try_from(began).unwrap_or(0).min(text.len())..]).into_owned();
            let said = said.trim().trim_start_matches("forebay: ");
            Err(err!(Unavailable, "{}", said.get(said.len().saturating_sub(LOG_SHOWN)..).unwrap_or(said)).with_retryable(false))
        }
    }
}

/// The command line, with `mount.forebay SOURCE TARGET -o …` put into our own words.
pub fn arguments() -> impl Iterator<Item = OsString> {
    let all: Vec<OsString> = std::env::args_os().collect();
    let called_as = all.first().and_then(|name| Path::new(name).file_name()).map(OsStr::to_owned);
    if called_as.as_deref() == Some(OsStr::new(HELPER)) { from_helper(&all) } else { all }.into_iter()
}

/// See mount(8), "External helpers": `mount.TYPE SOURCE TARGET [-sfnv] [-N namespace] [-o options] [-t type.subtype]`.
fn from_helper(all: &[OsString]) -> Vec<OsString> {
    let mut positional = Vec::new();
    let mut out: Vec<OsString> = vec!["forebay".into(), "mount".into()];
    let mut rest = all.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o") => {
                if let Some(options) = rest.next() {
                    out.extend(["-o".into(), options.clone()]);
                }
            }
            Some("-t" | "-N") => drop(rest.next()),
            Some(flag) if flag.starts_with('-') => {}
            _ => positional.push(argument.clone()),
        }
    }
    if let Some(source) = positional.first().map(|source| source.to_string_lossy().into_owned()) {
        let (master, path) = source.split_once('/').map_or((source.as_str(), ""), |(master, path)| (master, path));
        let master = master.trim_end_matches(':');
        if !matches!(master, "" | "none" | "forebay") {
            out.extend(["--master".into(), if master.contains(':') { master.into() } else { format!("{master}:19998").into() }]);
        }
        out.extend(["--path".into(), format!("/{path}").into()]);
    }
    out.extend(positional.into_iter().nth(1));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(words: &[&str]) -> Vec<String> {
        from_helper(&words.iter().map(OsString::from).collect::<Vec<_>>()).into_iter().map(|w| w.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn what_mount_says_is_put_into_our_words() {
        let said = translated(&["/sbin/mount.forebay", "master:19998/warehouse/t", "/mnt/t", "-n", "-o", "ro,_netdev,threads=8"]);
        assert_eq!(said, ["forebay", "mount", "-o", "ro,_netdev,threads=8", "--master", "master:19998", "--path", "/warehouse/t", "/mnt/t"]);
        assert_eq!(translated(&["mount.forebay", "none", "/mnt", "-t", "forebay"]), ["forebay", "mount", "--path", "/", "/mnt"]);
        assert_eq!(translated(&["mount.forebay", "host/", "/mnt"])[2..4], ["--master", "host:19998"]);
    }

    #[test]
    fn options_are_ours_or_named() {
        let args = |list: &str| MountArgs {
            options: vec![list.to_owned()],
            mountpoint: "/m".into(),
            path: "/".into(),
            read_only: false,
            mkdir: false,
            check: false,
            supervise: false,
            take_over: false,
            foreground: true,
            log_file: None,
        };
        let (fuse, read_only) = options(&args("ro,_netdev,x-systemd.automount,threads=8,hard,attr_ttl_ms=0"), &FuseConfig::default()).unwrap();
        assert!(read_only && fuse.threads == 8 && fuse.hard && fuse.attr_ttl_ms == 0);
        assert!(options(&args("thread=8"), &FuseConfig::default()).unwrap_err().message().contains("threads"));
        assert!(options(&args("threads=0"), &FuseConfig::default()).is_err());
    }
}
