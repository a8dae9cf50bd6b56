//! What machines used over time, in windows of five minutes and of an hour, the last five of each
//! kept. In memory only: a daemon that starts anew begins anew.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lodge_spec::state::{Device, State, Usage};
use serde_json::{Value, json};

use super::Door;
use super::describe::{self, Machine};
use crate::control::Control;

/// How often machines are looked at while nobody asks.
const PACE: Duration = Duration::from_secs(30);
/// Seconds.
const WINDOWS: [i64; 2] = [300, 3600];
/// Windows that are over and told still.
const HISTORY: usize = 5;

/// How values become samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// As they are.
    Average,
    /// By how much they have grown since the last one.
    Difference,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Window {
    /// Seconds since 1970.
    start: i64,
    total: f64,
    max: f64,
    count: u64,
}

impl Window {
    fn value(&self) -> Value {
        let Self { start, total, max, count } = self;
        let avg = if *count == 0 { 0.0 } else { total / *count as f64 };
        json!({"avg": avg, "total": total, "max": max, "count": count, "start": start})
    }
}

#[derive(Clone, Debug)]
struct Series {
    op: Op,
    tags: Vec<(&'static str, String)>,
    last: Option<f64>,
    at: i64,
    current: [Window; 2],
    over: [VecDeque<Window>; 2],
}

impl Series {
    fn new(op: Op, tags: Vec<(&'static str, String)>) -> Self {
        Self { op, tags, last: None, at: 0, current: Default::default(), over: Default::default() }
    }

    fn take(&mut self, value: f64, now: i64) {
        let sample = match (self.op, self.last) {
            (Op::Average, _) => Some(value),
            // What counts from nothing again has grown by what it says.
            (Op::Difference, Some(last)) if value < last => Some(value),
            (Op::Difference, last) => last.map(|last| value - last),
        };
        (self.last, self.at) = (Some(value), now);
        let windows = self.current.iter_mut().zip(&mut self.over);
        for ((current, over), seconds) in windows.zip(WINDOWS) {
            let start = now - now.rem_euclid(seconds);
            if current.start != start {
                let ended = std::mem::replace(current, Window { start, ..Window::default() });
                if ended.count > 0 {
                    over.push_front(ended);
                    over.truncate(HISTORY);
                }
            }
            if let Some(sample) = sample {
                current.max = if current.count == 0 { sample } else { current.max.max(sample) };
                current.total += sample;
                current.count += 1;
            }
        }
    }

    fn value(&self) -> Value {
        let tags: Vec<Value> =
            self.tags.iter().map(|(key, value)| json!({"key": key, "value": value})).collect();
        let [short, long] = &self.current;
        let over = |i: usize| self.over[i].iter().map(Window::value).collect::<Vec<_>>();
        json!({
            "op": if self.op == Op::Average { "A" } else { "D" },
            "last_value": self.last, "last_time": self.at, "tags": tags,
            "current": {"300": short.value(), "3600": long.value()},
            "history": {"300": over(0), "3600": over(1)},
        })
    }
}

/// A part of a machine that has numbers of its own.
struct Part<'a> {
    id: &'a str,
    tag: &'static str,
    value: &'a str,
}

/// All machines' series: by identity, then by metric and name.
#[derive(Default)]
pub(super) struct Statistics(Mutex<HashMap<String, BTreeMap<String, Series>>>);

impl Statistics {
    fn take(&self, machine: &Machine, usage: &Usage, now: i64) {
        let mut all = self.0.lock().expect("not poisoned");
        let series = all.entry(machine.uuid.clone()).or_default();
        let name = machine.name.as_str();
        let mut put = |metric: &str, part: Option<Part<'_>>, op: Op, value: f64| {
            let id = part.as_ref().map_or(name.to_owned(), |p| format!("{name}.{}", p.id));
            let known = series.entry(format!("{metric}/{id}")).or_insert_with(|| {
                let mut tags = vec![("type", "virt".to_owned()), ("id", id)];
                tags.extend(part.map(|p| (p.tag, p.value.to_owned())));
                Series::new(op, tags)
            });
            known.take(value, now);
        };
        put("kvm.memory.max", None, Op::Average, machine.params.memory as f64 * 1.024);
        put("kvm.cpu.time", None, Op::Difference, usage.cpu_ns as f64 / 1e9);
        for (number, time) in usage.cpus_ns.iter().enumerate() {
            let number = number.to_string();
            let at = || Some(Part { id: &number, tag: "nr", value: &number });
            let running = f64::from(u8::from(machine.state == State::Running));
            put("kvm.vcpu.state", at(), Op::Average, running);
            put("kvm.vcpu.time", at(), Op::Difference, *time as f64 / 1e9);
        }
        for (i, Device { name: tap, traffic: net }) in usage.nics.iter().enumerate() {
            let mac = machine.mac(i).unwrap_or_else(|| tap.clone());
            let at = || Some(Part { id: &mac, tag: "name", value: tap });
            put("kvm.net.rxbytes", at(), Op::Difference, net.in_bytes as f64);
            put("kvm.net.rxpackets", at(), Op::Difference, net.in_operations as f64);
            put("kvm.net.txbytes", at(), Op::Difference, net.out_bytes as f64);
            put("kvm.net.txpackets", at(), Op::Difference, net.out_operations as f64);
        }
        for Device { name: disk, traffic } in &usage.disks {
            let disk = describe::disk_name(disk);
            let at = || Some(Part { id: disk, tag: "name", value: disk });
            put("kvm.disk.rdbytes", at(), Op::Difference, traffic.in_bytes as f64);
            put("kvm.disk.iops.read", at(), Op::Difference, traffic.in_operations as f64);
            put("kvm.disk.wrbytes", at(), Op::Difference, traffic.out_bytes as f64);
            put("kvm.disk.iops.write", at(), Op::Difference, traffic.out_operations as f64);
        }
    }

