//! The keys block tokens are signed with: made here, rotated, kept in a file so that tokens outlive a restart.
//!
//! A new key signs only after workers had time to hear of it; an old one is kept until its last token has expired.

use forebay_common::config::MasterConfig;
use forebay_common::error::at;
use forebay_common::token::{Claims, TokenKey};
use forebay_common::{Result, clock, err};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Kept {
    id: u64,
    secret: Vec<u8>,
    signs_from_ms: u64,
}

pub struct TokenKeys {
    path: PathBuf,
    keys: Mutex<Vec<Kept>>,
    rotation_ms: u64,
    token_ttl_ms: u64,
    settle_ms: u64,
}

impl TokenKeys {
    /// Reads the keys of `dir`, or makes the first one.
    pub fn open(dir: &Path, config: &MasterConfig) -> Result<Self> {
        let path = dir.join("token-keys.json");
        let keys: Vec<Kept> = match std::fs::read(&path) {
            Ok(raw) => {
                serde_json::from_slice(&raw).map_err(|e| err!(Corrupt, "{}: {e}: remove it, clients will open their files again", path.display()))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(forebay_common::Error::io(path.display(), &e)),
        };
        let keys = TokenKeys {
            path,
            keys: Mutex::new(keys),
            rotation_ms: config.token_key_rotation_ms.max(60_000),
            token_ttl_ms: config.token_ttl_ms,
            settle_ms: config.worker_timeout_ms,
        };
        keys.rotate()?;
        Ok(keys)
    }

    /// Makes a new key when the newest is old enough, and drops those whose tokens have all expired.
    pub fn rotate(&self) -> Result<()> {
        let now = clock::now_ms();
        let mut keys = self.keys.lock().unwrap_or_else(|e| e.into_inner());
        let due = keys.last().is_none_or(|k| k.signs_from_ms + self.rotation_ms <= now);
        if !due {
            return Ok(());
        }
        let fresh = TokenKey::generate();
        let signs_from_ms = if keys.is_empty() { now } else { now + self.settle_ms };
        keys.push(Kept { id: fresh.id, secret: fresh.secret, signs_from_ms });
        while keys.len() > 2 && keys[1].signs_from_ms + self.token_ttl_ms * 2 < now {
            keys.remove(0);
        }
        let raw = serde_json::to_vec(&*keys).map_err(|e| err!(Internal, "token keys: {e}"))?;
        let temporary = self.path.with_extension("tmp");
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary).map_err(at("token keys"))?;
        file.write_all(&raw).and_then(|()| file.sync_all()).map_err(at("token keys"))?;
        std::fs::rename(&temporary, &self.path).map_err(at("token keys"))
    }

    /// All keys, for workers.
    pub fn all(&self) -> Vec<TokenKey> {
        self.keys.lock().unwrap_or_else(|e| e.into_inner()).iter().map(|k| TokenKey { id: k.id, secret: k.secret.clone() }).collect()
    }

    /// Signs with the newest key that workers know.
    pub fn sign(&self, claims: &Claims) -> Result<Vec<u8>> {
        let now = clock::now_ms();
        let keys = self.keys.lock().unwrap_or_else(|e| e.into_inner());
        let key = keys.iter().rev().find(|k| k.signs_from_ms <= now).or(keys.first()).ok_or_else(|| err!(Internal, "there is no token key"))?;
        TokenKey { id: key.id, secret: key.secret.clone() }.sign(claims)
    }
}
