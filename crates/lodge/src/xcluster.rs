//! The program called as `xc` or `xcadmin`: brings to that interface the host and the daemon.

mod admin;
mod cluster;
mod hook;
mod images;
pub(crate) mod native;
mod nets;
mod programs;
mod remote;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use lodge_doors::native::wire::Client;
use lodge_doors::xcluster::grammar::{self, Line};
use lodge_doors::xcluster::settings::Settings;
use lodge_host::paths::Paths;
use lodge_host::proc::Tool;
use lodge_host::rootfs::overlay::{Runner, Search};
use lodge_spec::request::{Reply, Request};

use crate::client;
use hook::Hook;

/// One command under way.
struct Session {
    line: Line,
    settings: Settings,
}

/// Carries out one command line of `xc`, the program's name left out.
pub(crate) fn main(words: &[String]) -> Result<ExitCode> {
    run(grammar::COMMANDS, words)
}

/// The same for `xcadmin`.
pub(crate) fn admin(words: &[String]) -> Result<ExitCode> {
    run(grammar::ADMIN, words)
}

fn run(commands: &'static [grammar::Command], words: &[String]) -> Result<ExitCode> {
    match carry_out(commands, words) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) if error.downcast_ref::<std::io::Error>().is_some() => Err(error),
        Err(error) => {
            writeln!(std::io::stderr(), "ERROR: {error:#}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn carry_out(commands: &'static [grammar::Command], words: &[String]) -> Result<u8> {
    let is_xc = commands == grammar::COMMANDS;
    let hook = if is_xc { Hook::find()? } else { None };
    if let (Some(hook), Some(name)) = (&hook, words.first())
        && hook.has(name)
    {
        return hook.run(commands, words, settings);
    }
    let Some(line) = grammar::parse(commands, words).map_err(|why| anyhow!(why))? else {
        print(&grammar::help(if is_xc { "xc" } else { "xcadmin" }, commands))?;
        return hook.map_or(Ok(()), |hook| print(&hook.help())).map(|()| 0);
    };
    let settings = settings(line.options.clone())?;
    let session = Session { line, settings };
    match session.line.command.name {
        "env" => print(&session.settings.lines()).map(|()| 0),
        "completion" => session.completion(),
        "kernel_build" => session.kernel_build(),
        "busybox_build" => session.busybox_build(),
        "dropbear_build" => session.dropbear_build(),
        "iproute2_build" => session.iproute2_build(),
        "mkimage" => session.mkimage(),
        "ximage" => session.ximage(),
        "mkcdrom" => session.mkcdrom(),
        "cache" => session.cache(),
        "cached_tar" => session.cached_tar(),
        "ovld" => session.ovld(),
        "install_prog" => session.install_prog(),
        "cplib" => session.cplib(),
        "cploader" => session.cploader(),
        "libs" => session.libs(),
        "cat_tar" => session.cat_tar(),
        "env_check" | "base_archives" | "build_base" | "mkovl" | "ovlindex" => session.admin(),
        _ => runtime()?.block_on(session.with_machines()),
    }
}

/// The environment with these options, which are stronger.
fn settings(options: BTreeMap<String, String>) -> Result<Settings> {
    Ok(Settings::new(environment(), options, &callback()?, &shared()?))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Variables that are text; others cannot be told to anybody.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
}

impl Session {
    /// Commands that ask the daemon, or go to a VM.
    async fn with_machines(&self) -> Result<u8> {
        match self.line.command.name {
            "start" => self.start(cluster::Consoles::Windows).await,
            "starts" => self.start(cluster::Consoles::Tmux).await,
            "stop" => self.stop().await,
            "status" => self.status().await,
            "scaleout" => self.scaleout().await,
            "scalein" => self.scalein().await,
            "boot_vm" => self.boot_vm().await,
            "xvm" => self.one_more(cluster::Consoles::Windows).await,
            "svm" => self.one_more(cluster::Consoles::Tmux).await,
            "vm" => self.vm().await,
            "stop_vm" => self.stop_vm().await,
            "reset_vm" => self.reset_vm().await,
            "rsh" => self.rsh().await,
            "rcp" => self.rcp().await,
            "tcpdump" => self.tcpdump().await,
            "inject" => self.inject(),
            "nsadd" => self.nsadd().await,
            "nsdel" => self.nsdel().await,
            "nsenter" => self.nsenter().await,
            "br_setup" => self.br_setup().await,
            other => Err(anyhow!("{other} is in the table and nowhere else")),
        }
    }

    fn completion(&self) -> Result<u8> {
        let prefix = self.line.words.first().map_or("", String::as_str);
        let names = grammar::COMMANDS.iter().map(|c| c.name).filter(|n| n.starts_with(prefix));
        print(&names.map(|n| format!("{n}\n")).collect::<String>()).map(|()| 0)
    }

    fn search(&self) -> Search {
        Search {
            path: self.settings.ovlpath(),
            cache: self.settings.path("__cached"),
            setup: self.settings.setup(),
        }
    }

    /// How overlays' programs are run: they see every setting, and write to the places that are
    /// for writing.
    fn runner(&self) -> Result<Runner> {
        let mut env: Vec<(OsString, OsString)> =
            self.settings.environment().map(|(k, v)| (k.into(), v.into())).collect();
        let scratch = self.settings.path("XCLUSTER_TMP");
        // Overlays make their scratch below this.
        let user = self.settings.text("USER").unwrap_or("root").to_owned();
        for dir in [scratch, self.settings.path("XCLUSTER_HOME"), Path::new("/tmp").join(user)] {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        link_callback(&self.settings.path("XCLUSTER"))?;
        env.push(("PWD".into(), std::env::current_dir()?.into_os_string()));
        let mut writable: Vec<PathBuf> = ["/tmp", "/var/tmp"].map(PathBuf::from).into();
        writable.push(self.settings.path("XCLUSTER_WORKSPACE"));
        writable.push(self.settings.path("XCLUSTER_HOME"));
        writable.push(self.settings.path("XCLUSTER_TMP"));
        writable.extend(std::env::var_os("TMPDIR").map(PathBuf::from));
        Ok(Runner { env, writable, network: self.settings.flag("__network") })
    }

    async fn client(&self) -> Result<Client> {
        client::connect(&Paths::find()).await
    }

    fn word(&self, index: usize, what: &str) -> Result<&str> {
        let word = self.line.words.get(index).map(String::as_str);
        word.ok_or_else(|| anyhow!("{} needs {what}", self.line.command.name))
    }
}

/// The path by which overlays call back: named as the scripts expect it.
fn callback() -> Result<PathBuf> {
    let paths = Paths::find();
    Ok(paths.state.join("bin").join("xc"))
}

/// Makes the callback lead to this program.
fn link_callback(path: &Path) -> Result<()> {
    let own = std::env::current_exe()?;
    if std::fs::read_link(path).is_ok_and(|target| target == own) {
        return Ok(());
    }
    let dir = path.parent().context("a path")?;
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let part = dir.join(format!(".xc-{}", std::process::id()));
    std::os::unix::fs::symlink(own, &part)?;
    std::fs::rename(part, path).with_context(|| path.display().to_string())
}

/// The folder of what Lodge ships: beside the program's folder, or in the source tree.
fn shared() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own
        .ancestors()
        .skip(1)
        .flat_map(|dir| [dir.join("share/lodge/xcluster"), dir.join("guest/xcluster")]);
    let mut found = beside.take(10).filter(|dir| dir.join("ovl").is_dir());
    Ok(found.next().unwrap_or_else(|| PathBuf::from("/usr/local/share/lodge/xcluster")))
}

/// A program that works on the user's own terminal, with the user's own environment.
fn foreign(program: &str) -> Result<Tool> {
    let path = lodge_host::paths::find_program(program);
    let path = path.ok_or_else(|| anyhow!("{program} is not installed"))?;
    let mut tool = Tool::new(path);
    for (name, value) in std::env::vars_os() {
        if let Some(name) = name.to_str() {
            tool = tool.env(name, value);
        }
    }
    Ok(tool)
}

async fn ask(client: &mut Client, request: Request) -> Result<Reply> {
    Ok(client.ask(&request).await.context("asking the daemon")??)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Words for people; standard output is for data.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A sentence of the host's as an error.
pub(crate) fn told<T>(result: std::result::Result<T, String>) -> Result<T> {
    result.map_err(|why| anyhow!(why))
}
