//! What the door counts, and how it is told: OpenMetrics text. Knows calls and numbers, and of
//! machines only what it is handed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

use lodge_spec::state::{Detail, Usage};

/// Upper bounds of the latency buckets, in seconds.
const BUCKETS: [f64; 10] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0];

#[derive(Default)]
struct Latency {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

#[derive(Default)]
pub struct Metrics {
    calls: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    latency: Mutex<BTreeMap<&'static str, Latency>>,
}

impl Metrics {
    pub(super) fn called(&self, method: &'static str, code: &'static str, took: Duration) {
        *self.calls.lock().expect("not poisoned").entry((method, code)).or_default() += 1;
        let seconds = took.as_secs_f64();
        let mut all = self.latency.lock().expect("not poisoned");
        let latency = all.entry(method).or_default();
        for (bucket, bound) in latency.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= bound);
        }
        latency.count += 1;
        latency.sum += seconds;
    }

    /// The whole page. Ends with `# EOF`, as readers want it.
    pub(super) fn text(&self, machines: &[(Detail, Usage)]) -> String {
        let mut text = String::new();
        text += "# TYPE rpc_server_requests counter\n";
        for ((method, code), count) in self.calls.lock().expect("not poisoned").iter() {
            let labels = format!("rpc_method=\"{method}\",rpc_status=\"{code}\"");
            let _ = writeln!(text, "rpc_server_requests_total{{{labels}}} {count}");
        }
        text += "# TYPE rpc_server_request_duration_seconds histogram\n";
        for (method, latency) in self.latency.lock().expect("not poisoned").iter() {
            let name = "rpc_server_request_duration_seconds";
            for (count, bound) in latency.buckets.iter().zip(BUCKETS) {
                let labels = format!("rpc_method=\"{method}\",le=\"{bound:?}\"");
                let _ = writeln!(text, "{name}_bucket{{{labels}}} {count}");
            }
            let Latency { count, sum, .. } = latency;
            let labels = format!("rpc_method=\"{method}\"");
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
            let _ = writeln!(text, "{name}_count{{{labels}}} {count}");
            let _ = writeln!(text, "{name}_sum{{{labels}}} {sum}");
        }
        of_machines(&mut text, machines);
        text + "# EOF\n"
    }
}

fn of_machines(text: &mut String, machines: &[(Detail, Usage)]) {
    let _ = writeln!(text, "# TYPE lodge_vms gauge");
    let mut states: BTreeMap<&str, u64> = BTreeMap::new();
    for (detail, _) in machines {
        *states.entry(detail.summary.state.as_str()).or_default() += 1;
    }
    for (state, count) in states {
        let _ = writeln!(text, "lodge_vms{{state=\"{state}\"}} {count}");
    }
    type Read = fn(&Usage) -> f64;
    let families: [(&str, &str, Read); 8] = [
        ("lodge_vm_cpu_seconds", "counter", |u| u.cpu_ns as f64 / 1e9),
        ("lodge_vm_memory_bytes", "gauge", |u| u.memory_bytes as f64),
        ("lodge_vm_disk_read_bytes", "counter", |u| u.disk.in_bytes as f64),
        ("lodge_vm_disk_written_bytes", "counter", |u| u.disk.out_bytes as f64),
        ("lodge_vm_network_received_bytes", "counter", |u| u.network.in_bytes as f64),
        ("lodge_vm_network_transmitted_bytes", "counter", |u| u.network.out_bytes as f64),
        ("lodge_vm_network_received_packets", "counter", |u| u.network.in_operations as f64),
        ("lodge_vm_uptime_seconds", "gauge", |u| u.uptime_ms as f64 / 1e3),
    ];
    for (name, kind, read) in families {
        let _ = writeln!(text, "# TYPE {name} {kind}");
        let suffix = if kind == "counter" { "_total" } else { "" };
        for (detail, usage) in machines.iter().filter(|(_, usage)| usage.pid != 0) {
            let origin = detail.origin.as_ref();
            let id = origin.map_or_else(|| detail.summary.name.to_string(), |o| o.id.clone());
            let customer = origin.map_or("", |o| o.owner.as_str());
            let backend = detail.summary.backend.map_or("", |b| b.as_str());
            let labels = format!(
                "vm_id=\"{}\",customer_id=\"{}\",backend=\"{backend}\"",
                escape(&id),
                escape(customer)
            );
            let _ = writeln!(text, "{name}{suffix}{{{labels}}} {}", read(usage));
        }
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_and_timed() {
        let metrics = Metrics::default();
        metrics.called("BootVm", "ok", Duration::from_millis(3));
        metrics.called("BootVm", "not_found", Duration::from_micros(10));
        let text = metrics.text(&[]);
        assert!(
            text.contains("rpc_server_requests_total{rpc_method=\"BootVm\",rpc_status=\"ok\"} 1\n")
        );
        assert!(text.contains("_bucket{rpc_method=\"BootVm\",le=\"0.0005\"} 1\n"));
        assert!(text.contains("_bucket{rpc_method=\"BootVm\",le=\"0.005\"} 2\n"));
        assert!(text.ends_with("# EOF\n"));
    }
}
