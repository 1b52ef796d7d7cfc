//! `apply` against a reference model: the namespace as a map from paths, and an under store as a set of keys, in a few lines.

use super::*;
use crate::store::Reader;
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId};
use forebay_proto::journal::{
    Abandon, AbandonBlock, AddBlocks, AddMount, Complete, Create, Delete, FinishPending, HardLink, MakeNode, Mkdir, Rename, Seen, SetAttributes,
    SetQuota, SyncChildren, UpdateMount,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const LIMITS: Limits = Limits { replies_per_client: 64, clients_max: 8 };

/// A store with its applied record, fed one command per entry or several.
struct Machine {
    store: Store,
    applied: AppliedRecord,
    sequence: u64,
    /// Keys of files in the under store.
    stored: BTreeSet<String>,
    _dir: tempfile::TempDir,
}

/// Every path, with the names of the file it is one of, and its length; `None`: a folder.
type Paths = BTreeMap<String, Option<(BTreeSet<String>, u64)>>;

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 8 << 20).unwrap();
        let mut machine = Machine { store, applied: AppliedRecord::default(), sequence: 0, stored: BTreeSet::new(), _dir: dir };
        let root = AddMount { path: b"/".to_vec().into(), uri: "file:///x".into(), ..Default::default() };
        assert_eq!(machine.one(Op::AddMount(root)).error_kind, 0);
        machine
    }

    fn command(&mut self, op: Op) -> Command {
        self.sequence += 1;
        Command {
            principal: "root".into(),
            superuser: true,
            now_ms: self.sequence,
            client_id: 9,
            sequence: self.sequence,
            op: Some(op),
            ..Default::default()
        }
    }

    fn entry(&mut self, commands: &[Command]) -> Vec<Reply> {
        self.applied.index += 1;
        apply_entry(&self.store, commands, &mut self.applied, &LIMITS).unwrap()
    }

    fn one(&mut self, op: Op) -> Reply {
        let command = self.command(op);
        self.entry(&[command]).remove(0)
    }

    /// The under store follows, as the driver has it follow.
    fn follow(&mut self) {
        let all = self.store.view().pending().unwrap();
        for pending in all {
            let text = |raw: &[u8]| String::from_utf8(raw.to_vec()).unwrap();
            let (source, target) = (text(&pending.source_key), text(&pending.target_key));
            let of = |key: &String| *key == source || (pending.folder && key.starts_with(&format!("{source}/")));
            let (moved, stay) = std::mem::take(&mut self.stored).into_iter().partition(of);
            self.stored = stay;
            if pending.kind == "rename" {
                self.stored.extend(moved.iter().map(|key: &String| format!("{target}{}", &key[source.len()..])));
            }
            let finish = FinishPending { pending_id: pending.id, ..Default::default() };
            assert_eq!(self.one(Op::FinishPending(finish)).error_kind, 0);
        }
    }

    /// The under store has each file once, at the name of its record.
    fn assert_stored(&self) {
        let view = self.store.view();
        let ids: Vec<InodeId> = view.indexed(Cf::Link, 0, usize::MAX).unwrap();
        let files = ids.into_iter().filter(|id| !view.inode(*id).unwrap().unwrap().1.folder);
        let keys: BTreeSet<String> = files.map(|id| view.path_of(id).unwrap().to_string()[1..].to_owned()).collect();
        assert_eq!(self.stored, keys);
    }

    /// Every path with what the store says of it.
    fn paths(&self) -> Paths {
        let view = self.store.view();
        let mut out = BTreeMap::new();
        let mut folders = vec![(InodeId::ROOT, String::new())];
        let mut quotas = Vec::new();
        let mut note = |path: &str, inode: &Inode| {
            if inode.quota_names > 0 || inode.quota_bytes > 0 {
                quotas.push((path.to_owned(), inode.used_names, inode.used_bytes));
            }
        };
        note("", &view.root().unwrap());
        while let Some((id, path)) = folders.pop() {
            for (name, inode) in view.children(id, None, usize::MAX).unwrap() {
                let path = format!("{path}/{}", String::from_utf8_lossy(&name));
                if inode.folder {
                    note(&path, &inode);
                    folders.push((InodeId(inode.id), path.clone()));
                }
                for block in crate::namespace::block_ids(&inode) {
                    assert_eq!(view.block_owner(block).unwrap(), Some(InodeId(inode.id)), "block {block} is known as its file's");
                }
                out.insert(path, inode);
            }
        }
        let mut names: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for (path, inode) in &out {
            names.entry(inode.id).or_default().insert(path.clone());
        }
        for (path, inode) in &out {
            let record = view.path_of(InodeId(inode.id)).unwrap().to_string();
            assert!(names[&inode.id].contains(&record), "links lead back");
            assert_eq!(inode.other_names.len() + 1, names[&inode.id].len(), "{path} has the names that its record lists");
        }
        let recorded = |path: &str, inode: &Inode| view.path_of(InodeId(inode.id)).unwrap().to_string() == path;
        let files = || out.iter().filter(|(path, inode)| !inode.folder && recorded(path, inode));
        let counters = view.counters().unwrap();
        assert_eq!(counters.files, files().count() as u64);
        assert_eq!(counters.folders, out.values().filter(|inode| inode.folder).count() as u64 + 1);
        assert_eq!(counters.quota_folders, quotas.len() as u64);
        for (folder, used_names, bytes) in quotas {
            let below = |path: &str| path.starts_with(&format!("{folder}/"));
            let count = out.keys().filter(|path| below(path)).count() as u64 + 1;
            let sum = files().filter(|(path, _)| below(path)).map(|(_, inode)| inode.length).sum::<u64>();
            assert_eq!((used_names, bytes), (count, sum), "what is counted of {folder:?} is what is below it");
        }
        out.into_iter().map(|(path, inode)| (path, (!inode.folder).then(|| (names[&inode.id].clone(), inode.length)))).collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mkdir(String, bool),
    Write(String, u64, bool),
    /// Another content for what is there, to its end or given up half-way.
    Replace(String, u64, bool),
    Delete(String, bool),
    Rename(String, String, bool),
    Link(String, String),
    /// One that nothing reaches, or none any more.
    Quota(String, bool),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4).prop_map(|names| names.iter().map(|n| format!("/{n}")).collect())
}

