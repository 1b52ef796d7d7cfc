//! What an operator allows a mount: its mode, its bandwidth, its rate of requests. The same for every kind of store.
//!
//! Limits are per process (each worker and the master have their own) and make callers wait; they refuse nobody.

use forebay_common::{Error, ErrorKind, Result, counter, err};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

counter!(WAITED, "forebay_ufs_limited_total", "calls to under stores that waited for a mount's limit of bandwidth or requests");

/// Options that every store takes.
pub const OPTIONS: &[&str] = &["ufs_mode", "bandwidth", "requests_per_second"];

/// Whether a store may be used (Alluxio's UFS modes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Read and changed.
    ReadWrite,
    /// Read.
    ReadOnly,
    /// Left alone, for maintenance: what is cached is served.
    NoAccess,
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(raw: &str) -> Result<Mode> {
        match raw {
            "readWrite" => Ok(Mode::ReadWrite),
            "readOnly" => Ok(Mode::ReadOnly),
            "noAccess" => Ok(Mode::NoAccess),
            _ => Err(err!(InvalidArgument, "ufs_mode {raw:?} is not readWrite, readOnly or noAccess")),
        }
    }
}

/// Bytes per second, shared by all who move them.
#[derive(Clone)]
pub struct Bandwidth(Option<Arc<DefaultDirectRateLimiter>>);

impl Bandwidth {
    /// 0: no limit. Less than a KiB per second counts as one.
    pub fn new(bytes_per_second: u64) -> Bandwidth {
        Bandwidth(limiter(if bytes_per_second == 0 { 0 } else { (bytes_per_second / UNIT).max(1) }))
    }

    /// Waits until so many bytes may move.
    pub async fn take(&self, bytes: u64) {
        let mut units = bytes.div_ceil(UNIT);
        while units > 0 && self.0.is_some() {
            // More than a second's worth at once would never be let through.
            let now = units.min(256);
            wait(&self.0, u32::try_from(now).unwrap_or(1)).await;
            units -= now;
        }
    }
}

/// Mode and limits of one mount in this process.
#[derive(Clone)]
pub struct Control {
    mode: Mode,
    bandwidth: Bandwidth,
    requests: Option<Arc<DefaultDirectRateLimiter>>,
}

/// A kilobyte is the unit of the bandwidth limiter, whose counts are of 32 bits.
const UNIT: u64 = 1 << 10;

fn limiter(per_second: u64) -> Option<Arc<DefaultDirectRateLimiter>> {
    let per_second = NonZeroU32::new(u32::try_from(per_second).unwrap_or(u32::MAX))?;
    Some(Arc::new(RateLimiter::direct(Quota::per_second(per_second))))
}

impl Control {
    /// Takes its options. Errors: `InvalidArgument` naming one.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Control> {
        let mode = options.get("ufs_mode").map_or(Ok(Mode::ReadWrite), |raw| raw.parse())?;
        let bandwidth = match options.get("bandwidth").map(|raw| (raw, raw.parse::<bytesize::ByteSize>())) {
            None => 0,
            Some((_, Ok(bytes))) if bytes.as_u64() == 0 || bytes.as_u64() >= UNIT => bytes.as_u64(),
            Some((raw, _)) => return Err(err!(InvalidArgument, "option bandwidth = {raw:?} is not bytes per second like 100MiB, 1KiB at least")),
        };
        let requests = match options.get("requests_per_second").map(|raw| (raw, raw.parse::<u64>())) {
            None => 0,
            Some((_, Ok(n))) => n,
            Some((raw, _)) => return Err(err!(InvalidArgument, "option requests_per_second = {raw:?} is not a number")),
        };
        Ok(Control { mode, bandwidth: Bandwidth::new(bandwidth), requests: limiter(requests) })
    }

    /// Waits for a request's turn. Errors: `Unavailable` or `ReadOnly` by the mode.
    pub async fn admit(&self, changes: bool) -> Result<()> {
        match self.mode {
            Mode::NoAccess => {
                return Err(err!(
                    Unavailable,
                    "an operator has closed this under store (ufs_mode noAccess): `forebay fsadmin ufs --mode readWrite PATH` opens it"
                )
                .with_retryable(false));
            }
            Mode::ReadOnly if changes => {
                return Err(Error::new(ErrorKind::ReadOnly, "an operator has set this under store to ufs_mode readOnly"));
            }
            _ => {}
        }
        wait(&self.requests, 1).await;
        Ok(())
    }

    /// Waits until so many bytes may move.
    pub async fn bytes(&self, bytes: usize) {
        self.bandwidth.take(bytes as u64).await;
    }
}

async fn wait(limiter: &Option<Arc<DefaultDirectRateLimiter>>, n: u32) {
    let Some(limiter) = limiter else { return };
    let mut left = n;
    while left > 0 {
        // A quota below `n` is asked for one by one.
        let take = NonZeroU32::new(left).unwrap_or(NonZeroU32::MIN);
        match limiter.check_n(take) {
            Ok(Ok(())) => return,
            Ok(Err(_)) => {
                WAITED.inc();
                if limiter.until_n_ready(take).await.is_ok() {
                    return;
                }
            }
            Err(_) => {
                limiter.until_ready().await;
                left -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Result<Control> {
        Control::parse(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[tokio::test]
    async fn modes_and_options() {
        assert_eq!(with("ufs_mode", "noAccess").unwrap().admit(false).await.unwrap_err().kind(), ErrorKind::Unavailable);
        let read_only = with("ufs_mode", "readOnly").unwrap();
        assert!(read_only.admit(false).await.is_ok());
        assert_eq!(read_only.admit(true).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert!(with("ufs_mode", "x").is_err() && with("bandwidth", "x").is_err() && with("bandwidth", "10").is_err());
    }

    #[tokio::test]
    async fn bandwidth_makes_wait() {
        let slow = with("bandwidth", "1MiB").unwrap();
        slow.bytes(1 << 20).await;
        let before = WAITED.get();
        slow.bytes(512 << 10).await;
        assert!(WAITED.get() > before, "half a MiB beyond the first second's");
    }
}