    fn value(&self, uuid: &str) -> Value {
        let all = self.0.lock().expect("not poisoned");
        let series = all.get(uuid).into_iter().flatten();
        Value::Object(series.map(|(key, series)| (key.clone(), series.value())).collect())
    }

    fn forget_others(&self, machines: &[Machine]) {
        let mut all = self.0.lock().expect("not poisoned");
        all.retain(|uuid, _| machines.iter().any(|machine| machine.uuid == *uuid));
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() as i64
}

impl<C: Control> Door<C> {
    /// What `kvm.infops` says; asking is a look too.
    pub(super) fn used(&self, machine: &Machine, usage: &Usage) -> Value {
        self.statistics.take(machine, usage, now());
        self.statistics.value(&machine.uuid)
    }

    /// Looks at the machines that run, for as long as the door is open.
    pub(super) async fn watch_usage(self: Arc<Self>) {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            let Ok(machines) = self.machines().await else { continue };
            self.statistics.forget_others(&machines);
            for machine in machines.iter().filter(|m| m.state == State::Running) {
                let usage = self.usage(machine).await;
                self.statistics.take(machine, &usage, now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_and_the_last_five_are_kept() {
        let mut series = Series::new(Op::Difference, vec![("id", "a".into())]);
        // Ten each half minute, for an hour.
        for n in 0..=120 {
            series.take(f64::from(n) * 10.0, 7200 + i64::from(n) * 30);
        }
        let value = series.value();
        assert_eq!((&value["op"], &value["last_time"]), (&json!("D"), &json!(10_800)));
        let short = value["history"]["300"].as_array().unwrap();
        assert_eq!(short.len(), 5);
        let newest =
            json!({"avg": 10.0, "total": 100.0, "max": 10.0, "count": 10, "start": 10_500});
        assert_eq!(short[0], newest);
        assert_eq!(short[4]["start"], 9300);
        // The first look of all has nothing to be compared with.
        let hour = &value["history"]["3600"][0];
        assert_eq!((&hour["count"], &hour["total"]), (&json!(119), &json!(1190.0)));
        assert_eq!(value["current"]["3600"]["count"], 1);
    }

    #[test]
    fn a_counter_that_begins_anew_does_not_go_back() {
        let mut series = Series::new(Op::Difference, Vec::new());
        for value in [100.0, 150.0, 20.0] {
            series.take(value, 301);
        }
        let current = &series.value()["current"]["300"];
        assert_eq!(
            current,
            &json!({"avg": 35.0, "total": 70.0, "max": 50.0, "count": 2, "start": 300})
        );
        let mut average = Series::new(Op::Average, Vec::new());
        average.take(5.0, 3);
        average.take(3.0, 299);
        let current = &average.value()["current"]["300"];
        assert_eq!(current, &json!({"avg": 4.0, "total": 8.0, "max": 5.0, "count": 2, "start": 0}));
    }
}
