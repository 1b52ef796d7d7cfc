//! Places where a process can be made to die, for crash tests: `FOREBAY_ABORT_AT=NAME`.
//!
//! The variable is read once; without it a place costs a look at a static. The process dies as by `kill -9`: nothing is flushed, nobody is told.

use std::sync::LazyLock;

static AT: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("FOREBAY_ABORT_AT").ok());

/// Dies here if this is the place that was asked for.
pub fn abort_point(name: &str) {
    if AT.as_deref() == Some(name) {
        tracing::error!(name, "FOREBAY_ABORT_AT: this process ends here");
        // SIGKILL is not caught by anything, and leaves nothing to be run.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    }
}
