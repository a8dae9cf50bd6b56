//! The daemon's side of a running machine: connections to its warden and its hypervisor, and the
//! reports that come over them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lodge_jail::cgroup::Limits;
use lodge_machine::Seen;
use lodge_machine::host::{Command, Found, Mark, Report, Sink};
use lodge_spec::draft::GuardDraft;
use lodge_spec::names::Mac;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc};

use super::drive::{Drive, Told, Unreached, reach};
use super::launch::launch_file;
use super::usage::Sample;
use crate::backend::qemu::control::{Control, Stands, disk_error, meaning};
use crate::backend::qemu::qmp::QmpEvent;
use crate::backend::{Forward, Launch, NicPlace, ScreenPort, Tap};
use crate::fdpass::{self, Lines};
use crate::paths::boot_id;
use crate::warden::message::{self, Ask, Exit, HeldTap, Status, Tell};

/// After QEMU is gone its warden says how within this.
const LAST_WORDS: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(super) struct Live {
    pub(super) drive: Drive,
    sink: Sink,
    pub(super) launch: Arc<Launch>,
    pub(super) pid: u32,
    asks: mpsc::UnboundedSender<Ask>,
    /// What was read when somebody last asked for usage.
    sample: Arc<std::sync::Mutex<Option<Sample>>>,
    /// Questions that want a descriptor go over a connection of their own, one at a time.
    taps: Arc<Mutex<()>>,
    /// What the hypervisor may use now.
    pub(super) limits: Arc<Mutex<Limits>>,
    /// Where the screen is shown now.
    pub(super) shown: Arc<Mutex<Option<ScreenPort>>>,
    /// What interfaces may send, where that has changed since the start.
    pub(super) guarded: Arc<Mutex<HashMap<Mac, GuardDraft>>>,
}

pub(super) fn mark(sink: &Sink, kind: &str, detail: &str) {
    let at_us = Some(lodge_machine::store::now_us());
    let mark = Mark { kind: kind.to_owned(), detail: detail.to_owned(), at_us };
    let _ = sink.send(Report::Mark(Box::new(mark)));
}

/// A conversation with a warden.
pub(super) struct Warden {
    stream: UnixStream,
    lines: Lines,
    pub(super) status: Status,
}

impl Warden {
    pub(super) async fn connect(run: &Path) -> Result<Self, String> {
        let text = |e: std::io::Error| format!("the machine's warden: {e}");
        let stream = UnixStream::connect(message::socket(run)).await.map_err(text)?;
        let mut lines = Lines::default();
        match lines.next::<Tell>(&stream).await.map_err(text)? {
            Some((Tell::Status(status), _)) => Ok(Self { stream, lines, status }),
            Some(_) | None => Err("the machine's warden ended at once".into()),
        }
    }

    async fn next(&mut self) -> Option<Tell> {
        self.lines.next(&self.stream).await.ok().flatten().map(|(tell, _)| tell)
    }
}

/// Connects to what a launch has just started.
pub(super) async fn connect(launch: Launch, sink: Sink) -> Result<Live, String> {
    let run = launch.warden.run.clone();
    let mut warden = match Warden::connect(&run).await {
        Ok(warden) => warden,
        Err(error) => return Err(kept_exit(&run).map_or(error, |e| outcome_text(&e))),
    };
    let mut early = Vec::new();
    let reached = {
        let reaching = reach(&launch, true);
        tokio::pin!(reaching);
        loop {
            tokio::select! {
                reached = &mut reaching => break reached,
                tell = warden.next() => match tell {
                    Some(Tell::Exited(exit)) => return Err(outcome_text(&exit)),
                    Some(tell) => early.push(tell),
                    None => {
                        let gone = "the machine's warden is gone".to_owned();
                        return Err(kept_exit(&run).map_or(gone, |e| outcome_text(&e)));
                    }
                },
            }
        }
    };
    let (drive, told) = match reached {
        Ok(reached) => reached,
        // One that does not listen has ended, or is about to.
        Err(Unreached { why, refused: false }) => {
            return Err(last_words(&mut warden).await.unwrap_or(why));
        }
        Err(Unreached { why, refused: true }) => {
            // One that does not take its description is of no use to anybody.
            let _ = fdpass::send(&warden.stream, &Ask::Kill, None).await;
            let _ = last_words(&mut warden).await;
            return Err(why);
        }
    };
    mark(&sink, "answers", "the hypervisor's control socket answers");
    for tell in early {
        report(&sink, tell);
    }
    Ok(go_on(launch, warden, drive, told, sink))
}

