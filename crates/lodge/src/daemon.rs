//! The daemon: opens the store, takes machines up, opens its doors. Crash-only: nothing happens at
//! its end that a `kill -9` would miss.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::connect::{self, Door};
use lodge_doors::native::grammar::Serve;
use lodge_doors::native::wire::{self, Client};
use lodge_doors::zero_os;
use lodge_host::linux::Linux;
use lodge_host::net::holder;
use lodge_host::paths::{self, Paths};
use lodge_machine::store::StoreError;
use lodge_machine::{Keeper, Store};
use lodge_spec::machine::{BackendKind, Protocol};
use lodge_spec::request::{Reply, Request};
use tokio::net::{TcpListener, UnixListener};

use crate::answer::Answer;
use crate::otlp::Exporter;
use crate::settings::{self, Flags, Metald, Tls};

/// A daemon that yields is gone within this.
const YIELD: Duration = Duration::from_secs(5);

/// Serves until it is killed. Says `ready` on standard output when it can be asked.
pub(crate) fn serve(how: &Serve) -> Result<()> {
    // Whoever started us may have left descriptors open that we would hold for ever.
    let given = lodge_host::proc::take_inherited();
    lodge_host::proc::stay_small();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_stack_size(512 << 10)
        .max_blocking_threads(8)
        .enable_all()
        .build()?;
    runtime.block_on(run(how, given))
}

async fn run(how: &Serve, given: Vec<OwnedFd>) -> Result<()> {
    let paths = Paths::find();
    paths.make().with_context(|| format!("making {}", paths.state.display()))?;
    let (metald, zero_os) = (how.metald.clone(), how.zero_os.clone());
    let flags = Flags { metald, zero_os, insecure: how.insecure };
    let metald = match how.unattended {
        true => None,
        false => Some(settings::read(&paths, &flags)?),
    };
    // Before anybody has to yield: a port that is taken ends it here.
    let port = match (metald.as_ref().and_then(|m| m.listen), given.into_iter().next()) {
        (Some(_), Some(socket)) => Some(activated(socket)?),
        (Some(address), None) => Some(listen(address).await?),
        (None, _) => None,
    };
    let zero_os = match how.unattended {
        true => None,
        false => settings::zero_os(&paths, &flags)?,
    };
    let zero_os = match zero_os {
        Some(door) => Some((listen(door.listen).await?, door)),
        None => None,
    };
    let store = match Store::open(&paths.state) {
        Err(StoreError::Locked(_)) if !how.unattended => take_place(&paths).await?,
        store => store?,
    };
    let fresh = fresh_boot(&paths.state.join("boot-id"));
    let host = Arc::new(Linux::new(paths.clone(), store.clone()));
    let keeper = Keeper::open(store, host.clone(), fresh).await?;
    let socket = paths.socket();
    // Ours to replace: the lock on the store says that no other daemon is there.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    let answer = Arc::new(Answer::new(keeper, !how.unattended));
    if let (Some(metald), Some(port)) = (metald, port) {
        let at = port.local_addr()?;
        let tls = metald.tls.as_ref().map(|tls| acceptor("metald.tls", tls)).transpose()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let door = Door::new(answer.clone(), door_settings(metald, &host)?);
        tokio::spawn(reload(paths.clone(), flags, host.clone(), door.clone()));
        tokio::spawn(connect::serve(port, tls, door));
        let _ = writeln!(std::io::stderr(), "lodge: the Connect door is open at {scheme}://{at}");
    }
    if let Some((port, door)) = zero_os {
        let at = port.local_addr()?;
        let tls = door.tls.as_ref().map(|tls| acceptor("zero_os.tls", tls)).transpose()?;
        let how = if tls.is_some() { ", encrypted" } else { "" };
        let door = zero_os::Door::new(answer.clone(), door.settings);
        tokio::spawn(zero_os::serve(port, tls, door));
        let _ = writeln!(std::io::stderr(), "lodge: the Zero-OS door is open at {at}{how}");
    }
    let mut stdout = std::io::stdout();
    // Nobody may be reading.
    let _ = writeln!(stdout, "ready").and_then(|()| stdout.flush());
    lodge_host::proc::notify("READY=1");
    tokio::spawn(async move { host.facts().await.tsc_khz });
    wire::serve(listener, answer).await?;
    Ok(())
}

