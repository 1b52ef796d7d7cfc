//! How much memory this process may use, by its control group (cgroup v1 and v2) and its machine, and how much of that is taken.
//!
//! Called by the worker for its MEM tier, and by a mount for what it keeps of files. In a container the group's own folder may be all that is seen of the hierarchy: a
//! path of /proc/self/cgroup that is not there is passed over. Formats: proc_pid_cgroup(5), the kernel's admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.

use std::path::{Path, PathBuf};

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// A group with a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    dir: PathBuf,
    /// Bytes that its processes may use together, before they are held back or killed.
    pub limit_bytes: u64,
    unified: bool,
}

impl Group {
    /// The group of this process and those above it, as far as they have limits.
    pub fn own() -> Vec<Group> {
        Group::of(&std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(), Path::new(ROOT))
    }

    fn of(membership: &str, root: &Path) -> Vec<Group> {
        let mut groups = Vec::new();
        for line in membership.lines() {
            let mut fields = line.splitn(3, ':');
            let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
            let (hierarchy, unified) = match controllers {
                "" => (root.to_owned(), true),
                _ if controllers.split(',').any(|c| c == "memory") => (root.join("memory"), false),
                _ => continue,
            };
            let names: &[&str] = if unified { &["memory.max", "memory.high"] } else { &["memory.limit_in_bytes"] };
            let own = hierarchy.join(path.trim_start_matches('/'));
            for dir in own.ancestors().take_while(|dir| dir.starts_with(&hierarchy)) {
                let read = |name: &&str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
                // "max", and the largest multiple of a page, stand for none.
                let limit = names.iter().filter_map(read).filter(|limit| *limit < i64::MAX as u64 / 2).min();
                groups.extend(limit.map(|limit_bytes| Group { dir: dir.to_owned(), limit_bytes, unified }));
            }
        }
        groups
    }

    /// What is taken of its limit by memory that the kernel cannot give up (no page cache of files on disks), percent. `None`: it cannot be read.
    pub fn taken_percent(&self) -> Option<u64> {
        let names: &[&str] = if self.unified { &["anon", "shmem", "slab_unreclaimable", "sock"] } else { &["total_rss", "total_shmem"] };
        let stat = std::fs::read_to_string(self.dir.join("memory.stat")).ok()?;
        let values = stat.lines().filter_map(|line| line.split_once(' ')).filter(|(name, _)| names.contains(name));
        let taken: u64 = values.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum();
        Some(taken.saturating_mul(100) / self.limit_bytes.max(1))
    }
}

/// Bytes that this process may use: what its machine has, or its group may. `u64::MAX`: nothing says.
pub fn available_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    total.map(|kb| kb.saturating_mul(1024)).into_iter().chain(Group::own().into_iter().map(|group| group.limit_bytes)).min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn every_group_with_a_limit_counts() {
        let root = hierarchy(&[
            ("memory.max", "max\n"),
            ("pods/memory.max", "2000\n"),
            ("pods/memory.high", "1000\n"),
            ("pods/a/memory.max", "4000\n"),
            ("pods/memory.stat", "file 7\nanon 500\nanon_thp 1\nshmem 100\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/b/memory.limit_in_bytes", "900\n"),
            ("memory/b/memory.stat", "rss 1\ntotal_rss 400\ntotal_shmem 50\n"),
        ]);
        let of = |membership| Group::of(membership, root.path()).iter().map(|g| (g.limit_bytes, g.taken_percent())).collect::<Vec<_>>();
        assert_eq!(of("0::/pods/a\n"), [(4_000, None), (1_000, Some(60))]);
        assert_eq!(of("4:memory:/b\n3:cpu:/x\n0::/pods\n"), [(900, Some(50)), (1_000, Some(60))]);
        assert_eq!(of("9:name=systemd:/\n4:cpu,memory:/\n0::/\n"), []);
        // In a container: the path is the host's, and what is mounted is its own group.
        let root = hierarchy(&[("memory.max", "2000\n")]);
        assert_eq!(Group::of("0::/kubepods/pod1/c1\n", root.path())[0].limit_bytes, 2_000);
    }

    #[test]
    fn there_is_memory_here() {
        assert!((1 << 20..1 << 50).contains(&available_bytes()));
    }
}
