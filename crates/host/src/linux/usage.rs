//! What a running machine uses, read from the kernel, its network and its hypervisor when somebody
//! asks. Keeps nothing but the sample before, for the share of time between two questions.

use std::time::Duration;

use lodge_spec::machine::Machine;
use lodge_spec::state::{Device, Interface, Traffic, Usage};

use super::Linux;
use super::drive::CpuThreads;
use super::live::Live;
use crate::backend::Tap;
use crate::net::client;
use crate::net::plan::NetPlan;
use crate::paths::Paths;
use crate::warden::message::HeldTap;

/// Processor time and age of a process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    cpu: Duration,
    age: Duration,
}

impl Linux {
    /// All zero where the machine does not run. What each virtual CPU had is a question to the
    /// hypervisor, and asked where `each_cpu`.
    pub async fn usage(&self, machine: &Machine, each_cpu: bool) -> Usage {
        let Ok(live) = self.live(machine.id) else { return Usage::default() };
        let sample = sample(live.pid);
        let before = live.exchange_sample(sample);
        let mut nics = Vec::new();
        for HeldTap { interface, network } in live.status().await.unwrap_or_default().taps {
            // A network that does not answer has nothing to tell.
            let traffic = client::count(&network, &interface).await.unwrap_or_default();
            nics.push(Device { name: interface, traffic });
        }
        let cpus_ns = match each_cpu {
            true => cpu_times(live.pid, &live.drive.cpu_threads().await),
            false => Vec::new(),
        };
        let disks = live.drive.disk_traffic().await;
        Usage {
            pid: live.pid,
            cpu_ns: sample.cpu.as_nanos().try_into().unwrap_or(u64::MAX),
            cpu_percent: percent(before, sample, machine.cpus.count),
            memory_bytes: resident(live.pid),
            uptime_ms: sample.age.as_millis().try_into().unwrap_or(u64::MAX),
            cpus_ns,
            disk: sum(&disks),
            disks,
            network: sum(&nics),
            nics,
            socket: Some(super::drive::control_socket(&live.launch).display().to_string()),
            interface: interface(&live, machine, &self.paths),
        }
    }
}

fn sum(devices: &[Device]) -> Traffic {
    let mut sum = Traffic::default();
    for Device { traffic, .. } in devices {
        sum.in_bytes += traffic.in_bytes;
        sum.out_bytes += traffic.out_bytes;
        sum.in_operations += traffic.in_operations;
        sum.out_operations += traffic.out_operations;
    }
    sum
}

/// Nanoseconds that each virtual CPU has had.
fn cpu_times(pid: u32, threads: &CpuThreads) -> Vec<u64> {
    let tasks = format!("/proc/{pid}/task");
    let mut known: Vec<(String, String, u64)> = Vec::new();
    for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = read("status");
        let line = |key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim()
        };
        // The last is the number in the innermost namespace.
        let inside = line("NSpid:").rsplit('\t').next().unwrap_or_default().to_owned();
        let time = read("schedstat").split(' ').next().and_then(|ns| ns.parse().ok());
        known.push((inside, line("Name:").to_owned(), time.unwrap_or(0)));
    }
    match threads {
        CpuThreads::Numbered(numbers) => numbers
            .iter()
            .map(|number| {
                let text = number.to_string();
                let time = known.iter().find(|(inside, _, _)| *inside == text).map_or(0, |t| t.2);
                // Those that take turns on one thread are told to have shared it.
                time / numbers.iter().filter(|other| *other == number).count() as u64
            })
            .collect(),
        CpuThreads::Named(prefix) => {
            let number = |name: &str| name.strip_prefix(prefix)?.trim().parse::<u32>().ok();
            let cpus = known.iter().filter_map(|(_, name, time)| Some((number(name)?, *time)));
            let sorted: std::collections::BTreeMap<u32, u64> = cpus.collect();
            sorted.into_values().collect()
        }
    }
}

fn interface(live: &Live, machine: &Machine, paths: &Paths) -> Option<Interface> {
    let tap = Tap::reached(&live.launch.warden.taps)?;
    let nic = machine.nics.iter().find(|nic| nic.mac == tap.mac)?;
    let plan = NetPlan::of(&nic.network, &paths.network(nic.network.as_str()));
    let resolvers = match tap.resolvers.as_slice() {
        [] => vec![plan.names().to_string()],
        own => own.iter().map(ToString::to_string).collect(),
    };
    Some(Interface {
        address: tap.address.to_string(),
        mac: tap.mac.to_string(),
        tap: tap.interface.clone(),
        network: nic.network.to_string(),
        gateway: plan.gateway().to_string(),
        resolvers,
    })
}

/// The share of its virtual CPUs that a machine had between two samples.
fn percent(before: Option<Sample>, now: Sample, cpus: u32) -> f64 {
    let before = before.unwrap_or_default();
    let (cpu, age) = (now.cpu.saturating_sub(before.cpu), now.age.saturating_sub(before.age));
    if age.is_zero() {
        return 0.0;
    }
    (cpu.as_secs_f64() / age.as_secs_f64() / f64::from(cpus.max(1)) * 100.0).clamp(0.0, 100.0)
}

/// From `/proc/PID/stat`; zero for a process that is gone.
fn sample(pid: u32) -> Sample {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let up = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let up: f64 = up.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0.0);
    // The name in parentheses may hold anything; what follows it does not.
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().skip(1).map(|n| n.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    let ticks = |index: usize| fields.get(index).copied().unwrap_or(0) as f64 / ticks_per_second();
    let seconds = |s: f64| Duration::try_from_secs_f64(s).unwrap_or_default();
    // Fields 14, 15 and 22 of proc(5), counted from the one after the state.
    let (user, system, started) = (ticks(10), ticks(11), ticks(18));
    match fields.is_empty() {
        true => Sample::default(),
        false => Sample { cpu: seconds(user + system), age: seconds(up - started) },
    }
}

fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

fn resident(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_an_age_and_uses_memory() {
        let pid = std::process::id();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(60) {
            std::hint::spin_loop();
        }
        let sample = sample(pid);
        // The first thread has the process's number.
        let times = cpu_times(pid, &CpuThreads::Numbered(vec![pid, pid]));
        assert!(times.len() == 2 && times[0] == times[1], "{times:?}");
        let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        assert_eq!(cpu_times(pid, &CpuThreads::Named("no thread")), Vec::<u64>::new(), "{name}");
        assert!(sample.cpu >= Duration::from_millis(20), "{sample:?}");
        assert!(resident(pid) > 1 << 20);
        let whole =
            percent(None, Sample { cpu: Duration::MAX / 2, age: Duration::from_secs(1) }, 1);
        assert!((whole - 100.0).abs() < f64::EPSILON);
        assert!(percent(Some(sample), sample, 1).abs() < f64::EPSILON);
    }
}