fn short() -> impl Strategy<Value = String> {
    prop_oneof![Just("/a"), Just("/b"), Just("/c"), Just("/a/a"), Just("/b/a")].prop_map(str::to_owned)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (path(), any::<bool>()).prop_map(|(p, r)| Step::Mkdir(p, r)),
        (path(), 0u64..400_000, any::<bool>()).prop_map(|(p, l, o)| Step::Write(p, l, o)),
        (path(), 0u64..400_000, any::<bool>()).prop_map(|(p, l, whole)| Step::Replace(p, l, whole)),
        (path(), any::<bool>()).prop_map(|(p, r)| Step::Delete(p, r)),
        (path(), path(), any::<bool>()).prop_map(|(a, b, o)| Step::Rename(a, b, o)),
        (path(), path()).prop_map(|(a, b)| Step::Link(a, b)),
        // Among few paths, so that names of one file meet.
        (short(), 0u64..400_000, any::<bool>()).prop_map(|(p, l, o)| Step::Write(p, l, o)),
        (short(), short()).prop_map(|(a, b)| Step::Link(a, b)),
        (short(), short()).prop_map(|(a, b)| Step::Rename(a, b, true)),
        short().prop_map(|p| Step::Delete(p, true)),
        (path(), any::<bool>()).prop_map(|(p, set)| Step::Quota(p, set)),
    ]
}

/// The reference: what a step does to a map from paths to files by number (`None`: a folder), which have lengths; or the kind of its refusal.
#[derive(Clone, Debug, Default)]
struct Model {
    paths: BTreeMap<String, Option<usize>>,
    lengths: Vec<u64>,
}

impl Model {
    fn paths(&self) -> Paths {
        let names = |file: usize| self.paths.iter().filter(|(_, of)| **of == Some(file)).map(|(path, _)| path.clone()).collect();
        self.paths.iter().map(|(path, file)| (path.clone(), file.map(|file| (names(file), self.lengths[file])))).collect()
    }

    fn new_file(&mut self, path: &str, length: u64) {
        self.lengths.push(length);
        self.paths.insert(path.to_owned(), Some(self.lengths.len() - 1));
    }
}

