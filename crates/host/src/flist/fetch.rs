//! Blocks for a file system: from the cache where it has them, else from the stores, each at most
//! once at a time, all within a deadline. What stores answer is checked before anybody sees it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lodge_formats::flist::{Block, Index, MAX_BLOCK, Routes};

use super::cache::Cache;
use super::store::{self, Store};

/// At most so many blocks are on their way at once.
const MAX_FETCHES: usize = 16;
/// So many are fetched at once before anybody has asked for them.
const AHEAD: usize = 8;
/// Which files of blocks are kept open.
const MAX_OPEN: usize = 128;
/// Every so many uses of an open block it is checked again.
const SAMPLE: u32 = 256;
/// A store that has failed is asked after the others for this long.
const SULK: Duration = Duration::from_secs(10);

/// A store and the blocks that it is for.
struct Route {
    first: u8,
    last: u8,
    store: Box<dyn Store>,
    /// As it may be shown.
    shown: String,
    failed: Mutex<Option<Instant>>,
}

/// What was asked and fetched, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Blocks that stores have answered with.
    pub blocks: AtomicU64,
    /// Their stored bytes.
    pub bytes: AtomicU64,
    /// Blocks that nobody could give.
    pub failures: AtomicU64,
}

pub struct Fetcher {
    cache: Cache,
    routes: Vec<Route>,
    /// A guest that reads waits no longer.
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
    pub counters: Counters,
}

#[derive(Default)]
struct State {
    /// Blocks that somebody is looking for.
    under_way: HashSet<u32>,
    /// How many of those stores are asked for.
    asked: usize,
    /// Blocks that were checked, with how often they were used since.
    open: HashMap<u32, (Arc<File>, u32)>,
    order: VecDeque<u32>,
    /// Which were used first, in order, for as long as that is written down.
    first: Option<Vec<u32>>,
    used: HashSet<u32>,
}

impl State {
    fn remember(&mut self, number: u32, found: &Result<Arc<File>, String>) {
        let Ok(file) = found else { return };
        self.open.insert(number, (file.clone(), 0));
        self.order.push_back(number);
        while self.order.len() > MAX_OPEN {
            let oldest = self.order.pop_front().expect("not empty");
            self.open.remove(&oldest);
        }
    }
}

/// Where the blocks of an flist are: what it says itself, and what its user adds.
pub fn routes(routes: &Routes, added: Option<&str>) -> Result<Vec<(u8, u8, String)>, String> {
    let mut all = Vec::new();
    if let Some(url) = added {
        all.push((0, 255, url.to_owned()));
    }
    all.extend(routes.ranges.iter().cloned());
    if let Some(text) = &routes.router {
        all.extend(super::router::read(text)?);
    }
    Ok(all)
}

/// A place on this host, which only its user may name.
pub fn is_local(url: &str) -> bool {
    ["dir:", "file:", "zdb+unix:", "redis+unix:", "zdb:///", "redis:///", "ardb:///"]
        .iter()
        .any(|start| url.starts_with(start))
}

impl Fetcher {
    /// `stores`: first and last first byte of the blocks, and the store's URL.
    pub fn new(
        cache: Cache,
        stores: &[(u8, u8, String)],
        patience: Duration,
    ) -> Result<Self, String> {
        let mut routes = Vec::new();
        for (first, last, url) in stores {
            let (store, shown) = (store::open(url)?, store::without_secret(url));
            let failed = Mutex::default();
            routes.push(Route { first: *first, last: *last, store, shown, failed });
        }
        let state = State { first: Some(Vec::new()), ..State::default() };
        Ok(Self {
            cache,
            routes,
            patience,
            state: Mutex::new(state),
            changed: Condvar::new(),
            counters: Counters::default(),
        })
    }

    /// A block's plain bytes as a file. The error says what each store said.
    pub fn block(&self, index: &Index, number: u32, limit: u32) -> Result<Arc<File>, String> {
        let deadline = Instant::now() + self.patience;
        let mut state = self.state.lock().expect("not poisoned");
        if state.first.is_some() && state.used.insert(number) {
            state.first.iter_mut().for_each(|list| list.push(number));
        }
        loop {
            if let Some((file, uses)) = state.open.get_mut(&number) {
                *uses += 1;
                if *uses % SAMPLE != 0 {
                    return Ok(file.clone());
                }
                // Looked at again; if it has changed it is fetched anew.
                state.open.remove(&number);
            }
            if !state.under_way.contains(&number) {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("nobody gave it in time".into());
            }
            state = self.changed.wait_timeout(state, left).expect("not poisoned").0;
        }
        state.under_way.insert(number);
        drop(state);
        self.look(index, number, limit, deadline)
    }

    /// Finds a block that was entered as under way, and tells those who wait for it.
    fn look(
        &self,
        index: &Index,
        number: u32,
        limit: u32,
        deadline: Instant,
    ) -> Result<Arc<File>, String> {
        let found = self.fill(index, &index.block(number), limit, deadline);
        let mut state = self.state.lock().expect("not poisoned");
        state.under_way.remove(&number);
        state.remember(number, &found);
        self.changed.notify_all();
        found
    }