/// Why a hypervisor ended before it answered.
async fn last_words(warden: &mut Warden) -> Option<String> {
    let hear = async {
        while let Some(tell) = warden.next().await {
            if let Tell::Exited(exit) = tell {
                return Some(outcome_text(&exit));
            }
        }
        None
    };
    tokio::time::timeout(LAST_WORDS, hear).await.ok().flatten()
}

fn outcome_text(exit: &Exit) -> String {
    match exit.outcome() {
        Err(how) => how,
        Ok(()) => "the hypervisor ended at once, with success".to_owned(),
    }
}

fn kept_exit(run: &Path) -> Option<Exit> {
    serde_json::from_slice(&std::fs::read(message::exit_file(run)).ok()?).ok()
}

/// Connects to what an earlier daemon started. The error says how it ended.
pub(super) async fn adopt(run: &Path, sink: Sink) -> Result<(Live, Found), Result<(), String>> {
    let gone = |why: &str| Err(Err(why.to_owned()));
    let text = std::fs::read(launch_file(run)).unwrap_or_default();
    let Ok((boot, launch)) = serde_json::from_slice::<(String, Launch)>(&text) else {
        return gone("the machine was not running any more; the host may have been restarted");
    };
    if boot != boot_id() {
        return gone("the host was restarted");
    }
    let ended = |why: String| match kept_exit(run) {
        Some(exit) => Err(exit.outcome()),
        None => Err(Err(why)),
    };
    let mut warden = match Warden::connect(run).await {
        Ok(warden) => warden,
        Err(_) => return ended("its warden was killed, and the hypervisor with it".into()),
    };
    let (drive, told) = match reach(&launch, false).await {
        Ok(reached) => reached,
        Err(error) => {
            let why = last_words(&mut warden).await;
            return ended(why.unwrap_or(error.why));
        }
    };
    let Status { ready, panic, .. } = warden.status.clone();
    let live = go_on(launch, warden, drive, told, sink.clone());
    let stands = live.drive.stands().await;
    if let Some(line) = panic {
        let _ = sink.send(Report::Seen(Seen::Panicked(line)));
    }
    let paused = !matches!(stands, Stands::Running);
    if let Stands::Broken(why) = stands {
        let _ = sink.send(Report::Seen(Seen::Broken(why)));
    }
    Ok((live, Found::Alive { paused, ready }))
}

fn go_on(launch: Launch, warden: Warden, drive: Drive, told: Told, sink: Sink) -> Live {
    let (asks, asked) = mpsc::unbounded_channel();
    let pid = warden.status.pid;
    if let (Some(events), Drive::Qemu(control)) = (told, &drive) {
        tokio::spawn(hear_hypervisor(events, control.clone(), sink.clone()));
    }
    tokio::spawn(hear_warden(warden, asked, sink.clone()));
    let (taps, sample, guarded) = (Arc::default(), Arc::default(), Arc::default());
    let shown = Arc::new(Mutex::new(launch.warden.screen.as_ref().and_then(|s| s.at)));
    let limits = Arc::new(Mutex::new(launch.warden.cgroup.limits));
    Live { limits, drive, sink, launch: Arc::new(launch), pid, asks, sample, taps, shown, guarded }
}

async fn hear_hypervisor(
    mut events: mpsc::UnboundedReceiver<QmpEvent>,
    control: Control,
    sink: Sink,
) {
    while let Some(event) = events.recv().await {
        control.saw(&event);
        if let Some(error) = disk_error(&event) {
            mark(&sink, "disk-error", &error);
        }
        let seen = match meaning(&event) {
            Some(Seen::Paused) => match control.stands().await {
                Ok(Stands::Broken(why)) => Some(Seen::Broken(why)),
                _ => Some(Seen::Paused),
            },
            seen => seen,
        };
        if let Some(seen) = seen {
            let _ = sink.send(Report::Seen(seen));
        }
    }
}

async fn hear_warden(mut warden: Warden, mut asked: mpsc::UnboundedReceiver<Ask>, sink: Sink) {
    if warden.status.ready {
        report(&sink, Tell::Ready { at_us: lodge_machine::store::now_us() });
    }
    // What the guest wrote while nobody listened.
    report(&sink, Tell::Status(warden.status.clone()));
    loop {
        tokio::select! {
            tell = warden.lines.next::<Tell>(&warden.stream) => match tell {
                Ok(Some((tell, _))) => {
                    let last = matches!(tell, Tell::Exited(_));
                    report(&sink, tell);
                    if last {
                        return;
                    }
                }
                Ok(None) | Err(_) => {
                    let how = Err("its warden was killed, and the hypervisor with it".to_owned());
                    let _ = sink.send(Report::Seen(Seen::Exited(how)));
                    return;
                }
            },
            Some(ask) = asked.recv() => {
                // Fails only when the warden is gone, which the other branch reports.
                let _ = fdpass::send(&warden.stream, &ask, None).await;
            }
        }
    }
}

