//! CPU time of this process and of the Forebay processes on this machine.

/// User and system seconds of this process and of every other process called `forebay`.
pub fn seconds() -> f64 {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        // `self` and `thread-self` name this process again.
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        (name.trim() == "forebay").then(|| entry.path())
    });
    let mut total = 0.0;
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    for process in processes {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        // Fields after the name in parentheses, proc(5): utime is the 14th of all, stime the 15th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let field = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        total += (field(11) + field(12)) / ticks;
    }
    total
}