fn model(state: &mut Model, step: &Step) -> Result<(), ErrorKind> {
    let paths = &mut state.paths;
    let parent = |p: &str| p.rsplit_once('/').map(|(up, _)| up.to_owned()).unwrap_or_default();
    let is_folder = |paths: &BTreeMap<String, Option<usize>>, p: &str| p.is_empty() || paths.get(p) == Some(&None);
    let is_file = |paths: &BTreeMap<String, Option<usize>>, p: &str| matches!(paths.get(p), Some(Some(_)));
    let below =
        |paths: &BTreeMap<String, Option<usize>>, p: &str| paths.keys().filter(|k| k.starts_with(&format!("{p}/"))).cloned().collect::<Vec<_>>();
    let through_file = |paths: &BTreeMap<String, Option<usize>>, p: &str| {
        let mut up = parent(p);
        while !up.is_empty() {
            if is_file(paths, &up) {
                return true;
            }
            up = parent(&up);
        }
        false
    };
    match step {
        Step::Mkdir(p, recursive) => {
            if through_file(paths, p) {
                return Err(ErrorKind::NotADirectory);
            }
            if paths.contains_key(p) {
                return Err(ErrorKind::AlreadyExists);
            }
            if !is_folder(paths, &parent(p)) && !recursive {
                return Err(ErrorKind::NotFound);
            }
            let mut up = p.clone();
            while !up.is_empty() {
                paths.insert(up.clone(), None);
                up = parent(&up);
            }
        }
        Step::Write(p, length, overwrite) => {
            if through_file(paths, p) {
                return Err(ErrorKind::NotADirectory);
            }
            if is_folder(paths, p) {
                return Err(ErrorKind::IsADirectory);
            }
            if is_file(paths, p) && !overwrite {
                return Err(ErrorKind::AlreadyExists);
            }
            if !is_folder(paths, &parent(p)) {
                return Err(ErrorKind::NotFound);
            }
            // Under all of its names, where it has several.
            match paths.get(p).copied().flatten() {
                Some(file) if paths.values().filter(|of| **of == Some(file)).count() > 1 => state.lengths[file] = *length,
                _ => state.new_file(p, *length),
            }
        }
        Step::Replace(p, length, whole) => {
            let before = paths.get(p).copied().flatten();
            model(&mut state.clone(), &Step::Write(p.clone(), *length, true))?;
            match before {
                _ if !*whole => {}
                Some(file) => state.lengths[file] = *length,
                None => state.new_file(p, *length),
            }
        }
        Step::Link(from, to) => {
            if through_file(paths, from) || through_file(paths, to) {
                return Err(ErrorKind::NotADirectory);
            }
            let Some(file) = paths.get(from).copied() else { return Err(ErrorKind::NotFound) };
            let Some(file) = file else { return Err(ErrorKind::PermissionDenied) };
            if paths.contains_key(to) {
                return Err(ErrorKind::AlreadyExists);
            }
            if !is_folder(paths, &parent(to)) {
                return Err(ErrorKind::NotFound);
            }
            paths.insert(to.clone(), Some(file));
        }
        Step::Delete(p, recursive) => {
            if through_file(paths, p) {
                return Err(ErrorKind::NotADirectory);
            }
            if !paths.contains_key(p) {
                return Err(ErrorKind::NotFound);
            }
            let children = below(paths, p);
            if !children.is_empty() && !recursive {
                return Err(ErrorKind::NotEmpty);
            }
            paths.retain(|k, _| k != p && !children.contains(k));
        }
        Step::Quota(p, _) => {
            if through_file(paths, p) || is_file(paths, p) {
                return Err(ErrorKind::NotADirectory);
            }
            if !paths.contains_key(p) {
                return Err(ErrorKind::NotFound);
            }
        }
        Step::Rename(from, to, overwrite) => {
            if through_file(paths, from) || through_file(paths, to) {
                return Err(ErrorKind::NotADirectory);
            }
            if !paths.contains_key(from) {
                return Err(ErrorKind::NotFound);
            }
            if from == to {
                return Ok(());
            }
            if to.starts_with(&format!("{from}/")) {
                return Err(ErrorKind::InvalidArgument);
            }
            if !is_folder(paths, &parent(to)) {
                return Err(ErrorKind::NotFound);
            }
            if paths.contains_key(to) {
                match (is_folder(paths, from), is_folder(paths, to)) {
                    _ if !overwrite => return Err(ErrorKind::AlreadyExists),
                    (false, false) if paths[from] == paths[to] => return Ok(()),
                    (true, false) => return Err(ErrorKind::NotADirectory),
                    (false, true) => return Err(ErrorKind::IsADirectory),
                    _ if !below(paths, to).is_empty() => return Err(ErrorKind::NotEmpty),
                    _ => {}
                }
            }
            let moved: Vec<(String, Option<usize>)> = below(paths, from).into_iter().chain([from.clone()]).map(|k| (k.clone(), paths[&k])).collect();
            paths.retain(|k, _| !moved.iter().any(|(m, _)| m == k));
            for (k, v) in moved {
                paths.insert(format!("{to}{}", &k[from.len()..]), v);
            }
        }
    }
    Ok(())
}

fn bytes(p: &str) -> bytes::Bytes {
    p.as_bytes().to_vec().into()
}

