//! The lists through which clients hand in jobs and fetch results: as much of a Redis as that takes.
//! All in memory; what nobody fetches ends by itself.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// More bytes than this are not kept for clients that do not fetch them.
const MAX_BYTES: usize = 64 << 20;

#[derive(Default)]
pub(super) struct Keys {
    state: Mutex<State>,
    pushed: Notify,
}

#[derive(Default)]
struct State {
    lists: HashMap<Vec<u8>, List>,
    bytes: usize,
}

struct List {
    items: VecDeque<Vec<u8>>,
    ends: Option<Instant>,
}

impl State {
    /// Forgets what has ended.
    fn sweep(&mut self) {
        let now = Instant::now();
        let bytes = &mut self.bytes;
        self.lists.retain(|_, list| {
            let keep = list.ends.is_none_or(|ends| ends > now) && !list.items.is_empty();
            if !keep {
                *bytes -= list.items.iter().map(Vec::len).sum::<usize>();
            }
            keep
        });
    }

    fn list(&mut self, key: &[u8]) -> Option<&mut List> {
        let list = self.lists.get_mut(key)?;
        let over = list.ends.is_some_and(|ends| ends <= Instant::now());
        (!over && !list.items.is_empty()).then_some(list)
    }
}

impl Keys {
    /// Adds an item behind the others, or before them; how many there are now. `None`: there is
    /// no room.
    pub(super) fn push(&self, key: &[u8], item: Vec<u8>, before: bool) -> Option<usize> {
        let mut state = self.state.lock().expect("not poisoned");
        if state.bytes + item.len() > MAX_BYTES {
            state.sweep();
            if state.bytes + item.len() > MAX_BYTES {
                return None;
            }
        }
        if state.list(key).is_none() {
            state.sweep();
        }
        state.bytes += item.len();
        let fresh = || List { items: VecDeque::new(), ends: None };
        let list = state.lists.entry(key.to_vec()).or_insert_with(fresh);
        if before {
            list.items.push_front(item)
        } else {
            list.items.push_back(item)
        }
        let count = list.items.len();
        drop(state);
        self.pushed.notify_waiters();
        Some(count)
    }

    /// Keeps only the last items of a list.
    pub(super) fn trim(&self, key: &[u8], most: usize) {
        let mut state = self.state.lock().expect("not poisoned");
        let Some(list) = state.list(key) else { return };
        let mut freed = 0;
        while list.items.len() > most {
            freed += list.items.pop_front().map_or(0, |item| item.len());
        }
        state.bytes -= freed;
    }

    pub(super) fn expire(&self, key: &[u8], after: Duration) {
        let mut state = self.state.lock().expect("not poisoned");
        if let Some(list) = state.list(key) {
            list.ends = Some(Instant::now() + after);
        }
    }

    pub(super) fn remove(&self, key: &[u8]) -> bool {
        let mut state = self.state.lock().expect("not poisoned");
        let there = state.list(key).is_some();
        if let Some(list) = state.lists.remove(key) {
            state.bytes -= list.items.iter().map(Vec::len).sum::<usize>();
        }
        there
    }

    /// How many items there are; 0 is what is not there.
    pub(super) fn length(&self, key: &[u8]) -> usize {
        self.state.lock().expect("not poisoned").list(key).map_or(0, |list| list.items.len())
    }

    /// Seconds until a list ends: −1 for never, −2 for what is not there.
    pub(super) fn ttl(&self, key: &[u8]) -> i64 {
        let mut state = self.state.lock().expect("not poisoned");
        match state.list(key).map(|list| list.ends) {
            None => -2,
            Some(None) => -1,
            Some(Some(ends)) => {
                let left = ends.saturating_duration_since(Instant::now());
                left.as_millis().div_ceil(1000) as i64
            }
        }
    }

    /// Takes the last item of a list and puts it before the first of another, which may be the
    /// same one.
    fn rotate(&self, from: &[u8], to: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.state.lock().expect("not poisoned");
        let item = state.list(from)?.items.pop_back()?;
        if from == to {
            state.lists.get_mut(to)?.items.push_front(item.clone());
            return Some(item);
        }
        state.bytes -= item.len();
        drop(state);
        // There is room for what was taken a moment ago.
        self.push(to, item.clone(), true);
        Some(item)
    }

    fn pop(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.state.lock().expect("not poisoned");
        let item = state.list(key)?.items.pop_front()?;
        state.bytes -= item.len();
        Some(item)
    }

    /// Waits for something that may come with any push. Zero waits for ever.
    async fn wait<T>(&self, time: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let wait = async {
            loop {
                let pushed = self.pushed.notified();
                tokio::pin!(pushed);
                // What is pushed from here on is not missed.
                pushed.as_mut().enable();
                if let Some(found) = look() {
                    return found;
                }
                pushed.await;
            }
        };
        if time.is_zero() { Some(wait.await) } else { tokio::time::timeout(time, wait).await.ok() }
    }

    pub(super) async fn wait_rotate(
        &self,
        from: &[u8],
        to: &[u8],
        time: Duration,
    ) -> Option<Vec<u8>> {
        self.wait(time, || self.rotate(from, to)).await
    }

    /// The first item of the first of these lists that has one, and which.
    pub(super) async fn wait_pop(
        &self,
        keys: &[Vec<u8>],
        time: Duration,
        last: bool,
    ) -> Option<(Vec<u8>, Vec<u8>)> {
        let take = |key: &Vec<u8>| if last { self.pop_last(key) } else { self.pop(key) };
        self.wait(time, || keys.iter().find_map(|key| Some((key.clone(), take(key)?)))).await
    }

    fn pop_last(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.state.lock().expect("not poisoned");
        let item = state.list(key)?.items.pop_back()?;
        state.bytes -= item.len();
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn results_can_be_read_again_until_they_end() {
        let keys = Keys::default();
        assert_eq!((keys.length(b"a"), keys.ttl(b"a")), (0, -2));
        assert_eq!(keys.push(b"a", b"1".to_vec(), false), Some(1));
        assert_eq!(keys.ttl(b"a"), -1);
        for _ in 0..3 {
            let found = keys.wait_rotate(b"a", b"a", Duration::from_secs(1)).await;
            assert_eq!(found.as_deref(), Some(&b"1"[..]));
        }
        keys.expire(b"a", Duration::from_secs(300));
        assert_eq!(keys.ttl(b"a"), 300);
        keys.expire(b"a", Duration::ZERO);
        assert_eq!(keys.length(b"a"), 0);
        assert_eq!(keys.wait_rotate(b"a", b"a", Duration::from_millis(10)).await, None);
    }

    #[tokio::test]
    async fn those_who_wait_are_served() {
        let keys = std::sync::Arc::new(Keys::default());
        let waiting = keys.clone();
        let waiter = tokio::spawn(async move {
            waiting.wait_pop(&[b"x".to_vec(), b"y".to_vec()], Duration::ZERO, false).await
        });
        tokio::task::yield_now().await;
        keys.push(b"y", b"1".to_vec(), false);
        assert_eq!(waiter.await.unwrap(), Some((b"y".to_vec(), b"1".to_vec())));
    }

    #[test]
    fn what_nobody_fetches_does_not_fill_memory() {
        let keys = Keys::default();
        let big = vec![0; MAX_BYTES / 2];
        assert!(keys.push(b"a", big.clone(), false).is_some());
        assert!(keys.push(b"a", big.clone(), false).is_some());
        assert!(keys.push(b"a", vec![0], false).is_none());
        keys.expire(b"a", Duration::ZERO);
        assert!(keys.push(b"b", big, false).is_some());
    }
}
