//! `forebay mount --supervise`: a small process that begins the mount's process anew when that is killed or fails.
//!
//! What a dead mount left is taken away by the new one; programs that had files open get ENOTCONN for these, and open them again. A process that ends well (the mount was taken
//! away, or it was told to stop) is not begun anew. Where another process has taken the mount over this one waits until it is told to stop: whoever runs it would begin it anew. Nor is one that never got as far as mounting: its error is somebody's to mend.

use super::{GIVEN, KEPT, READY, arguments};
use forebay_common::{Error, Result, err};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};

/// Pauses between two starts of a process that ends at once grow from this to that.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long the last words of a process that has ended may take.
const LAST_WORDS: Duration = Duration::from_millis(100);

fn start(words: &[OsString]) -> Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let own = std::env::current_exe().map_err(|e| Error::io("the path of this program", &e))?;
    let mut child = Command::new(own)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Error::io("starting the mount's process", &e))?;
    let stdout = child.stdout.take().ok_or_else(|| err!(Internal, "the mount's process has no output"))?;
    Ok((child, BufReader::new(stdout).lines()))
}

/// SIGTERM or SIGINT.
struct Stop(Signals, Signals);

impl Stop {
    fn new() -> Result<Stop> {
        let on = |kind| signal(kind).map_err(|e| Error::io("signals", &e));
        Ok(Stop(on(SignalKind::terminate())?, on(SignalKind::interrupt())?))
    }

    async fn asked(&mut self) -> Signal {
        tokio::select! {
            _ = self.0.recv() => Signal::SIGTERM,
            _ = self.1.recv() => Signal::SIGINT,
        }
    }
}

/// What the mount's processes have said.
#[derive(Default)]
struct Heard {
    mounted: bool,
    /// Another process has the mount.
    given: bool,
    /// A keeper has it, and no process of ours since.
    kept: bool,
}

impl Heard {
    fn line(&mut self, line: &str) -> Result<()> {
        // Once, for whoever started this.
        if !self.mounted {
            crate::output::line(line)?;
        }
        let ready = line.starts_with(READY);
        self.mounted |= ready;
        self.given |= line == GIVEN;
        self.kept = line == KEPT || (self.kept && !ready);
        Ok(())
    }
}

/// The same command without this, as often as it takes. Errors: it does not get as far as mounting.
pub async fn run(mountpoint: &Path) -> Result<()> {
    let words: Vec<OsString> = arguments().skip(1).filter(|word| word != "--supervise").collect();
    let mut stop = Stop::new()?;
    let (mut heard, mut stopping, mut pause) = (Heard::default(), false, PAUSES.0);
    loop {
        let began = tokio::time::Instant::now();
        let ended = match start(&words) {
            Ok((mut child, mut lines)) => {
                let ended = loop {
                    tokio::select! {
                        Ok(Some(line)) = lines.next_line() => heard.line(&line)?,
                        ended = child.wait() => break ended.map_or_else(|e| e.to_string(), |ended| if ended.success() { String::new() } else { ended.to_string() }),
                        signal = stop.asked() => {
                            stopping = true;
                            if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
                                // It hands over what is being written, and takes the mount away or gives it to a keeper.
                                let _ = kill(Pid::from_raw(id), signal);
                            }
                        }
                    }
                };
                // Its last words may come with its end.
                while let Ok(Ok(Some(line))) = tokio::time::timeout(LAST_WORDS, lines.next_line()).await {
                    heard.line(&line)?;
                }
                ended
            }
            Err(e) => e.to_string(),
        };
        if heard.given && !stopping {
            tracing::info!("another process has the mount now");
            stop.asked().await;
        }
        // A keeper has it, and nobody has told this one to end: the next process takes it back.
        if heard.given || (ended.is_empty() && (stopping || !heard.kept)) {
            return Ok(());
        }
        if stopping || !heard.mounted {
            return Err(err!(Unavailable, "the mount's process ended with {ended}: what it said is above").with_retryable(false));
        }
        tracing::error!(ended, "the mount's process ended by itself; it is begun anew");
        pause = if began.elapsed() > PAUSES.1 { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.asked() => {
                // Nobody is left who would; what a keeper has is its own.
                if !heard.kept {
                    let _ = umount2(mountpoint, MntFlags::MNT_DETACH);
                }
                return Ok(());
            }
        }
    }
}