/// Runs a step as the commands it takes; the under store follows at once.
fn run(machine: &mut Machine, step: &Step) -> Result<(), ErrorKind> {
    let reply = match step {
        Step::Mkdir(p, recursive) => {
            machine.one(Op::Mkdir(Mkdir { path: bytes(p), recursive: *recursive, exist_ok: false, mode: 0o755, ..Mkdir::default() }))
        }
        Step::Delete(p, recursive) => machine.one(Op::Delete(Delete { path: bytes(p), recursive: *recursive })),
        Step::Quota(p, set) => {
            let quota = |most: u64| Some(if *set { most } else { 0 });
            machine.one(Op::SetQuota(SetQuota { path: bytes(p), names: quota(1 << 30), bytes: quota(1 << 50) }))
        }
        Step::Link(a, b) => machine.one(Op::HardLink(HardLink { source: bytes(a), target: bytes(b) })),
        Step::Rename(a, b, overwrite) => machine.one(Op::Rename(Rename { source: bytes(a), target: bytes(b), overwrite: *overwrite })),
        Step::Write(..) | Step::Replace(..) => {
            let (p, length, overwrite, replace, whole) = match step {
                Step::Replace(p, length, whole) => (p, length, &true, true, *whole),
                Step::Write(p, length, overwrite) => (p, length, overwrite, false, true),
                _ => unreachable!(),
            };
            let create = Create {
                path: bytes(p),
                overwrite: *overwrite,
                replace,
                block_size_bytes: 65_536,
                page_size_bytes: 65_536,
                cached: true,
                to_ufs: true,
                lease_ttl_ms: 10,
                block_count: 1,
                ..Default::default()
            };
            let created = machine.one(Op::Create(create));
            if created.error_kind != 0 {
                return Err(ErrorKind::from_code(created.error_kind));
            }
            let mut ids = created.block_ids.clone();
            let needed = length.div_ceil(65_536) as usize;
            while ids.len() < needed {
                let more =
                    machine.one(Op::AddBlocks(AddBlocks { file_id: created.file_id, lease_id: created.lease_id, count: 3, ..AddBlocks::default() }));
                ids.extend(more.block_ids);
            }
            if !whole {
                let abandon = Abandon { file_id: created.file_id, lease_id: created.lease_id, expired_only: false };
                assert_eq!(machine.one(Op::Abandon(abandon)).error_kind, 0);
                return Ok(());
            }
            ids.truncate(needed);
            let lengths = (0..needed as u64).map(|i| (length - i * 65_536).min(65_536)).collect();
            let stored_at = machine.store.view().path_of(InodeId(created.file_id)).unwrap().to_string();
            machine.stored.insert(stored_at[1..].to_owned());
            machine.one(Op::Complete(Complete {
                file_id: created.file_id,
                lease_id: created.lease_id,
                length: *length,
                block_ids: ids,
                block_lengths: lengths,
                fingerprint: "f".into(),
                expired_only: false,
                ..Default::default()
            }))
        }
    };
    if reply.error_kind != 0 {
        return Err(ErrorKind::from_code(reply.error_kind));
    }
    machine.follow();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn follows_the_reference_model(steps in proptest::collection::vec(step(), 1..80)) {
        let mut machine = Machine::new();
        let mut state = Model::default();
        // Of everything, from before there is anything.
        machine.one(Op::SetQuota(SetQuota { path: bytes("/"), names: Some(1 << 30), bytes: Some(1 << 50) }));
        for step in &steps {
            let mut after = state.clone();
            let expected = model(&mut after, step);
            if expected.is_ok() {
                state = after;
            }
            prop_assert_eq!(run(&mut machine, step), expected, "{:?}", step);
        }
        prop_assert_eq!(machine.paths(), state.paths());
        machine.assert_stored();
        prop_assert!(machine.store.view().leases().unwrap().is_empty() && machine.store.view().pending().unwrap().is_empty());
    }

    /// The same commands give the same state and replies, whether they come one per entry or many.
    #[test]
    fn is_pure(steps in proptest::collection::vec(step(), 1..40), cuts in proptest::collection::vec(1usize..5, 40)) {
        let (mut one, mut many) = (Machine::new(), Machine::new());
        let commands: Vec<Command> = steps.iter().filter_map(|s| match s {
            Step::Mkdir(p, r) => Some(Op::Mkdir(Mkdir { path: bytes(p), recursive: *r, exist_ok: true, mode: 0o755, ..Mkdir::default() })),
            Step::Delete(p, r) => Some(Op::Delete(Delete { path: bytes(p), recursive: *r })),
            Step::Rename(a, b, o) => Some(Op::Rename(Rename { source: bytes(a), target: bytes(b), overwrite: *o })),
            Step::Link(a, b) => Some(Op::HardLink(HardLink { source: bytes(a), target: bytes(b) })),
            Step::Quota(p, set) => Some(Op::SetQuota(SetQuota { path: bytes(p), names: Some(u64::from(*set) << 30), bytes: None })),
            Step::Write(..) | Step::Replace(..) => None,
        }).map(|op| one.command(op)).collect();
        let replies: Vec<Reply> = commands.iter().flat_map(|c| one.entry(std::slice::from_ref(c))).collect();
        let mut others = Vec::new();
        let mut rest = &commands[..];
        for cut in cuts {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            others.extend(many.entry(now));
            rest = later;
        }
        prop_assert_eq!(replies, others);
        prop_assert_eq!(one.paths(), many.paths());
    }
}

#[test]
fn a_call_sent_twice_is_done_once_and_an_old_one_never() {
    let mut machine = Machine::new();
    let create = |n: u64| Command {
        principal: "root".into(),
        superuser: true,
        client_id: 77,
        sequence: n,
        op: Some(Op::Create(Create {
            path: bytes(&format!("/f{n}")),
            block_size_bytes: 65_536,
            page_size_bytes: 65_536,
            cached: true,
            block_count: 1,
            lease_ttl_ms: 10,
            ..Default::default()
        })),
        ..Default::default()
    };
    let first = machine.entry(&[create(1)]).remove(0);
    assert_eq!(machine.entry(&[create(1), create(1)]), [first.clone(), first.clone()]);
    for n in 2..=130 {
        assert_eq!(machine.entry(&[create(n)])[0].error_kind, 0);
    }
    let old = machine.entry(&[create(1)]).remove(0);
    assert_eq!(old.error_kind, ErrorKind::Expired.code(), "below the window");
    // A client that nobody remembers may only begin at the beginning.
    let unknown = Command { client_id: 78, ..create(100) };
    assert_eq!(machine.entry(&[unknown])[0].error_kind, ErrorKind::Expired.code());
    // Many clients: the oldest are forgotten, the number stays bounded.
    for client_id in 1000..1050 {
        machine.entry(&[Command { client_id, ..create(1) }]);
    }
    let view = machine.store.view();
    assert!(view.counters().unwrap().reply_clients <= LIMITS.clients_max);
    assert!(view.scan(Cf::Client, b"", None, 1000).unwrap().len() as u64 <= LIMITS.clients_max);
}