fn acceptor(name: &str, tls: &Tls) -> Result<tokio_rustls::TlsAcceptor> {
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let client_ca = tls.client_ca.as_deref().map(read).transpose()?;
    connect::tls::acceptor(&read(&tls.cert)?, &read(&tls.key)?, client_ca.as_deref())
        .map_err(|why| anyhow!("{name}: {why}"))
}

/// A socket that the service manager holds for us.
fn activated(socket: OwnedFd) -> Result<TcpListener> {
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener).context("the socket from the service manager")
}

/// Reads the settings anew at each hang-up signal. Connections stay; a mistake changes nothing.
async fn reload(paths: Paths, flags: Flags, host: Arc<Linux>, door: Arc<Door<Answer>>) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        let read = settings::read(&paths, &flags).and_then(|m| door_settings(m, &host));
        let said = match read {
            Ok(settings) => {
                door.set(settings);
                "the settings were read again".to_owned()
            }
            Err(error) => format!("the settings stay as they were: {error:#}"),
        };
        let _ = writeln!(std::io::stderr(), "lodge: {said}");
    }
}

async fn listen(address: std::net::SocketAddr) -> Result<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(listener),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => bail!(
            "{address} is already in use by {}; `lodge serve --metald IP:PORT` (or `--zero-os IP:PORT`) takes another",
            holder::of(address.port(), Protocol::Tcp)
        ),
        Err(e) => Err(e).with_context(|| address.to_string()),
    }
}

/// Ends a daemon that a command started, whose machines run on, and opens the store in its place.
async fn take_place(paths: &Paths) -> Result<Store> {
    let mut client = Client::connect(&paths.socket()).await.context("asking the other daemon")?;
    let other = match client.ask(&Request::Ping).await?? {
        Reply::Pong { attended: false, pid, .. } => pid,
        _ => return Err(StoreError::Locked(paths.state.clone()).into()),
    };
    lodge_host::proc::kill(other);
    tokio::time::timeout(YIELD, lodge_host::proc::ended(other))
        .await
        .context("the other daemon does not end")?;
    Ok(Store::open(&paths.state)?)
}

fn door_settings(metald: Metald, host: &Arc<Linux>) -> Result<connect::Settings> {
    let Metald { assets, backend, accel, tenants, audit, traces, .. } = metald;
    let exporter = traces.map(Exporter::start);
    let file = std::fs::File::options().create(true).append(true).open(&audit);
    let file = Mutex::new(file.with_context(|| audit.display().to_string())?);
    let host = host.clone();
    Ok(connect::Settings {
        assets,
        beneath: Box::new(paths::lies_beneath),
        tenants,
        backend,
        accel,
        audit: Box::new(move |line| {
            // A full disk must not keep machines from being stopped.
            let _ = writeln!(file.lock().expect("not poisoned"), "{line}");
        }),
        warn: Box::new(|what| {
            let _ = writeln!(std::io::stderr(), "lodge: {what}");
        }),
        trace: Box::new(move |span| {
            if let Some(exporter) = &exporter {
                exporter.take(span);
            }
        }),
        health: Box::new(move || match host.facts_so_far().map(|facts| &facts.qemu) {
            Some(Ok(_)) => Ok(BackendKind::Qemu.to_string()),
            Some(Err(why)) => Err(why.clone()),
            None => Err("the host has not been looked at yet".into()),
        }),
    })
}

/// True once after each boot of the host.
fn fresh_boot(marker: &Path) -> bool {
    let boot = paths::boot_id();
    let seen = std::fs::read_to_string(marker).is_ok_and(|id| id == boot);
    if !seen {
        // At worst machines that should start with the host are asked to start once more.
        let _ = std::fs::write(marker, boot);
    }
    !seen
}
