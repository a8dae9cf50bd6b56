//! The command line: a command, options behind it, words behind those. Options are variables, and
//! variables are options: `--a-b=v` is `__a_b`. What is not known is refused with the nearest name.

use std::collections::BTreeMap;
use std::fmt::Write;

use lodge_spec::problem::nearest;

/// A command as the help shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    pub name: &'static str,
    pub words: &'static str,
    pub about: &'static str,
}

const fn command(name: &'static str, words: &'static str, about: &'static str) -> Command {
    Command { name, words, about }
}

/// What `xc` can do.
pub const COMMANDS: &[Command] = &[
    command("env", "", "Print the settings, for a shell to read"),
    command("kernel_build", "[--menuconfig] [--clean]", "Build the kernel"),
    command("busybox_build", "[--clean]", "Build busybox from its archive"),
    command("dropbear_build", "[--clean]", "Build dropbear from its archive"),
    command("iproute2_build", "[--clean]", "Build iproute2 from its archive"),
    command(
        "mkimage",
        "[--image=] [--format=] [--size=] [--version=] [--fs=] [--bootable]",
        "Make a new image",
    ),
    command("ximage", "[--image=] [ovl|tar...]", "Extend an image with overlays"),
    command(
        "mkcdrom",
        "[--label=] [ovl|tar...]",
        "Make the CD-ROM that VMs unpack at their first start",
    ),
    command("cache", "[--list] [--clear] [ovl...]", "Keep the archives of overlays"),
    command("cached_tar", "ovl", "Print the kept archive of an overlay"),
    command("ovld", "ovl", "Print the folder of an overlay"),
    command(
        "inject",
        "--addr=user@host [--sudo=sudo] [--key=file] ovl...",
        "Unpack overlays on a host",
    ),
    command("install_prog", "--dest=dir prog...", "Copy programs and their libraries"),
    command("cplib", "--dest=dir prog...", "Copy the libraries of programs"),
    command("cploader", "--dest=dir", "Copy the loader"),
    command("libs", "prog...", "Print the libraries of programs"),
    command("cat_tar", "file", "Print an archive, unpacked"),
    command("start", "[--nvm=] [--nrouters=] [--ntesters=]", "Start the cluster"),
    command(
        "starts",
        "[--nvm=] [--nrouters=] [--ntesters=]",
        "Start the cluster with consoles in tmux",
    ),
    command("stop", "[--now]", "Stop the cluster"),
    command("status", "[--quiet]", "Print which VMs run; ends with their number"),
    command("scaleout", "id...", "Start more VMs"),
    command("scalein", "id...", "Stop some VMs"),
    command("boot_vm", "[--bootable] id [kernel-arg...]", "Start one VM with its console here"),
    command("xvm", "id", "Start one VM with its console in an xterm"),
    command("svm", "id", "Start one VM with its console in tmux"),
    command("vm", "id", "Open a VM's console"),
    command("stop_vm", "id", "Pause a VM"),
    command("reset_vm", "id", "Reset a VM"),
    command("rsh", "[--bg] id cmd...", "Run a command on a VM"),
    command("rcp", "id remote local", "Copy a file from a VM"),
    command("tcpdump", "--start id if [opt...] | --get id if...", "Capture packets on a VM"),
    command("nsadd", "i", "Make a network for a cluster of its own"),
    command("nsdel", "i", "Take it away"),
    command("nsenter", "i", "Open a shell in it"),
    command("br_setup", "n", "Make one more net"),
    command("completion", "[prefix]", "Print the commands that begin so"),
];

/// What `xcadmin` can do.
pub const ADMIN: &[Command] = &[
    command("env", "", "Print the settings, for a shell to read"),
    command("env_check", "", "Look for what is needed on this host"),
    command("base_archives", "", "Print the archives that everything can be built from"),
    command("build_base", "[workspace]", "Build kernel, programs and image into a new workspace"),
    command("mkovl", "[--template=] [--ovldir=] name", "Make an overlay from another one"),
    command("ovlindex", "", "Print an index of the overlays"),
];

/// Options that some command knows; all are variables of the programs that overlays are.
const OPTIONS: &[&str] = &[
    "addr",
    "append",
    "base_libs",
    "bbver",
    "bg",
    "bootable",
    "cached",
    "cdrom",
    "clean",
    "clear",
    "dest",
    "dropbearver",
    "format",
    "fs",
    "get",
    "image",
    "ipver",
    "kbin",
    "kcfg",
    "key",
    "kobj",
    "kpatch",
    "kurl",
    "kver",
    "label",
    "list",
    "loader",
    "machine",
    "mem",
    "menuconfig",
    "mtu",
    "nets",
    "nets_router",
    "nets_vm",
    "network",
    "now",
    "nrouters",
    "ntesters",
    "nvm",
    "ovldir",
    "pace",
    "quiet",
    "size",
    "smp",
    "start",
    "sudo",
    "template",
    "timeout",
    "version",
];

/// Options of old that have no meaning here, and why.
const GONE: &[(&str, &str)] = &[
    ("graphic", "nodes have a serial console; `lodge` draws screens for machines that have one"),
    ("kvm", "Lodge picks the hypervisor; `lodge doctor` shows which and why"),
    ("kvm_opt", "Lodge writes the hypervisor's options; `lodge plan` shows them"),
    ("net_setup", "nets are bridges that Lodge makes"),
    ("script", "there is no helper VM for it to run in; what it does belongs into an overlay"),
    ("cidata", "`lodge` gives machines a cloud-init disk of their own"),
    ("root", "say --dest"),
    ("ipv4_base", "Lodge picks the addresses of the link between a network and the host"),
    ("ipv6_prefix", "Lodge picks the addresses of the link between a network and the host"),
];