#[test]
fn sync_respects_what_changed_since_it_looked() {
    let mut machine = Machine::new();
    let base = machine.applied.changes;
    let seen = |name: &str, fingerprint: &str| Seen { name: bytes(name), length: 100, fingerprint: fingerprint.into(), ..Default::default() };
    let sync = |seen: Vec<Seen>, gone: Vec<&str>, base_index| {
        Op::SyncChildren(SyncChildren {
            parent_id: 1,
            seen,
            gone: gone.into_iter().map(bytes).collect(),
            all_seen: true,
            base_index,
            block_size_bytes: 65_536,
            page_size_bytes: 65_536,
        })
    };
    assert_eq!(machine.one(sync(vec![seen("f", "1")], vec![], base)).skipped, 0);
    let first = crate::namespace::block_ids(&machine.store.view().child(InodeId::ROOT, b"f").unwrap().unwrap()).next();
    // A new version has new block ids; the old ones are freed.
    let reply = machine.one(sync(vec![seen("f", "2")], vec![], machine.applied.changes));
    assert_eq!(reply.freed_first, [first.unwrap().get()]);
    let inode = machine.store.view().child(InodeId::ROOT, b"f").unwrap().unwrap();
    assert_ne!(crate::namespace::block_ids(&inode).next(), first);
    assert_eq!((inode.content_version, machine.store.view().block_owner(BlockId(first.unwrap().get())).unwrap()), (2, None));
    // A listing from before must neither change nor remove it.
    assert_eq!(machine.one(sync(vec![seen("f", "1")], vec![], base)).skipped, 1);
    assert_eq!(machine.one(sync(vec![], vec!["f"], base)).skipped, 1);
    // Deleted here, and still there below: it does not come back, neither meanwhile nor by an old listing.
    let listed = machine.applied.changes;
    let pending = machine.one(Op::Delete(Delete { path: bytes("/f"), recursive: false })).pending_id;
    assert!(pending > 0);
    assert_eq!(machine.one(sync(vec![seen("f", "2")], vec![], machine.applied.changes)).skipped, 1);
    machine.one(Op::FinishPending(FinishPending { pending_id: pending, ..Default::default() }));
    assert_eq!(machine.one(sync(vec![seen("f", "2")], vec![], listed)).skipped, 1);
    assert!(machine.paths().is_empty());
    // Renamed here, and not yet there: what the store says of the target counts for nothing.
    machine.one(sync(vec![seen("g", "1")], vec![], machine.applied.changes));
    let pending = machine.one(Op::Rename(Rename { source: bytes("/g"), target: bytes("/h"), overwrite: false })).pending_id;
    assert_eq!(machine.one(sync(vec![seen("g", "1")], vec!["h"], machine.applied.changes)).skipped, 2);
    machine.one(Op::FinishPending(FinishPending { pending_id: pending, ..Default::default() }));
    assert_eq!(machine.paths().into_keys().collect::<Vec<_>>(), ["/h"]);
    machine.one(sync(vec![], vec!["h"], machine.applied.changes));
    assert!(machine.paths().is_empty());
}

/// A command of some client, as it would come over the wire.
fn call(client_id: u64, sequence: u64, principal: &str, op: Op) -> Command {
    Command { principal: principal.into(), superuser: principal == "root", client_id, sequence, op: Some(op), ..Default::default() }
}

fn create_op(path: &str, to_ufs: bool) -> Create {
    Create {
        path: bytes(path),
        overwrite: true,
        recursive: true,
        block_size_bytes: 65_536,
        page_size_bytes: 65_536,
        cached: true,
        to_ufs,
        block_count: 1,
        lease_ttl_ms: 10,
        ..Default::default()
    }
}

impl Machine {
    /// A finished file of one block.
    fn file(&mut self, path: &str, to_ufs: bool) -> u64 {
        let created = self.one(Op::Create(create_op(path, to_ufs)));
        assert_eq!(created.error_kind, 0, "{}", created.error_message);
        let complete = Complete {
            file_id: created.file_id,
            lease_id: created.lease_id,
            length: 5,
            block_ids: created.block_ids,
            block_lengths: vec![5],
            fingerprint: if to_ufs { "f".into() } else { String::new() },
            expired_only: false,
            ..Default::default()
        };
        assert_eq!(self.one(Op::Complete(complete)).error_kind, 0);
        created.file_id
    }

    fn look(&self, path: &str) -> forebay_proto::store::Inode {
        let path = AbsPath::parse(path.as_bytes()).unwrap();
        crate::namespace::walk(&self.store.view(), &path).unwrap().found(&path).unwrap().inode.clone()
    }
}

