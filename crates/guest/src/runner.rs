//! The runner's life: one at a time, a run counted before it begins, waiting without counting as
//! long as there is nothing to run.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use lodge_guest::{Report, Stage, TAIL};
use rustix::fs::{FlockOperation, flock};

use crate::folder::{Folder, Read};
use crate::log::Log;
use crate::{Places, fetch, grow, script};

/// Between two attempts to fetch: the first pause, twice as long after each, the last one.
const FETCH_PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Where the disk is full, or cannot be written.
const DISK_PAUSE: Duration = Duration::from_secs(10);

pub(crate) fn run(places: &Places, boot: bool) -> ExitCode {
    // Held until this process ends, however it does.
    let lock = File::options().create(true).append(true).open(&places.lock);
    let held = lock.as_ref().map(|f| flock(f, FlockOperation::NonBlockingLockExclusive));
    if let Ok(Err(_)) = held {
        return ExitCode::SUCCESS;
    }
    let mut runner = Runner {
        places,
        folder: Folder::new(&places.dir),
        log: Log::new(&places.log),
        report: None,
    };
    if boot {
        match grow::root() {
            Ok(None) => {}
            Ok(Some(grown)) => runner.log.say(&grown),
            Err(why) => runner.log.say(&format!("the root could not be grown: {why}")),
        }
    }
    match runner.folder.outcome() {
        Some(_) => ExitCode::SUCCESS,
        None => runner.go(),
    }
}

struct Runner<'a> {
    places: &'a Places,
    folder: Folder,
    log: Log,
    /// Where the server wants to hear of the runs.
    report: Option<String>,
}

impl Runner<'_> {
    fn go(&mut self) -> ExitCode {
        let mut pause = FETCH_PAUSES.0;
        loop {
            self.await_leave();
            let (runs, limit) = (self.folder.runs(), self.limit());
            if runs > 0 && runs >= limit {
                // Only where the last run was cut off, or the limit was lowered meanwhile.
                return self.give_up(runs, limit, None);
            }
            let body = match fetch::script(&self.places.url) {
                Ok(fetched) => {
                    pause = FETCH_PAUSES.0;
                    self.report = fetched.report;
                    fetched.body
                }
                Err(missing) if missing.required || self.folder.requires_script() => {
                    self.log.say(&missing.why);
                    self.report = missing.report.or(self.report.take());
                    b"exit 1\n".to_vec()
                }
                Err(missing) => {
                    self.log.say_once(&format!("{}; waiting for a script", missing.why));
                    sleep(pause);
                    pause = (pause * 2).min(FETCH_PAUSES.1);
                    continue;
                }
            };
            // Counted first: a run that is cut off has been one.
            let kept = self.folder.set_script(&body).and_then(|()| self.folder.set_runs(runs + 1));
            if let Err(error) = kept {
                let dir = self.folder.path().display();
                self.log.say_once(&format!("{dir} cannot be written, so nothing is run: {error}"));
                sleep(DISK_PAUSE);
                continue;
            }
            if let Some(ended) = self.one(runs + 1, &body) {
                return ended;
            }
        }
    }

    /// One run. `None`: there is to be another.
    fn one(&mut self, run: u32, body: &[u8]) -> Option<ExitCode> {
        self.log.trim();
        let limit = self.limit();
        self.log.say(&format!("run {run} of {limit}"));
        self.tell(Stage::Running, run, None);
        let exit = match script::unfit(body) {
            Some((exit, why)) => {
                self.log.say(&format!("the script is not run: {why}"));
                exit
            }
            None => self.execute(),
        };
        if exit == 0 {
            self.log.say("the script has succeeded");
            self.conclude("succeeded");
            self.tell(Stage::Succeeded, run, Some(0));
            return Some(ExitCode::SUCCESS);
        }
        self.log.say(&format!("ERROR: bootstrap script exited with return code {exit}."));
        // Read anew: what the script has written holds at once.
        let limit = self.limit();
        if run >= limit {
            return Some(self.give_up(run, limit, Some(exit)));
        }
        self.tell(Stage::Failed, run, Some(exit));
        sleep(self.folder.pause(run));
        None
    }

    fn execute(&mut self) -> i32 {
        let ended = self.log.open().and_then(|log| script::run(&self.folder, log));
        match ended {
            Ok(ended) => {
                if ended.timed_out {
                    self.log.say("the script took longer than bootstrap-timeout and was ended");
                }
                ended.exit
            }
            Err(error) => {
                self.log.say(&format!("the script cannot be started: {error}"));
                127
            }
        }
    }

    fn give_up(&mut self, runs: u32, limit: u32, exit: Option<i32>) -> ExitCode {
        self.log.say("Maximum bootstrap retry amount reached...");
        self.conclude("given-up");
        if self.report.is_none() {
            // Nothing has been fetched since this began; whoever serves may want to know.
            let reached = fetch::script(&self.places.url);
            self.report = reached.map_or_else(|missing| missing.report, |fetched| fetched.report);
        }
        let report = Report { stage: Stage::GivenUp, runs, limit, exit, tail: String::new() };
        self.send(report);
        ExitCode::from(exit.and_then(|e| u8::try_from(e).ok()).unwrap_or(1))
    }

    fn conclude(&mut self, outcome: &str) {
        if let Err(error) = self.folder.conclude(outcome) {
            self.log.say(&format!("the outcome cannot be kept: {error}"));
        }
    }

    fn limit(&mut self) -> u32 {
        let Read { value, warning } = self.folder.limit();
        if let Some(warning) = warning {
            self.log.say_once(&format!("warning: {warning}"));
        }
        value
    }

    /// Waits until the script may run.
    fn await_leave(&mut self) {
        while !self.folder.armed() {
            self.log.say_once("start-bootstrap is not there: nothing runs until it is");
            if await_change(self.folder.path(), || self.folder.armed()).is_err() {
                sleep(DISK_PAUSE);
            }
        }
    }

    fn tell(&mut self, stage: Stage, runs: u32, exit: Option<i32>) {
        let limit = self.folder.limit().value;
        self.send(Report { stage, runs, limit, exit, tail: String::new() });
    }

    /// Tells the server, if it wants to hear. That it does not hear stops nothing.
    fn send(&mut self, mut report: Report) {
        let Some(url) = &self.report else { return };
        report.tail = self.log.tail(TAIL);
        for pause in [Duration::from_millis(200), Duration::from_secs(1)] {
            if fetch::report(url, &report).is_ok() {
                return;
            }
            sleep(pause);
        }
        if let Err(why) = fetch::report(url, &report) {
            self.log.say(&format!("{url}: {why}"));
        }
    }
}

/// Returns when something in a folder has changed, unless `there` holds already.
fn await_change(dir: &Path, there: impl Fn() -> bool) -> std::io::Result<()> {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let watch = init(CreateFlags::CLOEXEC)?;
    add_watch(&watch, dir, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::MOVE_SELF)?;
    if !there() {
        rustix::io::read(&watch, &mut [0_u8; 4096][..])?;
    }
    Ok(())
}
