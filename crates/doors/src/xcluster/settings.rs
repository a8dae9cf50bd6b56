//! Where things are and how they are called: the environment with its defaults. Reads no variable
//! itself and makes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The environment and the options, which are stronger.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    vars: BTreeMap<String, String>,
    /// Names whose values are defaults, printed by `env`.
    defaults: Vec<&'static str>,
}

impl Settings {
    /// `program` is the path by which overlays call back; `shared` the folder of what Lodge ships.
    pub fn new(
        env: impl IntoIterator<Item = (String, String)>,
        options: BTreeMap<String, String>,
        program: &Path,
        shared: &Path,
    ) -> Self {
        let mut vars: BTreeMap<String, String> = env.into_iter().collect();
        vars.extend(options);
        // A call out of an overlay goes to the program that called the overlay.
        vars.insert("XCLUSTER".into(), program.display().to_string());
        let mut own = Self { vars, defaults: Vec::new() };
        let home = own.text("HOME").unwrap_or("/").to_owned();
        own.vars.entry("USER".into()).or_insert_with(|| "root".into());
        own.default("XCLUSTER", String::new());
        own.default("XCLUSTER_WORKSPACE", format!("{home}/xcluster/workspace"));
        let workspace = own.value("XCLUSTER_WORKSPACE");
        own.default("XCLUSTER_HOME", format!("{workspace}/xcluster"));
        let tmp = match own.text("XCLUSTER_NETNS") {
            Some(name) => format!("{workspace}/{name}/tmp"),
            None => format!("{workspace}/tmp"),
        };
        own.default("XCLUSTER_TMP", tmp);
        own.default("XCLUSTER_OVLPATH", format!("{}/ovl", shared.display()));
        own.default("XCLUSTER_TELNET_BASE", "12000".into());
        own.default("XCLUSTER_SSH_BASE", "12300".into());
        own.default("ARCHIVE", format!("{home}/Downloads"));
        own.default("KERNELDIR", format!("{workspace}/linux"));
        own.default("__kver", "linux-6.1".into());
        let (kver, own_home) = (own.value("__kver"), own.value("XCLUSTER_HOME"));
        own.default("__kobj", format!("{own_home}/obj-{kver}"));
        own.default("__kcfg", format!("{workspace}/config/{kver}"));
        own.default("__kbin", format!("{own_home}/bzImage-{kver}"));
        own.default("__bbver", "busybox-1.36.1".into());
        own.default("__dropbearver", "2024.85".into());
        own.default("__ipver", "6.9.0".into());
        own.default("__image", format!("{own_home}/hd.img"));
        own.default("__cached", format!("{own_home}/cache"));
        own.default("__base_libs", format!("{own_home}/base-libs.txt"));
        own.default("__cdrom", format!("{}/cdrom.iso", own.value("XCLUSTER_TMP")));
        own.default("__loader", "/lib64/ld-linux-x86-64.so.2".into());
        own.default("__mem", "128".into());
        own.default("__smp", "2".into());
        own.default("__nets_vm", "0,1".into());
        own.default("__nets_router", "0,1,2".into());
        own.default("__ipv4_base", "172.30.0.0/24".into());
        own.default("__ipv6_prefix", "fd00:1723::".into());
        own.defaults.sort_unstable();
        own
    }

    fn default(&mut self, name: &'static str, value: String) {
        let found = self.vars.entry(name.into()).or_default();
        if found.is_empty() {
            *found = value;
        }
        self.defaults.push(name);
    }

    /// A variable; an empty one is none.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    fn value(&self, name: &str) -> String {
        self.text(name).unwrap_or_default().to_owned()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.value(name).into()
    }

    pub fn flag(&self, name: &str) -> bool {
        self.text(name).is_some_and(|v| v != "no")
    }

    /// A number, or the default; the complaint names the option.
    pub fn number(&self, name: &str, default: u64) -> Result<u64, String> {
        let Some(text) = self.text(name) else { return Ok(default) };
        text.parse().map_err(|_| {
            let option = name.trim_start_matches("__").replace('_', "-");
            format!("--{option}: {text:?} is not a number")
        })
    }

    /// Folders of overlays.
    pub fn ovlpath(&self) -> Vec<PathBuf> {
        let text = self.value("XCLUSTER_OVLPATH");
        text.split(':').filter(|p| !p.is_empty()).map(PathBuf::from).collect()
    }

    /// Variants of overlays, the first the strongest.
    pub fn setup(&self) -> Vec<String> {
        let text = self.value("SETUP");
        text.split(',').filter(|p| !p.is_empty()).map(str::to_owned).collect()
    }

    /// What programs of overlays get: everything.
    pub fn environment(&self) -> impl Iterator<Item = (&str, &str)> {
        self.vars.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The settings with a default, for a shell to read.
    pub fn lines(&self) -> String {
        let line = |name: &&str| format!("{name}='{}'\n", self.vars[*name].replace('\'', "'\\''"));
        self.defaults.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(env: &[(&str, &str)], options: &[(&str, &str)]) -> Settings {
        let own = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
            list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        Settings::new(own(env), own(options), Path::new("/bin/xc"), Path::new("/share"))
    }

    #[test]
    fn options_are_stronger_than_variables_and_both_than_defaults() {
        let env = [("HOME", "/h"), ("__kver", "linux-6.6"), ("__mem", "64"), ("__image", "")];
        let own = settings(&env, &[("__mem", "256")]);
        assert_eq!(
            own.path("__kbin"),
            Path::new("/h/xcluster/workspace/xcluster/bzImage-linux-6.6")
        );
        assert_eq!(own.number("__mem", 1), Ok(256));
        assert_eq!(own.path("__image"), Path::new("/h/xcluster/workspace/xcluster/hd.img"));
        assert_eq!(own.number("__nvm", 4), Ok(4));
        let odd = settings(&[("__nvm", "many")], &[]);
        assert_eq!(odd.number("__nvm", 4), Err("--nvm: \"many\" is not a number".into()));
    }

    #[test]
    fn env_is_for_a_shell_to_read() {
        let text = settings(&[("HOME", "/h"), ("ARCHIVE", "/it's"), ("__nvm", "3")], &[]).lines();
        assert!(
            text.contains("\nXCLUSTER='/bin/xc'\n") || text.starts_with("XCLUSTER='/bin/xc'\n")
        );
        assert!(text.contains("ARCHIVE='/it'\\''s'\n"));
        assert!(!text.contains("__nvm="));
        let mut sorted: Vec<&str> = text.lines().collect();
        sorted.sort_unstable();
        assert!(text.lines().eq(sorted));
    }
}