    fn fill(
        &self,
        index: &Index,
        block: &Block,
        limit: u32,
        deadline: Instant,
    ) -> Result<Arc<File>, String> {
        let cipher = index.cipher();
        if let Some(file) = self.cache.checked(cipher, block) {
            return Ok(file.into());
        }
        // Whoever finds a block here does not wait for those who must ask for theirs.
        self.begin(deadline)?;
        let fetched = self.fetch(index, block, limit, deadline);
        self.state.lock().expect("not poisoned").asked -= 1;
        self.changed.notify_all();
        let plain = fetched.inspect_err(|_| {
            self.counters.failures.fetch_add(1, Ordering::Relaxed);
        })?;
        let kept = self.cache.put(block, &plain).map_err(|e| format!("the cache: {e}"))?;
        Ok(kept.into())
    }

    /// Waits until stores may be asked for one block more.
    fn begin(&self, deadline: Instant) -> Result<(), String> {
        let mut state = self.state.lock().expect("not poisoned");
        while state.asked >= MAX_FETCHES {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("too many others are waiting for theirs".into());
            }
            state = self.changed.wait_timeout(state, left).expect("not poisoned").0;
        }
        state.asked += 1;
        Ok(())
    }

    /// Asks one store after the other, twice, those that have just failed last.
    fn fetch(
        &self,
        index: &Index,
        block: &Block,
        limit: u32,
        deadline: Instant,
    ) -> Result<Vec<u8>, String> {
        let first = block.id[0];
        let mut routes: Vec<&Route> =
            self.routes.iter().filter(|r| (r.first..=r.last).contains(&first)).collect();
        if routes.is_empty() {
            return Err("no store is known that it may be asked of".into());
        }
        let sulks = |route: &&Route| {
            let failed = *route.failed.lock().expect("not poisoned");
            failed.is_some_and(|at| at.elapsed() < SULK)
        };
        routes.sort_by_key(sulks);
        let mut said: Vec<String> = Vec::new();
        for round in 0..2 {
            for (i, route) in routes.iter().enumerate() {
                // A share of what is left for each that can still be asked.
                let left = deadline.saturating_duration_since(Instant::now());
                let turns = (routes.len() - i) as u32 + if round == 0 { 1 } else { 0 };
                if left.is_zero() {
                    break;
                }
                let until = Instant::now() + left / turns;
                let why = match route.store.get(&block.id, until) {
                    Ok(Some(body)) => {
                        let bytes = body.len() as u64;
                        match index.cipher().open(block, body, limit) {
                            Ok(plain) => {
                                self.counters.blocks.fetch_add(1, Ordering::Relaxed);
                                self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
                                *route.failed.lock().expect("not poisoned") = None;
                                return Ok(plain);
                            }
                            Err(error) => error.to_string(),
                        }
                    }
                    Ok(None) => "it has no such block".to_owned(),
                    Err(why) => {
                        *route.failed.lock().expect("not poisoned") = Some(Instant::now());
                        why
                    }
                };
                said.retain(|s| !s.starts_with(&route.shown));
                said.push(format!("{}: {why}", route.shown));
            }
            // What answered at once will not say anything else at once.
            if said.iter().all(|s| s.ends_with("no such block")) {
                break;
            }
        }
        Err(said.join("; "))
    }

    /// A block's bytes straight from the stores.
    pub fn plain(&self, index: &Index, number: u32, limit: u32) -> Result<Vec<u8>, String> {
        self.fetch(index, &index.block(number), limit, Instant::now() + self.patience)
    }

    /// Which blocks were used so far, in order; from now on that is not written down any more.
    pub fn used_first(&self) -> Vec<u32> {
        let mut state = self.state.lock().expect("not poisoned");
        state.used = HashSet::new();
        state.first.take().unwrap_or_default()
    }

    /// Brings blocks into the cache that will be needed, several at a time.
    pub fn ahead(&self, index: &Index, numbers: &[u32]) {
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..AHEAD.min(numbers.len()) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed) as usize;
                        let Some(number) = numbers.get(at).filter(|n| **n < index.block_count())
                        else {
                            return;
                        };
                        // Whoever reads it is told if it cannot be had. Stores that fail are for
                        // those who wait.
                        if self.bring(index, *number).is_err() {
                            next.store(u64::MAX / 2, Ordering::Relaxed);
                            return;
                        }
                    }
                });
            }
        });
    }

    /// Like `block`, for nobody in particular.
    fn bring(&self, index: &Index, number: u32) -> Result<(), String> {
        {
            let mut state = self.state.lock().expect("not poisoned");
            if state.open.contains_key(&number) || !state.under_way.insert(number) {
                return Ok(());
            }
        }
        self.look(index, number, MAX_BLOCK, Instant::now() + self.patience).map(drop)
    }
}
