//! All automation: `cargo xtask check | tidy | openapi | fuzz | guest | vm-test | bench`. Runs
//! programs and looks at files; knows nothing about machines.

mod bench;
mod bench_door;
mod bench_family;
mod bench_flist;
mod bench_vmadm;
mod bench_vmm;
mod bench_xcluster;
mod fuzz;
mod guest;
mod leftovers;
mod openapi;
#[cfg(feature = "proto")]
mod proto;
mod run;
mod tidy;

use std::process::ExitCode;

use run::Step;

fn main() -> ExitCode {
    let task = std::env::args().nth(1).unwrap_or_default();
    let result = match task.as_str() {
        "check" => check(),
        "tidy" => tidy::tidy(),
        "vm-test" => vm_test(),
        "bench" => bench::bench(),
        "fuzz" => fuzz::fuzz(),
        "guest" => guest::guest(&std::env::args().nth(2).unwrap_or_else(|| "release".into())),
        "openapi" => openapi::openapi(false),
        #[cfg(feature = "proto")]
        "proto" => proto::generate(),
        _ => Err(anyhow::anyhow!(
            "usage: cargo xtask check | tidy | openapi | fuzz | guest [PROFILE] | vm-test | bench"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::say(&format!("xtask {task}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Everything that needs neither root nor a guest. All failures are shown, not only the first.
fn check() -> anyhow::Result<()> {
    let packages =
        ["spec", "formats", "guest", "machine", "host", "doors"].map(|p| format!("lodge-{p}"));
    let mut test = vec!["test", "--quiet", "-p", "lodge", "-p", "lodge-jail", "-p", "lodge-guest"];
    for package in &packages {
        test.extend(["-p", package]);
    }
    run::all(&[
        Step::new("format", "cargo", &["fmt", "--all", "--check"]),
        Step::new(
            "clippy",
            "cargo",
            &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ),
        Step::call("probe", || {
            guest::probe(&["fmt", "--check"])?;
            guest::probe(&["clippy", "--locked", "--", "-D", "warnings"])
        }),
        // The list of known faults is fetched from where this host may not reach.
        Step::optional("deny", "cargo", &["deny", "check", "bans", "licenses", "sources"]),
        Step::call("tidy", tidy::tidy),
        Step::call("openapi", || openapi::openapi(true)),
        Step::new("tests", "cargo", &test),
    ])
}

/// Real machines under real hypervisors. Needs root, QEMU and Debian's packages.
fn vm_test() -> anyhow::Result<()> {
    let before = leftovers::look();
    let tested = run::all(&[
        Step::new(
            "build",
            "cargo",
            &["build", "--profile", "quick", "-p", "lodge", "-p", "lodge-jail"],
        ),
        Step::call("guest", || guest::guest("quick")),
        // The one long compilation has the host for itself.
        Step::new(
            "kernel",
            "cargo",
            &[
                "test",
                "-p",
                "lodge-vm-tests",
                "--test",
                "it",
                "--",
                "--exact",
                "xcluster::kernel::a_kernel_is_built_once_and_knows_its_modules",
            ],
        ),
        Step::new(
            "machines",
            "cargo",
            &["test", "-p", "lodge-vm-tests", "--test", "it", "--", "--nocapture"],
        ),
    ]);
    let left = leftovers::since(&before);
    for object in &left {
        run::say(&format!("left behind: {object}"));
    }
    tested?;
    anyhow::ensure!(left.is_empty(), "the suite left {} host objects behind", left.len());
    Ok(())
}
