//! `bench metadata`: many clients, each with a connection of its own, on one thread.

use crate::figure::{Figure, Report, Times};
use crate::raw::RawClient;
use crate::{MetadataOptions, references};
use forebay_client::FileSystem;
use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, err};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Runs `operation(client, i)` for every `i`, spread over the clients, and times each.
async fn spread<C, F, R>(clients: &[C], count: usize, operation: F) -> Result<(f64, Times)>
where
    C: Clone + Send + 'static,
    F: Fn(C, usize) -> R + Clone + Send + 'static,
    R: Future<Output = Result<()>> + Send,
{
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for (n, client) in clients.iter().enumerate() {
        let (client, operation, clients) = (client.clone(), operation.clone(), clients.len());
        tasks.spawn(async move {
            let mut times = Times::new();
            for i in (n..count).step_by(clients) {
                let started = Instant::now();
                operation(client.clone(), i).await?;
                times.add(started.elapsed());
            }
            Ok::<Times, forebay_common::Error>(times)
        });
    }
    let mut all = Times::new();
    while let Some(task) = tasks.join_next().await {
        all.merge(&task.map_err(|e| err!(Internal, "bench task: {e}"))??);
    }
    Ok((references::per_second(count, started.elapsed()), all))
}

fn figure(name: &str, (rate, times): &(f64, Times), reference: Option<f64>, reference_name: &'static str, clients: usize) -> Figure {
    Figure {
        name: format!("{name}, {clients} clients"),
        value: *rate,
        unit: "/s",
        reference,
        ratio: reference.map(|r| rate / r),
        reference_name,
        p50_us: Some(times.p50_us()),
        p99_us: Some(times.p99_us()),
        threads: clients,
        ..Figure::default()
    }
}

fn file(dir: &AbsPath, i: usize) -> Result<AbsPath> {
    dir.join(format!("f{i}").as_bytes())
}

type Created = Vec<(usize, u64, u64)>;

/// Creations alone, as many clients at once; who made which file under which lease.
async fn create_all(raw: &[RawClient], dir: &AbsPath, count: usize) -> Result<((f64, Times), Created)> {
    let created = Arc::new(Mutex::new(Vec::with_capacity(count)));
    let (at, list, n) = (dir.clone(), created.clone(), raw.len());
    let rate = spread(raw, count, move |client, i| {
        let (path, list) = (file(&at, i), list.clone());
        async move {
            let (file_id, lease_id) = client.create(&path?).await?;
            list.lock().unwrap_or_else(|e| e.into_inner()).push((i % n, file_id, lease_id));
            Ok(())
        }
    })
    .await?;
    let created = std::mem::take(&mut *created.lock().unwrap_or_else(|e| e.into_inner()));
    Ok((rate, created))
}

async fn complete_all(raw: &[RawClient], created: Created) -> Result<(f64, Times)> {
    let count = created.len();
    let created = Arc::new(created);
    let clients = raw.to_vec();
    spread(raw, count, move |_, i| {
        let (owner, file_id, lease_id) = created[i];
        let client = clients[owner].clone();
        async move { client.complete(file_id, lease_id).await }
    })
    .await
}

pub async fn run(config: &ClientConfig, options: &MetadataOptions, report: &mut Report) -> Result<()> {
    let mut clients = Vec::new();
    for _ in 0..options.clients.max(1) {
        clients.push(FileSystem::connect(config).await?);
    }
    let (n, count) = (clients.len(), options.operations);
    let fs = clients[0].clone();
    let dir = options.dir.clone();
    fs.mkdir(&dir, true, true).await?;
    for client in &clients {
        client.local_workers().await;
    }
    let sync = references::fdatasync(&std::env::temp_dir(), 500)?;
    eprintln!("  reference: fdatasync of 200 bytes here takes {:.0} µs (p50), {:.0} µs (p99)", sync.p50_us(), sync.p99_us());

    let ceiling = spread(&clients, count, |fs, _| async move { fs.ping().await.map(drop) }).await?;
    let ceiling_rate = Some(ceiling.0);
    report.add(figure("ping (a tonic call that does nothing)", &ceiling, None, "", n))?;

    let raw: Vec<RawClient> = (0..n).map(|_| RawClient::new(config)).collect::<Result<_>>()?;
    let (made, created) = create_all(&raw, &dir, count).await?;
    report.add(figure("create, journaled and fsynced", &made, ceiling_rate, "ping in this run", n))?;
    let completed = complete_all(&raw, created).await?;
    report.add(figure("complete, journaled and fsynced", &completed, ceiling_rate, "ping in this run", n))?;

    let at = dir.clone();
    let looked = spread(&clients, count, move |fs, i| {
        let path = file(&at, i);
        async move { fs.get_status(&path?).await.map(drop) }
    })
    .await?;
    report.add(figure("getStatus", &looked, ceiling_rate, "ping in this run", n))?;

    let at = dir.clone();
    let renamed = spread(&clients, count, move |fs, i| {
        let (from, to) = (file(&at, i), at.join(format!("r{i}").as_bytes()));
        async move { fs.rename(&from?, &to?, false).await }
    })
    .await?;
    report.add(figure("rename, journaled and fsynced", &renamed, ceiling_rate, "ping in this run", n))?;

    list(&fs, &raw, options, report).await?;

    let at = dir.clone();
    let deleted = spread(&clients, count, move |fs, i| {
        let path = at.join(format!("r{i}").as_bytes());
        async move { fs.delete(&path?, false).await }
    })
    .await?;
    report.add(figure("delete, journaled and fsynced", &deleted, ceiling_rate, "ping in this run", n))
}

async fn list(fs: &FileSystem, raw: &[RawClient], options: &MetadataOptions, report: &mut Report) -> Result<()> {
    let folder = options.dir.join(b"listed")?;
    fs.mkdir(&folder, true, true).await?;
    let (_, created) = create_all(raw, &folder, options.entries).await?;
    complete_all(raw, created).await?;
    let mut times = Times::new();
    for _ in 0..20 {
        let started = Instant::now();
        let entries = fs.list(&folder, false).await?.len();
        times.add(started.elapsed());
        if entries != options.entries {
            return Err(err!(Internal, "{entries} entries were listed instead of {}", options.entries));
        }
    }
    let ms = times.p50_us() / 1000.0;
    report.add(Figure {
        name: format!("list of {} entries", options.entries),
        value: ms,
        unit: "ms p50",
        p50_us: Some(times.p50_us()),
        p99_us: Some(times.p99_us()),
        threads: 1,
        ..Figure::default()
    })
}