/// A file that a Hadoop client writes: it may be moved, replaced and deleted meanwhile; its blocks are given up from the last one; its recovery leaves a
/// lease alone that was renewed.
#[test]
fn files_of_hadoop_clients() {
    let mut machine = Machine::new();
    let create = |path: &str| Op::Create(Create { holder: "c".into(), block_count: 0, ..create_op(path, false) });
    let made = machine.one(create("/f"));
    let add =
        |made: &Reply| Op::AddBlocks(AddBlocks { file_id: made.file_id, lease_id: made.lease_id, count: 1, worker_id: 7, ..AddBlocks::default() });
    let (first, second) = (machine.one(add(&made)).block_ids[0], machine.one(add(&made)).block_ids[0]);
    assert_eq!(machine.store.view().lease(made.lease_id).unwrap().unwrap().worker_id, 7);
    let abandon = |block_id| Op::AbandonBlock(AbandonBlock { file_id: made.file_id, lease_id: made.lease_id, block_id });
    assert_eq!(machine.one(abandon(first)).error_kind, ErrorKind::InvalidArgument.code(), "not the last one");
    let freed = machine.one(abandon(second));
    assert_eq!((freed.error_kind, freed.freed_first, freed.freed_count), (0, vec![second], vec![1]));
    assert_eq!(machine.one(abandon(second)).error_kind, 0, "asked for again");
    let third = machine.one(add(&made)).block_ids[0];
    assert!(third > second);
    machine.paths();
    let moved = machine.one(Op::Rename(Rename { source: bytes("/f"), target: bytes("/g"), overwrite: false }));
    assert_eq!(moved.error_kind, 0, "{}", moved.error_message);
    let complete = |expired_only| {
        Op::Complete(Complete {
            file_id: made.file_id,
            lease_id: made.lease_id,
            length: 65_536 + 5,
            block_ids: vec![first, third],
            block_lengths: vec![65_536, 5],
            fingerprint: String::new(),
            expired_only,
            ..Default::default()
        })
    };
    assert_eq!(machine.one(complete(true)).error_kind, ErrorKind::Busy.code(), "renewed by the last block");
    assert_eq!(machine.one(complete(false)).error_kind, 0);
    assert_eq!(machine.look("/g").length, 65_541);
    let open = machine.one(create("/g"));
    assert_eq!(open.error_kind, 0, "{}", open.error_message);
    let again = machine.one(create("/g"));
    assert_eq!(again.error_kind, 0, "replaced while it is written: {}", again.error_message);
    let expired = ErrorKind::Expired.code();
    assert_eq!(
        machine.one(Op::AddBlocks(AddBlocks { file_id: open.file_id, lease_id: open.lease_id, count: 1, ..AddBlocks::default() })).error_kind,
        expired
    );
    assert_eq!(machine.one(Op::Delete(Delete { path: bytes("/g"), recursive: false })).error_kind, 0);
    assert!(machine.paths().is_empty() && machine.store.view().leases().unwrap().is_empty());
}

/// (S-4) Somebody else's numbers, and numbers used for another kind of call, are refused; nothing of the answer is told.
#[test]
fn an_answer_is_given_to_its_caller_only() {
    let mut machine = Machine::new();
    let mine = machine.entry(&[call(5, 1, "root", Op::Create(create_op("/f", false)))]).remove(0);
    assert!(mine.lease_id > 0);
    let theirs = machine.entry(&[call(5, 1, "mallory", Op::Create(create_op("/f", false)))]).remove(0);
    let other = machine.entry(&[call(5, 1, "root", Op::Delete(Delete { path: bytes("/f"), recursive: false }))]).remove(0);
    for refused in [theirs, other] {
        assert_eq!((refused.error_kind, refused.lease_id, refused.file_id), (ErrorKind::InvalidArgument.code(), 0, 0));
    }
    assert_eq!(machine.entry(&[call(5, 1, "root", Op::Create(create_op("/f", false)))]).remove(0).lease_id, mine.lease_id);
    assert!(!machine.look("/f").completed, "nothing was deleted");
}

/// A refusal that may pass is not remembered: the same call is answered afresh.
#[test]
fn what_may_be_tried_again_is_not_remembered() {
    let mut machine = Machine::new();
    machine.file("/f", true);
    let pending_id = machine.one(Op::Delete(Delete { path: bytes("/f"), recursive: false })).pending_id;
    let again = call(5, 1, "root", Op::Create(create_op("/f", true)));
    assert_eq!(machine.entry(std::slice::from_ref(&again))[0].error_kind, ErrorKind::Busy.code());
    machine.one(Op::FinishPending(FinishPending { pending_id, ..Default::default() }));
    assert_eq!(machine.entry(&[again])[0].error_kind, 0);
}

/// (S-5) What the store refused in the end is the answer from then on, also to a caller that had given up waiting.
#[test]
fn a_late_refusal_becomes_the_answer() {
    let mut machine = Machine::new();
    machine.file("/f", true);
    let delete = call(5, 1, "root", Op::Delete(Delete { path: bytes("/f"), recursive: false }));
    let pending_id = machine.entry(std::slice::from_ref(&delete))[0].pending_id;
    let finish = FinishPending { pending_id, error: "read-only there".into(), error_kind: ErrorKind::ReadOnly.code(), ..Default::default() };
    machine.one(Op::FinishPending(finish));
    let again = machine.entry(&[delete]).remove(0);
    assert_eq!((again.error_kind, again.error_message.as_str()), (ErrorKind::ReadOnly.code(), "read-only there"));
}

