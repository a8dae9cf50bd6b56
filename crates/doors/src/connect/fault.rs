//! Refusals as codes of the wire. The one place that knows both vocabularies.

use connectrpc::{ConnectError, ErrorCode};
use lodge_spec::problem::Problem;
use lodge_spec::request::Refusal;

pub(super) fn invalid(message: impl Into<String>) -> ConnectError {
    ConnectError::new(ErrorCode::InvalidArgument, message)
}

pub(super) fn precondition(message: impl Into<String>) -> ConnectError {
    ConnectError::new(ErrorCode::FailedPrecondition, message)
}

pub(super) fn not_found(vm_id: &str) -> ConnectError {
    ConnectError::new(ErrorCode::NotFound, format!("VM not found: {vm_id}"))
}

/// Why `verb` was not done to a machine. `order`: for each disk, its place in the request.
pub(super) fn refused(verb: &str, vm_id: &str, refusal: &Refusal, order: &[usize]) -> ConnectError {
    let text = |refusal: &Refusal| format!("failed to {verb} vm: {refusal}");
    match refusal {
        Refusal::NotFound { .. } | Refusal::Ambiguous { .. } => not_found(vm_id),
        Refusal::Invalid { problems } => {
            let lines: Vec<String> =
                problems.iter().map(|p| in_their_words(p, order).to_string()).collect();
            invalid(lines.join("; "))
        }
        Refusal::NoImage { .. } => invalid(refusal.to_string()),
        Refusal::Taken { what, .. } if what.contains("identity") || what.contains("name") => {
            ConnectError::new(ErrorCode::AlreadyExists, format!("VM already exists: {vm_id}"))
        }
        Refusal::Taken { .. }
        | Refusal::State { .. }
        | Refusal::Changed { .. }
        | Refusal::Unsupported { .. } => precondition(text(refusal)),
        Refusal::Timeout { .. } => ConnectError::new(ErrorCode::DeadlineExceeded, text(refusal)),
        Refusal::Failed { .. } => ConnectError::new(ErrorCode::Internal, text(refusal)),
    }
}

/// A problem with the field that the caller wrote.
fn in_their_words(problem: &Problem, order: &[usize]) -> Problem {
    const FIELDS: &[(&str, &str)] = &[
        ("cpus.count", "cpu.vcpu_count"),
        ("cpus.max", "cpu.max_vcpu_count"),
        ("cpus.cores", "cpu.topology.cores_per_socket"),
        ("cpus.threads", "cpu.topology.threads_per_core"),
        ("memory.size", "memory.size_bytes"),
        ("memory.max", "memory.max_size_bytes"),
        ("boot.kernel", "boot.kernel_path"),
        ("boot.initrd", "boot.initrd_path"),
        ("boot.cmdline", "boot.kernel_args"),
    ];
    let known = FIELDS.iter().find(|(ours, _)| *ours == problem.path);
    let path = match (known, problem.path.strip_prefix("disks[")) {
        (Some((_, theirs)), _) => (*theirs).to_owned(),
        (None, Some(rest)) => {
            let (index, field) = rest.split_once(']').unwrap_or((rest, ""));
            let index = index.parse().ok().and_then(|i: usize| order.get(i)).copied().unwrap_or(0);
            format!("storage[{index}]{}", field.replace(".source", ".path"))
        }
        (None, None) => {
            let path = problem.path.replace("nics[", "network[").replace(".mac", ".mac_address");
            // Devices are also named by the name that their place gave them.
            let path = named(&path, "disks.disk", "storage");
            named(&path, "nics.nic", "network").replace("x_limit", "x_rate_limit")
        }
    };
    Problem { path, message: problem.message.clone() }
}

fn named(path: &str, ours: &str, theirs: &str) -> String {
    let Some(rest) = path.strip_prefix(ours) else { return path.to_owned() };
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    format!("{theirs}[{}]{}", &rest[..end], &rest[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_name_the_callers_fields() {
        let ours = [
            ("disks[0].source", "storage[2].path"),
            ("memory.max", "memory.max_size_bytes"),
            ("nics[1].mac", "network[1].mac_address"),
            ("boot.kernel", "boot.kernel_path"),
            ("disks.disk3", "storage[3]"),
            ("nics.nic0.rx_limit", "network[0].rx_rate_limit"),
        ];
        for (ours, theirs) in ours {
            assert_eq!(in_their_words(&Problem::new(ours, "x"), &[2, 0, 1]).path, theirs);
        }
    }
}
