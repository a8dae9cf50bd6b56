//! Jobs: a client hands one in, it is done, its result can be fetched for a while. The stages of
//! that are lists of the keyspace; their names and shapes are the clients'.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::Door;
use super::keys::Keys;
use crate::control::Control;

/// Results can be fetched for this long.
const KEPT: Duration = Duration::from_secs(300);
/// What nobody reads of a stream ends after this.
const STREAM_KEPT: Duration = Duration::from_secs(60);
const STREAM_ITEMS: usize = 1000;
/// Messages of a job that those who come later are still told.
const REPLAYED: usize = 10;

/// What data is.
const LEVEL_JSON: u32 = 20;
const STREAMED: u32 = 1;
const END_OK: u32 = 2;
const END_ERROR: u32 = 4;

#[derive(Debug, Deserialize)]
struct Job {
    #[serde(default)]
    id: String,
    #[serde(default)]
    command: String,
    #[serde(default)]
    arguments: Value,
    queue: Option<String>,
    stream: Option<bool>,
    tags: Option<Vec<String>>,
}

/// Why a command was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: u32,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { code: 500, message: message.into() }
    }
}

/// What a command answers. `None`: there is no such command.
pub(super) type Answer = Option<Result<Value, Failure>>;

/// What a job has said so far and will say.
pub(super) struct Log {
    last: Mutex<VecDeque<String>>,
    /// `None` ends it.
    tell: broadcast::Sender<Option<String>>,
}

/// Logs of jobs that run, by their ids.
#[derive(Default)]
pub(super) struct Logs(Mutex<HashMap<String, Arc<Log>>>);

impl Logs {
    pub(super) fn open(&self, id: &str) -> Arc<Log> {
        let log = Arc::new(Log { last: Mutex::default(), tell: broadcast::channel(256).0 });
        self.0.lock().expect("not poisoned").insert(id.to_owned(), log.clone());
        log
    }

    fn find(&self, id: &str) -> Option<Arc<Log>> {
        self.0.lock().expect("not poisoned").get(id).cloned()
    }

    fn close(&self, id: &str) {
        if let Some(log) = self.0.lock().expect("not poisoned").remove(id) {
            let _ = log.tell.send(None);
        }
    }
}

impl Log {
    /// Adds a message as clients see it.
    pub(super) fn say(&self, record: String) {
        let mut last = self.last.lock().expect("not poisoned");
        if last.len() == REPLAYED {
            last.pop_front();
        }
        last.push_back(record.clone());
        // Nobody may be listening.
        let _ = self.tell.send(Some(record));
    }

    fn follow(&self) -> (Vec<String>, broadcast::Receiver<Option<String>>) {
        let last = self.last.lock().expect("not poisoned");
        (last.iter().cloned().collect(), self.tell.subscribe())
    }
}

/// A message of a job: `level` says what it is, `flags` whether it is the last.
pub(super) fn record(id: &str, message: &str, flags: u32) -> String {
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let meta = LEVEL_JSON << 16 | flags;
    let epoch = u64::try_from(epoch).unwrap_or(u64::MAX);
    let message = json!({"message": message, "epoch": epoch, "meta": meta});
    json!({"core": 0, "command": id, "message": message}).to_string()
}

fn flag_of(id: &str) -> Vec<u8> {
    format!("result:{id}:flag").into_bytes()
}

/// A message for those who read a job's stream.
fn stream(keys: &Keys, id: &str, record: String) {
    let key = format!("stream:{id}").into_bytes();
    keys.push(&key, record.into_bytes(), false);
    keys.trim(&key, STREAM_ITEMS);
    keys.expire(&key, STREAM_KEPT);
}

impl<C: Control> Door<C> {
    /// Takes a job and begins it. One that cannot be read, or that is there already, is dropped:
    /// there is nobody to tell.
    pub(super) fn hand_in(self: &Arc<Self>, text: &[u8]) {
        let Ok(job) = serde_json::from_slice::<Job>(text) else { return };
        let flag = flag_of(&job.id);
        if job.id.is_empty() || self.keys.length(&flag) > 0 {
            return;
        }
        if self.keys.push(&flag, Vec::new(), false).is_none() {
            return;
        }
        let door = self.clone();
        tokio::spawn(async move { door.work(job).await });
    }

    async fn work(self: Arc<Self>, job: Job) {
        let queue = job.queue.clone().filter(|queue| !queue.is_empty()).map(|queue| {
            let mut queues = self.queues.lock().expect("not poisoned");
            // Those that nobody waits in are forgotten.
            queues.retain(|_, queue| Arc::strong_count(queue) > 1);
            queues.entry(queue).or_default().clone()
        });
        let _turn = match &queue {
            Some(queue) => Some(queue.lock().await),
            None => None,
        };
        let (started, clock) = (SystemTime::now(), Instant::now());
        let log = self.logs.open(&job.id);
        let answer = match job.command.as_str() {
            "core.subscribe" => Some(self.subscribe(&job).await),
            command => self.command(command, &job.arguments, job.tags.as_deref()).await,
        };
        let (state, code, data) = match &answer {
            Some(Ok(value)) => ("SUCCESS", 0, value.to_string()),
            Some(Err(failure)) => ("ERROR", failure.code, json!(failure.message).to_string()),
            // A code of zero makes older clients trip over their own message.
            None => ("UNKNOWN_CMD", 404, String::new()),
        };
        let level = if answer.is_some() { LEVEL_JSON } else { 0 };
        if answer.is_some() {
            let end = if code == 0 { END_OK } else { END_ERROR };
            let record = record(&job.id, &data, STREAMED | end);
            log.say(record.clone());
            if job.stream.unwrap_or(false) {
                stream(&self.keys, &job.id, record);
            }
        }
        self.logs.close(&job.id);
        let started = started.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let result = json!({
            "id": job.id,
            "command": job.command,
            "data": data,
            "streams": ["", ""],
            "level": level,
            "state": state,
            "code": code,
            "starttime": started,
            "time": clock.elapsed().as_millis() as u64,
            "tags": job.tags,
            "container": 0,
        });
        let key = format!("result:{}", job.id).into_bytes();
        self.keys.expire(&flag_of(&job.id), KEPT);
        self.keys.push(&key, result.to_string().into_bytes(), false);
        self.keys.expire(&key, KEPT);
    }

    /// Tells what another job says, until it ends.
    async fn subscribe(&self, job: &Job) -> Result<Value, Failure> {
        let id = job.arguments["id"].as_str().unwrap_or("");
        let log = self.logs.find(id);
        let log = log.ok_or_else(|| Failure::new(format!("job '{id}' does not exist")))?;
        let (last, mut more) = log.follow();
        drop(log);
        last.into_iter().for_each(|record| stream(&self.keys, &job.id, record));
        loop {
            match more.recv().await {
                Ok(Some(record)) => stream(&self.keys, &job.id, record),
                // Whoever reads too slowly misses some.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Ok(None) | Err(broadcast::error::RecvError::Closed) => return Ok(Value::Null),
            }
        }
    }

    /// Begins the job that is always there, whose messages are what happens to machines.
    pub(super) fn open_events(&self) -> Arc<Log> {
        self.keys.push(&flag_of(super::events::JOB), Vec::new(), false);
        self.logs.open(super::events::JOB)
    }
}