/// Variables that meant something elsewhere, for a warning where they are set.
pub const WITHOUT_EFFECT: &[&str] = &["__kvm", "__kvm_opt", "__net_setup", "XCLUSTER_MONITOR_BASE"];

/// Options that may be followed by a node's number.
const NUMBERED: &[&str] = &["append", "mem", "nets", "smp"];

/// A command line, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub command: &'static Command,
    /// By the name of their variable.
    pub options: BTreeMap<String, String>,
    pub words: Vec<String>,
}

/// Takes a command line apart; `None` asks for help.
pub fn parse(commands: &'static [Command], words: &[String]) -> Result<Option<Line>, String> {
    let Some((name, rest)) = words.split_first() else { return Ok(None) };
    if name.starts_with("help") || name.contains("-h") {
        return Ok(None);
    }
    let Some(command) = commands.iter().find(|c| c.name == name) else {
        let hint = match nearest(name, commands.iter().map(|c| c.name)) {
            Some(near) => format!("; did you mean {near}?"),
            None => String::new(),
        };
        return Err(format!("Invalid command [{name}]{hint}"));
    };
    let (options, words) = apart(rest, known)?;
    Ok(Some(Line { command, options, words }))
}

/// Options by the names of their variables, and the words behind them.
type Apart = (BTreeMap<String, String>, Vec<String>);

/// The same for a command that is not of this table, whose options are not known.
pub fn loose(rest: &[String]) -> Result<Apart, String> {
    apart(rest, |name| match name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        true => Ok(()),
        false => Err(format!("--{name} is no name of a variable")),
    })
}

fn apart(rest: &[String], check: impl Fn(&str) -> Result<(), String>) -> Result<Apart, String> {
    let mut options = BTreeMap::new();
    let mut rest = rest.iter();
    let mut left = Vec::new();
    for word in rest.by_ref() {
        let Some(option) = word.strip_prefix("--").filter(|o| !o.is_empty()) else {
            left.push(word.clone());
            break;
        };
        let (name, value) = option.split_once('=').unwrap_or((option, "yes"));
        let name = name.replace('-', "_");
        check(&name)?;
        options.insert(format!("__{name}"), value.to_owned());
    }
    left.extend(rest.cloned());
    Ok((options, left))
}

/// Whether an option exists; the reason where it does not.
fn known(name: &str) -> Result<(), String> {
    let numbered = |base: &str| {
        let number = name.strip_prefix(base);
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    if OPTIONS.contains(&name) || NUMBERED.iter().any(|base| numbered(base)) {
        return Ok(());
    }
    if let Some((_, why)) = GONE.iter().find(|(gone, _)| *gone == name) {
        return Err(format!("--{} is not supported: {why}", name.replace('_', "-")));
    }
    let typed = name.replace('_', "-");
    Err(match nearest(name, OPTIONS.iter().copied()) {
        Some(near) => {
            format!("Unknown option --{typed}; did you mean --{}?", near.replace('_', "-"))
        }
        None => format!("Unknown option --{typed}"),
    })
}

pub fn help(program: &str, commands: &[Command]) -> String {
    let mut text = format!("Usage: {program} COMMAND [--OPTION[=VALUE]]... [WORD]...\n\n");
    for Command { name, words, about } in commands {
        let head = format!("{name} {words}");
        let _ = match head.len() < 30 {
            true => writeln!(text, "  {head:<30}{about}"),
            false => writeln!(text, "  {head}\n  {:<30}{about}", ""),
        };
    }
    text += "\nAn option --a-b=v is the same as a variable __a_b=v in the environment.\n";
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn line(text: &str) -> Line {
        parse(COMMANDS, &words(text)).unwrap().unwrap()
    }

    fn why(text: &str) -> String {
        parse(COMMANDS, &words(text)).unwrap_err()
    }

    #[test]
    fn options_are_variables_up_to_the_first_word() {
        let found = line("start --nvm=3 --mem1=256 --nets-vm=0,1 --quiet a --b=c");
        let options: Vec<(&str, &str)> =
            found.options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let expected =
            [("__mem1", "256"), ("__nets_vm", "0,1"), ("__nvm", "3"), ("__quiet", "yes")];
        assert_eq!(options, expected);
        assert_eq!(found.words, ["a", "--b=c"]);
        assert_eq!(line("mkimage --image=a=b").options["__image"], "a=b");
    }

    #[test]
    fn case_34_what_is_not_known_is_refused() {
        assert_eq!(why("start --nvmm=3"), "Unknown option --nvmm; did you mean --nvm?");
        assert_eq!(why("start --nrouter=3"), "Unknown option --nrouter; did you mean --nrouters?");
        assert_eq!(why("--nvm=3 start"), "Invalid command [--nvm=3]");
        assert_eq!(why("strat"), "Invalid command [strat]; did you mean start?");
        assert!(why("ximage --script=x a").starts_with("--script is not supported"));
        assert!(why("start --mem1x=3").starts_with("Unknown option --mem1x"));
    }

    #[test]
    fn help_is_asked_for_in_several_ways() {
        for text in ["", "help", "help_all", "-h", "--help"] {
            assert_eq!(parse(COMMANDS, &words(text)), Ok(None), "{text}");
        }
        assert!(help("xc", COMMANDS).contains("\n  stop [--now]"));
    }
}
