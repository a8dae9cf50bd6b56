//! Reads Packer templates, in JSON and in HCL, as descriptions: what maps to a family of images is
//! taken over, what does not is named. Carries nothing out.

mod answers;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use self::answers::Answers;
use super::debian::is_package;
use crate::paths::open_beneath;

/// What was made of a template.
#[derive(Debug, PartialEq, Eq)]
pub struct Imported {
    /// A document for `lodge image matrix`.
    pub document: String,
    /// What was left out, and why where that is not plain.
    pub left: Vec<String>,
}

/// A disk without a unit is in MiB; this is what Packer makes where nobody says.
const USUAL_MIB: u64 = 40_960;
/// Bytes of a file of answers.
const MAX_ANSWERS: u64 = 1 << 20;
/// Fields of a builder that say how an installer runs, or what follows from Lodge's own way.
const INSTALLER: &[&str] = &[
    "iso_url",
    "iso_urls",
    "iso_checksum",
    "iso_checksum_type",
    "boot_command",
    "boot_wait",
    "http_directory",
    "http_content",
    "http_port_min",
    "http_port_max",
    "ssh_timeout",
    "ssh_wait_timeout",
    "shutdown_command",
    "headless",
    "accelerator",
    "vnc_bind_address",
    "communicator",
];

/// Imports the template in a file; `vars` are `NAME=VALUE`.
pub fn import(path: &Path, vars: &[String]) -> Result<Imported, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let json = text.trim_start().starts_with('{');
    let parsed: Result<Value, String> = match json {
        true => serde_json::from_str(&text).map_err(|e| e.to_string()),
        false => hcl::from_str(&text).map_err(|e| e.to_string()),
    };
    let template = parsed.map_err(|e| format!("{}: no Packer template: {e}", path.display()))?;
    let mut given = BTreeMap::new();
    for var in vars {
        let (name, value) =
            var.split_once('=').ok_or_else(|| format!("--var {var:?} is not NAME=VALUE"))?;
        given.insert(name.to_owned(), value.to_owned());
    }
    let template = if json { Template::json(&template) } else { Template::hcl(&template) };
    let template = template.map_err(|why| format!("{}: {why}", path.display()))?;
    template.fill(&given).import(path)
}

