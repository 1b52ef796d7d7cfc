//! The FUSE mount. Not built yet: `forebay mount` says so.

use forebay_common::{Result, err};
use std::path::Path;

/// Errors: `Unsupported`, always, until the mount is built (docs/ROADMAP.md).
pub fn mount(mountpoint: &Path) -> Result<()> {
    Err(err!(
        Unsupported,
        "mounting on {}: the FUSE mount is not built yet; until then use `forebay fs get` and `forebay fs put`, or the client library",
        mountpoint.display()
    ))
}