/// (S-5) A file of the cache alone that took the name of a stored one hides it; deleted or moved away, the stored one goes too.
#[test]
fn what_a_cached_file_hides_goes_with_it() {
    for away in [
        Op::Delete(Delete { path: bytes("/f"), recursive: false }),
        Op::Rename(Rename { source: bytes("/f"), target: bytes("/g"), overwrite: false }),
    ] {
        let mut machine = Machine::new();
        machine.file("/f", true);
        machine.file("/f", false);
        assert!(machine.look("/f").shadows && !machine.look("/f").persisted);
        let reply = machine.one(away);
        let pending = machine.store.view().pending().unwrap();
        assert_eq!((reply.pending_id > 0, pending[0].kind.as_str()), (true, "delete"));
        let old = Seen { name: bytes("f"), length: 5, fingerprint: "f".into(), ..Default::default() };
        let base_index = machine.applied.changes;
        let sync =
            SyncChildren { parent_id: 1, seen: vec![old], base_index, block_size_bytes: 65_536, page_size_bytes: 65_536, ..Default::default() };
        assert_eq!(machine.one(Op::SyncChildren(sync)).skipped, 1, "it does not come back");
    }
}

/// (S-5) A folder of the cache alone is the store's too once something below it was written through.
#[test]
fn a_folder_is_stored_with_what_it_holds() {
    let mut machine = Machine::new();
    machine.file("/a/b/cached", false);
    assert!(!machine.look("/a").persisted && !machine.look("/a/b").persisted);
    machine.file("/a/b/stored", true);
    assert!(machine.look("/a").persisted && machine.look("/a/b").persisted);
    assert!(machine.one(Op::Rename(Rename { source: bytes("/a"), target: bytes("/c"), overwrite: false })).pending_id > 0);
}

/// A look at a folder that was moved since it began says nothing, however deep the folder is below the one that moved.
#[test]
fn a_look_at_another_place_counts_for_nothing() {
    let mut machine = Machine::new();
    machine.file("/a/b/f", true);
    let (folder, base_index) = (machine.look("/a/b").id, machine.applied.changes);
    let pending_id = machine.one(Op::Rename(Rename { source: bytes("/a"), target: bytes("/c"), overwrite: false })).pending_id;
    machine.one(Op::FinishPending(FinishPending { pending_id, ..Default::default() }));
    let sync = SyncChildren {
        parent_id: folder,
        gone: vec![bytes("f")],
        base_index,
        block_size_bytes: 65_536,
        page_size_bytes: 65_536,
        ..Default::default()
    };
    assert_eq!(machine.one(Op::SyncChildren(sync.clone())).skipped, 1);
    assert_eq!(machine.look("/c/b/f").length, 5);
    let now = SyncChildren { base_index: machine.applied.changes, ..sync };
    assert_eq!(machine.one(Op::SyncChildren(now)).skipped, 0);
    assert_eq!(machine.paths().keys().collect::<Vec<_>>(), ["/c", "/c/b"]);
}

/// Numbers of a lying client add up to anything: they are refused, and cost nothing.
#[test]
fn impossible_numbers_are_refused() {
    let mut machine = Machine::new();
    let created = machine.one(Op::Create(create_op("/f", false)));
    let complete = |length, block_lengths| {
        let block_ids = created.block_ids.clone();
        Op::Complete(Complete { file_id: created.file_id, lease_id: created.lease_id, length, block_ids, block_lengths, ..Default::default() })
    };
    for (length, lengths) in [(u64::MAX, vec![u64::MAX]), (1 << 60, vec![1 << 60]), (0, vec![u64::MAX, 1]), (7, vec![6]), (7, vec![7, 0])] {
        let reply = machine.one(complete(length, lengths));
        assert!(
            [ErrorKind::InvalidArgument.code(), ErrorKind::LimitExceeded.code()].contains(&reply.error_kind),
            "{length}: {}",
            reply.error_message
        );
    }
    assert_eq!(machine.entry(&[call(6, 1, "root", Op::Mkdir(Mkdir { path: bytes("/d"), mode: 0o755, ..Default::default() }))])[0].error_kind, 0);
    let mkdir = |n| call(6, n, "root", Op::Mkdir(Mkdir { path: bytes("/e"), mode: 0o755, exist_ok: true, ..Default::default() }));
    assert_eq!(machine.entry(&[mkdir(u64::MAX)])[0].error_kind, 0);
    assert_eq!(machine.entry(&[mkdir(2)])[0].error_kind, ErrorKind::Expired.code());
    assert_eq!(machine.entry(&[mkdir(u64::MAX)])[0].error_kind, 0);
}

/// Devices are a superuser's to make; links, pipes and sockets anybody's who may write the folder.
#[test]
fn devices_are_not_for_everybody() {
    let mut machine = Machine::new();
    machine.one(Op::SetAttributes(SetAttributes { path: bytes("/"), mode: Some(0o777), ..Default::default() }));
    let node = |name: &str, kind| Op::MakeNode(MakeNode { path: bytes(name), kind, mode: 0o666, target: bytes("t"), device: 1 });
    for (sequence, (name, kind, allowed)) in
        [("/c", 0o2, false), ("/b", 0o6, false), ("/l", 0o12, true), ("/p", 0o1, true), ("/x", 0o10, false)].into_iter().enumerate()
    {
        let reply = machine.entry(&[call(5, sequence as u64 + 1, "mallory", node(name, kind))]).remove(0);
        assert_eq!(reply.error_kind == 0, allowed, "{name}: {}", reply.error_message);
    }
    assert_eq!(machine.one(node("/c", 0o2)).error_kind, 0);
    assert_eq!((machine.look("/c").device, machine.look("/l").target.as_ref()), (1, &b"t"[..]));
}