/// A template in either writing.
struct Template {
    variables: BTreeMap<String, String>,
    /// The name and the fields of each builder of the kind `qemu`.
    builders: Vec<(String, Map<String, Value>)>,
    provisioners: Vec<(String, Map<String, Value>)>,
    left: Vec<String>,
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// One of them, or many.
fn each(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(list) => list.iter().collect(),
        Value::Null => Vec::new(),
        other => vec![other],
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Template {
    fn json(template: &Value) -> Result<Self, String> {
        let mut left = Vec::new();
        let mut builders = Vec::new();
        for builder in each(&template["builders"]) {
            let kind = builder["type"].as_str().unwrap_or_default();
            match kind {
                "qemu" => {
                    let name = builder["name"].as_str().unwrap_or("qemu");
                    builders.push((name.to_owned(), object(builder)));
                }
                other => left.push(format!("a builder of the kind {other:?}")),
            }
        }
        let variables = object(&template["variables"]);
        let provisioners = each(&template["provisioners"]).into_iter().map(|provisioner| {
            (provisioner["type"].as_str().unwrap_or_default().to_owned(), object(provisioner))
        });
        let provisioners = provisioners.collect();
        left.extend(each(&template["post-processors"]).iter().map(|_| "a post-processor".into()));
        let variables = variables.iter().filter(|(_, v)| !v.is_null());
        let variables = variables.map(|(name, value)| (name.clone(), plain(value))).collect();
        Self { variables, builders, provisioners, left }.checked()
    }

    fn hcl(template: &Value) -> Result<Self, String> {
        let mut left = Vec::new();
        let (mut builders, mut provisioners) = (Vec::new(), Vec::new());
        for (kind, sources) in object(&template["source"]) {
            for (name, source) in object(&sources) {
                match kind.as_str() {
                    "qemu" => builders.push((name, object(&source))),
                    other => left.push(format!("the source {other}.{name}")),
                }
            }
        }
        for build in each(&template["build"]) {
            for provisioner in each(&build["provisioner"]) {
                for (kind, fields) in object(provisioner) {
                    for fields in each(&fields) {
                        provisioners.push((kind.clone(), object(fields)));
                    }
                }
            }
            left.extend(each(&build["post-processor"]).iter().map(|_| "a post-processor".into()));
        }
        let mut variables = BTreeMap::new();
        for (name, variable) in object(&template["variable"]) {
            if let Some(value) = variable.get("default").filter(|value| !value.is_null()) {
                variables.insert(name, plain(value));
            }
        }
        if template.get("locals").is_some() {
            left.push("locals".into());
        }
        Self { variables, builders, provisioners, left }.checked()
    }

    fn checked(self) -> Result<Self, String> {
        match self.builders.is_empty() {
            true => Err("it has no builder of the kind qemu".into()),
            false => Ok(self),
        }
    }

    /// Puts the values of variables in.
    fn fill(mut self, given: &BTreeMap<String, String>) -> Self {
        self.variables.extend(given.clone());
        let variables = std::mem::take(&mut self.variables);
        let all = self.builders.iter_mut().chain(&mut self.provisioners);
        for value in all.flat_map(|(_, fields)| fields.values_mut()) {
            fill(value, &variables);
        }
        self.variables = variables;
        self
    }

    fn import(mut self, path: &Path) -> Result<Imported, String> {
        let (scripts, inline) = self.provision();
        let mut document = String::from("images:\n");
        let mut left = std::mem::take(&mut self.left);
        for (name, fields) in &self.builders {
            let text = |key: &str| fields.get(key).map(plain).unwrap_or_default();
            let words =
                format!("{} {name} {} {}", text("iso_url"), text("vm_name"), path.display());
            let distro = distro(&words).unwrap_or_else(|| {
                left.push(format!("{name}: which distribution it is; `distro` is to be put in"));
                "debian12".into()
            });
            let (size, exact) = size(&text("disk_size"))
                .ok_or_else(|| format!("{name}: disk_size {:?} is no size", text("disk_size")))?;
            if !exact {
                let was = text("disk_size");
                left.push(format!(
                    "{name}: disk_size {was:?}; the disk has {size} GB of 10^9 bytes"
                ));
            }
            document += &format!("  - distro: {distro}\n    sizes: [{size}]\n");
            let answers = answers(name, fields, path.parent().unwrap_or(Path::new("")));
            left.extend(answers.left);
            let mut packages = [&inline[..], &answers.packages[..]].concat();
            packages.sort();
            packages.dedup();
            if !packages.is_empty() {
                document += &format!("    packages: {}\n", list(&packages));
            }
            if !scripts.is_empty() {
                document += &format!("    scripts: {}\n", list(&scripts));
            }
            let mut users = answers.users;
            users.entry(text("ssh_username")).or_default();
            users.retain(|user, _| !user.is_empty() && user != "root");
            if !users.is_empty() {
                let users = users.into_iter().map(|(user, keys)| {
                    let keys = match keys.is_empty() {
                        true => String::new(),
                        false => format!(", ssh_keys: {}", list(&keys)),
                    };
                    format!("{{name: {}, sudo: true{keys}}}", Value::from(user))
                });
                let users: Vec<String> = users.collect();
                document += &format!("    users: [{}]\n", users.join(", "));
            }
            left.extend(leftovers(name, fields));
        }
        if self.builders.iter().any(|(_, f)| f.get("format").is_some_and(|f| f != "qcow2")) {
            left.push("a format other than qcow2".into());
        }
        Ok(Imported { document, left })
    }

    /// Scripts, and packages that inline lines install.
    fn provision(&mut self) -> (Vec<String>, Vec<String>) {
        let (mut scripts, mut packages) = (Vec::new(), Vec::new());
        for (kind, fields) in &self.provisioners {
            if kind != "shell" {
                self.left.push(format!("a provisioner of the kind {kind:?}"));
                continue;
            }
            let listed = ["script", "scripts"].into_iter().filter_map(|key| fields.get(key));
            scripts.extend(listed.flat_map(each).map(plain).filter(|script| !script.is_empty()));
            for line in fields.get("inline").into_iter().flat_map(each).map(plain) {
                match installed(&line) {
                    Some(list) => packages.extend(list),
                    None => self.left.push(format!("an inline command: {line}")),
                }
            }
            for key in fields.keys() {
                let known = ["type", "script", "scripts", "inline"].contains(&key.as_str());
                if !known {
                    self.left.push(format!("{key} of a shell provisioner"));
                }
            }
        }
        (scripts, packages)
    }
}

/// A list as it is written on one line.
fn list(texts: &[String]) -> String {
    Value::from(texts).to_string().replace("\",\"", "\", \"")
}

/// What the files say that a builder's installer would be served, from the template itself or from a
/// folder beside it.
fn answers(builder: &str, fields: &Map<String, Value>, folder: &Path) -> Answers {
    let typed = fields
        .get("boot_command")
        .map(|typed| each(typed).into_iter().map(plain).collect::<String>());
    let mut all = Answers::default();
    for name in answers::files(&typed.unwrap_or_default()) {
        let content = fields.get("http_content").and_then(|content| {
            content.get(&name).or_else(|| content.get(format!("/{name}")))?.as_str()
        });
        let text = match (content, fields.get("http_directory")) {
            (Some(content), _) => Ok(content.to_owned()),
            (None, Some(served)) => read_beneath(&folder.join(plain(served)), &name),
            (None, None) => Err(format!("{name}: it is served from nowhere")),
        };
        match text {
            Ok(text) => {
                let answers = Answers::read(&name, &text);
                all.packages.extend(answers.packages);
                all.users.extend(answers.users);
                all.left.extend(answers.left.into_iter().map(|left| format!("{builder}: {left}")));
            }
            Err(why) => all.left.push(format!("{builder}: {why}")),
        }
    }
    all
}

fn read_beneath(folder: &Path, name: &str) -> Result<String, String> {
    let path = folder.join(name);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let file = std::fs::File::from(open_beneath(folder, &path, flags)?);
    let mut text = String::new();
    let read = file.take(MAX_ANSWERS).read_to_string(&mut text);
    read.map(|_| text).map_err(|e| format!("{}: {e}", path.display()))
}

/// What of a builder is not taken over.
fn leftovers(name: &str, fields: &Map<String, Value>) -> Vec<String> {
    let taken = ["type", "name", "vm_name", "disk_size", "format", "ssh_username"];
    let rest = fields.keys().filter(|key| !taken.contains(&key.as_str()));
    rest.map(|key| match key.as_str() {
        "ssh_password" => format!("{name}: ssh_password; nobody has a password here, give a key"),
        key if INSTALLER.contains(&key) => format!("{name}: {key}; there is no installer"),
        "memory" | "cpus" | "net_device" | "disk_interface" | "machine_type" => {
            format!("{name}: {key}; a machine says so when it is run")
        }
        key => format!("{name}: {key}"),
    })
    .collect()
}

fn fill(value: &mut Value, variables: &BTreeMap<String, String>) {
    match value {
        Value::String(text) => {
            for (name, value) in variables {
                for form in [
                    format!("{{{{user `{name}`}}}}"),
                    format!("{{{{ user `{name}` }}}}"),
                    format!("${{var.{name}}}"),
                ] {
                    *text = text.replace(&form, value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| fill(value, variables)),
        Value::Object(map) => map.values_mut().for_each(|value| fill(value, variables)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The packages of a line that does nothing but install them.
fn installed(line: &str) -> Option<Vec<String>> {
    let words: Vec<&str> =
        line.split_whitespace().filter(|w| *w != "sudo" && !w.contains('=')).collect();
    let rest = match words.as_slice() {
        ["apt-get" | "apt", rest @ ..] if rest.contains(&"install") => rest,
        _ => return None,
    };
    let names: Vec<&str> =
        rest.iter().copied().filter(|w| *w != "install" && !w.starts_with('-')).collect();
    let plain = !names.is_empty() && names.iter().all(|name| is_package(name));
    plain.then(|| names.iter().map(|name| (*name).to_owned()).collect())
}

/// Decimal gigabytes, and whether they are what was said.
fn size(text: &str) -> Option<(u64, bool)> {
    const GB: u128 = 1_000_000_000;
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number = match text.is_empty() {
        true => USUAL_MIB,
        false => text[..digits].parse::<u64>().ok()?,
    };
    // Thousands of MiB are what these sizes are called by.
    if digits == text.len() && number % 1000 == 0 && number > 0 {
        return Some((number / 1000, true));
    }
    let shift = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "M" | "MB" => 20,
        "G" | "GB" => 30,
        "T" | "TB" => 40,
        "K" | "KB" => 10,
        "B" => 0,
        _ => return None,
    };
    let bytes = u128::from(number) << shift;
    let size = u64::try_from(bytes.div_ceil(GB)).ok().filter(|size| *size > 0)?;
    Some((size, bytes.is_multiple_of(GB)))
}

/// The distribution that words speak of.
fn distro(words: &str) -> Option<String> {
    let words = words.to_lowercase();
    let number = |name: &str| {
        words.match_indices(name).find_map(|(at, _)| {
            let rest = words[at + name.len()..].trim_start_matches(['-', '_', '/']);
            let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
            (end > 0).then(|| rest[..end].trim_matches('.').to_owned())
        })
    };
    if let Some(version) = number("debian") {
        return Some(format!("debian{}", version.split('.').next().unwrap_or_default()));
    }
    let version = number("ubuntu")?;
    let short: Vec<&str> = version.splitn(3, '.').take(2).collect();
    Some(format!("ubuntu-{}-server", short.join(".")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::matrix::Matrix;

    fn imported(name: &str, text: &str, vars: &[&str]) -> Imported {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let vars: Vec<String> = vars.iter().map(|v| (*v).to_owned()).collect();
        let imported = import(&path, &vars).unwrap();
        let document = dir.path().join("matrix.yml");
        std::fs::write(&document, &imported.document).unwrap();
        Matrix::read(&document).unwrap();
        imported
    }

    const JSON: &str = r#"{
        "variables": {"disk_size": "100", "name": "image", "custom_script": "scripts/empty.sh"},
        "builders": [{
            "type": "qemu", "name": "debian12-{{user `disk_size`}}G-{{user `name`}}",
            "format": "qcow2", "disk_size": "{{user `disk_size`}}000",
            "iso_url": "https://example.org/debian-12.5.0-amd64-netinst.iso",
            "ssh_username": "slapos", "ssh_password": "slapos", "memory": 512,
            "boot_command": ["<esc>"]
        }, {"type": "virtualbox-iso"}],
        "provisioners": [
            {"type": "shell", "execute_command": "x", "scripts": ["scripts/a.sh", "{{user `custom_script`}}"]},
            {"type": "shell", "inline": ["sudo apt-get install -y curl git", "touch /x"]},
            {"type": "file", "source": "a", "destination": "b"}
        ]
    }"#;

    #[test]
    fn what_maps_is_taken_over_and_the_rest_is_named() {
        let Imported { document, left } =
            imported("t.json", JSON, &["disk_size=50", "custom_script=scripts/vm-bootstrap.sh"]);
        assert_eq!(
            document,
            "images:\n  - distro: debian12\n    sizes: [50]\n    packages: [\"curl\", \"git\"]\n    \
             scripts: [\"scripts/a.sh\", \"scripts/vm-bootstrap.sh\"]\n    users: [{name: \
             \"slapos\", sudo: true}]\n"
        );
        for words in [
            "virtualbox-iso",
            "boot_command; there is no installer",
            "ssh_password",
            "an inline command: touch /x",
            "\"file\"",
            "execute_command",
            "memory",
        ] {
            assert!(left.iter().any(|l| l.contains(words)), "{words}: {left:?}");
        }
    }

    #[test]
    fn hcl_says_the_same() {
        let hcl = r#"
            variable "disk_size" { default = "25000" }
            source "qemu" "ubuntu-22-04" {
              iso_url      = "https://example.org/ubuntu-22.04.1-live-server-amd64.iso"
              disk_size    = var.disk_size
              format       = "qcow2"
              ssh_username = "root"
            }
            build {
              sources = ["source.qemu.ubuntu-22-04"]
              provisioner "shell" { script = "a.sh" }
              provisioner "ansible" { playbook_file = "x.yml" }
            }
        "#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.pkr.hcl");
        std::fs::write(&path, hcl).unwrap();
        let Imported { document, left } = import(&path, &[]).unwrap();
        let wanted =
            "images:\n  - distro: ubuntu-22.04-server\n    sizes: [25]\n    scripts: [\"a.sh\"]\n";
        assert_eq!(document, wanted);
        assert!(left.iter().any(|l| l.contains("\"ansible\"")), "{left:?}");
    }

    #[test]
    fn what_the_installer_would_have_been_told_counts() {
        let dir = tempfile::tempdir().unwrap();
        let template = r#"{"builders": [{"type": "qemu", "name": "debian12", "disk_size": "5000",
            "http_directory": "http", "ssh_username": "ann", "boot_command":
            ["<esc>", "url=http://{{ .HTTPIP }}:{{ .HTTPPort }}/p12.cfg <enter>",
             "x={{ .HTTPPort }}/../secret.cfg <enter>"]}]}"#;
        std::fs::create_dir(dir.path().join("http")).unwrap();
        std::fs::write(dir.path().join("secret.cfg"), "d-i pkgsel/include string hidden\n")
            .unwrap();
        let preseed = "d-i pkgsel/include string htop\nd-i passwd/username string bob\n";
        std::fs::write(dir.path().join("http/p11.cfg"), preseed).unwrap();
        std::os::unix::fs::symlink("p11.cfg", dir.path().join("http/p12.cfg")).unwrap();
        let path = dir.path().join("t.json");
        std::fs::write(&path, template).unwrap();
        let Imported { document, left } = import(&path, &[]).unwrap();
        assert_eq!(
            document,
            "images:\n  - distro: debian12\n    sizes: [5]\n    packages: [\"htop\"]\n    users: \
             [{name: \"ann\", sudo: true}, {name: \"bob\", sudo: true}]\n"
        );
        assert!(left.iter().any(|l| l.contains("a link leads out of")), "{left:?}");
    }

    #[test]
    fn what_is_no_template_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for text in [
            "{",
            "{\"builders\": []}",
            "source = [",
            "{\"builders\": [{\"type\": \"qemu\", \"disk_size\": \"many\"}]}",
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(import(&path, &[]).is_err(), "{text}");
        }
        assert_eq!(size("40960M"), Some((43, false)));
        assert_eq!(size("10G"), Some((11, false)));
        assert_eq!(size("0"), None);
    }
}
