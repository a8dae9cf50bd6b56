//! Whether KVM here can run a stock kernel: proven by running a counted loop in 64-bit long mode
//! in a machine of one virtual CPU, and timing it. A `/dev/kvm` can open and answer every question
//! and yet emulate long mode instruction by instruction, on which a stock Linux never arrives.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_msr_entry, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};

/// Slower than this, a stock kernel is better off with translation (TCG).
pub const LEAST_SPEED: u64 = 50_000_000;

/// What is known about KVM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvmFact {
    /// `/dev/kvm` is absent or may not be opened; the text says which.
    Absent { why: String },
    /// It opens, but no guest code could be timed.
    Unproven { why: String },
    Proven {
        /// Instructions per second in long mode.
        speed: u64,
        /// The guest may be given `IA32_ARCH_CAPABILITIES`; QEMU aborts where it may not.
        arch_capabilities: bool,
    },
}

impl KvmFact {
    /// KVM runs a stock kernel at a speed worth having.
    pub fn runs_linux(&self) -> bool {
        matches!(self, KvmFact::Proven { speed, .. } if *speed >= LEAST_SPEED)
    }

    pub fn opens(&self) -> bool {
        !matches!(self, KvmFact::Absent { .. })
    }

    pub fn describe(&self) -> String {
        match self {
            KvmFact::Absent { why } | KvmFact::Unproven { why } => why.clone(),
            KvmFact::Proven { speed, .. } if self.runs_linux() => {
                format!("long mode runs at {} million instructions per second", speed / 1_000_000)
            }
            KvmFact::Proven { speed, .. } => format!(
                "/dev/kvm opens, but runs 64-bit code at only {:.1} million instructions per \
                 second (hardware: thousands of millions); it emulates long mode, and a stock \
                 Linux does not reach user space on it",
                *speed as f64 / 1e6
            ),
        }
    }
}

/// Runs the proof; takes a few milliseconds, some tens where long mode is emulated.
pub fn probe() -> KvmFact {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return absent(io::Error::from_raw_os_error(error.errno())),
    };
    match time_loop(&kvm) {
        Ok((speed, arch_capabilities)) => KvmFact::Proven { speed, arch_capabilities },
        Err(why) => KvmFact::Unproven { why: format!("/dev/kvm opens, but {why}") },
    }
}

fn absent(error: io::Error) -> KvmFact {
    let why = match error.kind() {
        io::ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
        _ => format!("/dev/kvm cannot be opened: {error}"),
    };
    KvmFact::Absent { why }
}

const MEMORY: usize = 64 << 10;
const CODE: u64 = 0x8000;
const LOOPS: u32 = 20_000;

/// `mov ecx, N; 1: dec ecx; jnz 1b; hlt`
fn code(loops: u32) -> [u8; 10] {
    let [a, b, c, d] = loops.to_le_bytes();
    [0xb9, a, b, c, d, 0xff, 0xc9, 0x75, 0xfc, 0xf4]
}

/// Page tables that map the first GiB onto itself, and the loop, in guest memory.
fn fill(memory: &mut [u8], loops: u32) {
    let mut put = |at: usize, value: u64| memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(0x1000, 0x2003);
    put(0x2000, 0x3003);
    put(0x3000, 0x83);
    let code = code(loops);
    memory[CODE as usize..CODE as usize + code.len()].copy_from_slice(&code);
}

fn time_loop(kvm: &Kvm) -> Result<(u64, bool), String> {
    let step = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what} fails: {e}");
    let vm = kvm.create_vm().map_err(step("making a machine"))?;
    let memory = GuestMemory::new().map_err(|e| format!("guest memory fails: {e}"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the region is mapped, of this size, and outlives the machine: `memory` is declared
    // before and dropped after everything that uses it.
    unsafe { vm.set_user_memory_region(region) }.map_err(step("giving it memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(step("making a CPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(step("asking for CPU features"))?;
    vcpu.set_cpuid2(&cpuid).map_err(step("setting CPU features"))?;
    let arch_capabilities = takes_arch_capabilities(&vcpu, kvm);
    // The first run pays for what is made on demand; only the second is timed.
    run(&mut vcpu, &memory, 16)?;
    let took = run(&mut vcpu, &memory, LOOPS)?;
    let speed = u128::from(LOOPS) * 2 * 1_000_000_000 / took.as_nanos().max(1);
    Ok((u64::try_from(speed).unwrap_or(u64::MAX), arch_capabilities))
}

/// QEMU sets this register from what KVM says it supports, and aborts if that is refused.
fn takes_arch_capabilities(vcpu: &VcpuFd, kvm: &Kvm) -> bool {
    const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
    let supported =
        kvm.get_msr_index_list().map(|list| list.as_slice().contains(&IA32_ARCH_CAPABILITIES));
    if !supported.unwrap_or(false) {
        return true;
    }
    let entry = kvm_msr_entry { index: IA32_ARCH_CAPABILITIES, data: 0x69, ..Default::default() };
    kvm_bindings::Msrs::from_entries(&[entry])
        .map_err(|_| ())
        .and_then(|msrs| vcpu.set_msrs(&msrs).map_err(drop))
        .is_ok_and(|set| set == 1)
}

fn run(vcpu: &mut VcpuFd, memory: &GuestMemory, loops: u32) -> Result<Duration, String> {
    // SAFETY: the guest does not run between two calls, so nothing else touches its memory.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.0, MEMORY) };
    fill(bytes, loops);
    enter_long_mode(vcpu).map_err(|e| format!("entering long mode fails: {e}"))?;
    let begun = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(begun.elapsed()),
        Ok(exit) => Err(format!("a loop in long mode ends in {exit:?}")),
        Err(error) => Err(format!("running a loop in long mode fails: {error}")),
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x8, type_: 11, db: 0, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (flat, flat, flat, flat, flat);
    sregs.cr3 = 0x1000;
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0011;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rflags = 2;
    vcpu.set_regs(&regs)
}

struct GuestMemory(*mut u8);

impl GuestMemory {
    fn new() -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new anonymous mapping that aliases nothing.
        let address = unsafe { mmap_anonymous(std::ptr::null_mut(), MEMORY, rights, flags) }?;
        Ok(Self(address.cast()))
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped; nothing points into it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), MEMORY) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_is_about_speed_not_presence() {
        let slow = KvmFact::Proven { speed: 1_700_000, arch_capabilities: false };
        let fast = KvmFact::Proven { speed: 3_000_000_000, arch_capabilities: true };
        assert!(!slow.runs_linux() && slow.opens());
        assert!(fast.runs_linux());
        assert!(slow.describe().contains("1.7 million"));
        assert!(!KvmFact::Absent { why: String::new() }.opens());
    }

    /// On any host: the proof ends, quickly, and says the same twice.
    #[test]
    fn the_proof_runs_on_this_host() {
        let (first, second) = (probe(), probe());
        assert_eq!(first.runs_linux(), second.runs_linux(), "{first:?} {second:?}");
        assert_eq!(
            first.opens(),
            std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
        );
        eprintln!("{first:?}");
    }
}
