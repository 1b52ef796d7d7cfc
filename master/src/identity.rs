//! `simple` identity: the client states its user; groups come from this machine's user database.

use crate::namespace::Who;
use moka::sync::Cache;
use nix::unistd::{Group, User, getgrouplist};
use std::ffi::CString;
use std::time::Duration;

/// Users remembered, and for how long.
const USERS_MAX: u64 = 10_000;
const REMEMBERED: Duration = Duration::from_secs(60);

pub struct Identity {
    started_by: String,
    superuser_group: String,
    known: Cache<String, Who>,
}

impl Identity {
    pub fn new(superuser_group: String) -> Self {
        let started_by = User::from_uid(nix::unistd::geteuid()).ok().flatten().map_or_else(|| nix::unistd::geteuid().to_string(), |u| u.name);
        Identity { started_by, superuser_group, known: Cache::builder().max_capacity(USERS_MAX).time_to_live(REMEMBERED).build() }
    }

    /// The user this process runs as: the superuser.
    pub fn started_by(&self) -> &str {
        &self.started_by
    }

    /// A user with its groups.
    pub fn who(&self, user: &str) -> Who {
        if let Some(who) = self.known.get(user) {
            return who;
        }
        let groups = groups_of(user);
        let superuser = user == self.started_by || (!self.superuser_group.is_empty() && groups.contains(&self.superuser_group));
        let who = Who { user: user.to_owned(), groups, superuser };
        self.known.insert(user.to_owned(), who.clone());
        who
    }
}

fn groups_of(user: &str) -> Vec<String> {
    let (Ok(Some(found)), Ok(name)) = (User::from_name(user), CString::new(user)) else { return Vec::new() };
    let ids = getgrouplist(&name, found.gid).unwrap_or_else(|_| vec![found.gid]);
    ids.into_iter().filter_map(|gid| Group::from_gid(gid).ok().flatten().map(|g| g.name)).collect()
}