/// (S-32) A file that is given other bytes is what it was until they are complete, is nobody else's to change meanwhile, and stays itself.
#[test]
fn a_file_is_replaced_as_a_whole() {
    let mut machine = Machine::new();
    let id = machine.file("/f", true);
    let old = machine.look("/f");
    let replace = Op::Create(Create { replace: true, block_count: 1, ..create_op("/f", false) });
    for whole in [false, true] {
        let made = machine.one(replace.clone());
        assert_eq!((made.error_kind, made.file_id), (0, id), "{}", made.error_message);
        let now = machine.look("/f");
        assert!(now.completed && now.persisted && now.block_runs == old.block_runs && now.length == old.length);
        let busy = [
            replace.clone(),
            Op::Create(create_op("/f", true)),
            Op::Delete(Delete { path: bytes("/f"), recursive: false }),
            Op::Rename(Rename { source: bytes("/f"), target: bytes("/g"), overwrite: false }),
        ];
        for op in busy {
            assert_eq!(machine.one(op).error_kind, ErrorKind::Busy.code());
        }
        // Its attributes are anybody's to change, and stay.
        let chmod = SetAttributes { path: bytes("/f"), mode: Some(if whole { 0o640 } else { 0o600 }), ..Default::default() };
        assert_eq!(machine.one(Op::SetAttributes(chmod)).error_kind, 0);
        if !whole {
            machine.one(Op::Abandon(Abandon { file_id: id, lease_id: made.lease_id, expired_only: false }));
            assert_eq!(machine.look("/f").block_runs, old.block_runs);
            continue;
        }
        let complete = Complete {
            file_id: id,
            lease_id: made.lease_id,
            length: 9,
            block_ids: made.block_ids.clone(),
            block_lengths: vec![9],
            fingerprint: "new".into(),
            expired_only: false,
            ..Default::default()
        };
        let done = machine.one(Op::Complete(complete));
        assert_eq!((done.error_kind, done.freed_first.first()), (0, old.block_runs.first()), "{}", done.error_message);
        let new = machine.look("/f");
        assert_eq!((new.id, new.mode, new.length, new.content_version), (id, 0o640, 9, old.content_version + 1));
        assert!(new.lease_id == 0 && new.block_runs == [made.block_ids[0], 1]);
    }
    assert!(machine.store.view().leases().unwrap().is_empty());
    machine.paths();
}

/// A mount takes other options and stays what it is.
#[test]
fn a_mount_is_updated_in_place() {
    let mut machine = Machine::new();
    let file = machine.file("/f", true);
    let update = |options: &[(&str, &str)]| {
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Op::UpdateMount(UpdateMount { path: bytes("/"), read_only: true, options })
    };
    assert_eq!(machine.one(update(&[("page_size", "64KiB")])).error_kind, 0);
    let mounts = machine.store.view().mounts().unwrap();
    assert!(mounts.len() == 1 && mounts[0].read_only && mounts[0].uri == "file:///x" && mounts[0].options["page_size"] == "64KiB");
    assert_eq!(machine.look("/f").id, file);
    assert_eq!(machine.one(Op::Mkdir(Mkdir { path: bytes("/d"), ..Default::default() })).error_kind, ErrorKind::ReadOnly.code());
    let theirs = machine.entry(&[call(5, 1, "mallory", update(&[]))]).remove(0);
    assert_eq!(theirs.error_kind, ErrorKind::PermissionDenied.code());
}

#[test]
fn what_stays_refused_is_not_tried_again() {
    let mut machine = Machine::new();
    machine.one(Op::Mkdir(Mkdir { path: bytes("/q"), mode: 0o755, ..Mkdir::default() }));
    machine.one(Op::SetQuota(SetQuota { path: bytes("/q"), names: Some(2), bytes: None }));
    let mkdir = |name: &str| Op::Mkdir(Mkdir { path: bytes(name), mode: 0o755, ..Mkdir::default() });
    assert!(refusal(&machine.one(mkdir("/q/a"))).is_none());
    let refused = machine.one(mkdir("/q/b"));
    let e = refusal(&refused).unwrap();
    assert_eq!((e.kind(), e.is_retryable(), ErrorKind::NoSpace.is_retryable()), (ErrorKind::NoSpace, false, true));
}

#[test]
fn a_file_that_is_given_up_takes_all_its_names_with_it() {
    let mut machine = Machine::new();
    let create =
        Create { path: bytes("/f"), block_size_bytes: 65_536, page_size_bytes: 65_536, cached: true, lease_ttl_ms: 10, ..Default::default() };
    let made = machine.one(Op::Create(create));
    assert_eq!(machine.one(Op::HardLink(HardLink { source: bytes("/f"), target: bytes("/g") })).error_kind, 0);
    let abandon = Abandon { file_id: made.file_id, lease_id: made.lease_id, expired_only: false };
    assert_eq!(machine.one(Op::Abandon(abandon)).error_kind, 0);
    assert_eq!(machine.paths(), Paths::new());
}