fn report(sink: &Sink, tell: Tell) {
    let report = match tell {
        Tell::Ready { .. } => Report::Seen(Seen::Ready),
        Tell::Panic { line } => Report::Seen(Seen::Panicked(line)),
        Tell::Mark { kind, detail, at_us } => {
            Report::Mark(Box::new(Mark { kind, detail, at_us: Some(at_us) }))
        }
        Tell::Exited(exit) => {
            for line in &exit.stderr {
                mark(sink, "stderr", line);
            }
            Report::Seen(Seen::Exited(exit.outcome()))
        }
        Tell::Wrote { wrote } => Report::Wrote(Box::new(wrote)),
        Tell::Bootstrap { told } => Report::Bootstrap(Box::new(told)),
        Tell::Status(status) => {
            if let Some(told) = status.bootstrap {
                let _ = sink.send(Report::Bootstrap(Box::new(told)));
            }
            for wrote in status.wrote {
                let _ = sink.send(Report::Wrote(Box::new(wrote)));
            }
            return;
        }
        Tell::Ports { .. } | Tell::Tap { .. } => return,
    };
    let _ = sink.send(report);
}

impl Live {
    /// Tells the hypervisor what to do, and reports what follows where nothing else will.
    pub(super) async fn command(&self, command: Command) -> Result<(), String> {
        if let Some(seen) = self.drive.command(command).await? {
            let _ = self.sink.send(Report::Seen(seen));
        }
        Ok(())
    }

    /// Puts a sample in the place of the one before.
    pub(super) fn exchange_sample(&self, sample: Sample) -> Option<Sample> {
        self.sample.lock().expect("not poisoned").replace(sample)
    }

    pub(super) async fn ask(&self, ask: Ask) -> Result<(), String> {
        self.asks.send(ask).map_err(|_| "the machine's warden is gone".to_owned())
    }

    /// What the warden says of itself now.
    pub(super) async fn status(&self) -> Result<Status, String> {
        Ok(Warden::connect(&self.launch.warden.run).await?.status)
    }

    /// Gives all interfaces back to their networks but these.
    pub(super) async fn keep_taps(&self, nics: &[NicPlace]) -> Result<(), String> {
        for HeldTap { interface, .. } in self.status().await?.taps {
            if nics.iter().all(|nic| nic.interface != interface) {
                self.ask(Ask::Untap { interface }).await?;
            }
        }
        Ok(())
    }

    /// Forwards these host ports and no others.
    pub(super) async fn set_ports(&self, ports: Vec<Forward>) -> Result<(), String> {
        let _one = self.taps.lock().await;
        let text = |e: std::io::Error| format!("the machine's warden: {e}");
        let mut warden = Warden::connect(&self.launch.warden.run).await?;
        fdpass::send(&warden.stream, &Ask::Ports { ports }, None).await.map_err(text)?;
        loop {
            match warden.next().await {
                Some(Tell::Ports { error: None }) => return Ok(()),
                Some(Tell::Ports { error: Some(why) }) => return Err(why),
                Some(_) => {}
                None => return Err("the machine's warden is gone".into()),
            }
        }
    }

    pub(super) async fn new_tap(&self, tap: Tap) -> Result<std::os::fd::OwnedFd, String> {
        let _one = self.taps.lock().await;
        let text = |e: std::io::Error| format!("the machine's warden: {e}");
        let mut warden = Warden::connect(&self.launch.warden.run).await?;
        fdpass::send(&warden.stream, &Ask::Tap { tap: Box::new(tap) }, None).await.map_err(text)?;
        loop {
            match warden.lines.next::<Tell>(&warden.stream).await.map_err(text)? {
                Some((Tell::Tap { error: None }, Some(fd))) => return Ok(fd),
                Some((Tell::Tap { error }, _)) => {
                    return Err(error.unwrap_or_else(|| "no interface came".into()));
                }
                Some(_) => {}
                None => return Err("the machine's warden is gone".into()),
            }
        }
    }
}
