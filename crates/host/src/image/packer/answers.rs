//! The answers that a template's installer would be served: what of a Debian preseed file or of an
//! Ubuntu autoinstall file maps to an image. Knows no templates; carries nothing out.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::image::debian::is_package;

/// What answers say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answers {
    pub(super) packages: Vec<String>,
    /// Names, each with the keys that let it in.
    pub(super) users: BTreeMap<String, Vec<String>>,
    /// What was left out.
    pub(super) left: Vec<String>,
}

/// The files that words typed to a boot loader ask the template's server for.
pub(super) fn files(typed: &str) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for (at, port) in typed.match_indices(".HTTPPort") {
        let rest = typed[at + port.len()..].trim_start();
        let Some(rest) = rest.strip_prefix("}}/") else { continue };
        let ends = |c: char| c.is_whitespace() || matches!(c, '<' | '"' | '\'' | ';' | '\\');
        let path = &rest[..rest.find(ends).unwrap_or(rest.len())];
        // A folder is that of cloud-init's files.
        let path = match path.is_empty() || path.ends_with('/') {
            true => format!("{path}user-data"),
            false => path.to_owned(),
        };
        if !files.contains(&path) {
            files.push(path);
        }
    }
    files
}

impl Answers {
    /// Reads a file by what is in it.
    pub(super) fn read(name: &str, text: &str) -> Self {
        let begins = |words: &[&str]| {
            text.lines().any(|line| words.iter().any(|word| line.trim_start().starts_with(word)))
        };
        if begins(&["autoinstall:"]) {
            return Self::autoinstall(name, text);
        }
        if begins(&["d-i ", "d-i\t", "tasksel ", "tasksel\t"]) {
            return Self::preseed(name, text);
        }
        let left = vec![format!("{name}: neither a preseed file nor an autoinstall file")];
        Self { left, ..Self::default() }
    }

    fn add_packages<'a>(&mut self, name: &str, words: impl Iterator<Item = &'a str>) {
        for word in words {
            match is_package(word) {
                true => self.packages.push(word.to_owned()),
                false => self.left.push(format!("{name}: {word:?} is not the name of a package")),
            }
        }
    }

    /// `OWNER QUESTION KIND ANSWER`, a line each; a backslash goes on with the next one.
    fn preseed(name: &str, text: &str) -> Self {
        let mut answers = Self::default();
        let mut others = 0;
        let whole = text.replace("\\\r\n", " ").replace("\\\n", " ");
        for line in whole.lines().map(str::trim) {
            let mut words = line.split_whitespace();
            let (Some(owner), Some(question)) = (words.next(), words.next()) else { continue };
            if owner.starts_with('#') {
                continue;
            }
            let value: Vec<&str> = words.skip(1).collect();
            match question {
                "pkgsel/include" => {
                    let list = value.iter().flat_map(|word| word.split(','));
                    answers.add_packages(name, list.filter(|word| !word.is_empty()));
                }
                "tasksel/first" => {
                    for task in value.join(" ").split(',').map(str::trim) {
                        match task {
                            "" | "minimal" => {}
                            "ssh-server" | "openssh-server" => {
                                answers.packages.push("openssh-server".into());
                            }
                            task => answers
                                .left
                                .push(format!("{name}: the task {task}; name its packages")),
                        }
                    }
                }
                "passwd/username" => {
                    answers.users.extend(value.first().map(|user| ((*user).to_owned(), vec![])));
                }
                "preseed/late_command" | "preseed/early_command" => {
                    answers.left.push(format!("{name}: {question}: {}", value.join(" ")));
                }
                _ => others += 1,
            }
        }
        answers.others(name, others);
        answers
    }

    fn autoinstall(name: &str, text: &str) -> Self {
        let mut answers = Self::default();
        let parsed: Result<Value, _> = serde_saphyr::from_str(text);
        let value = match &parsed {
            Ok(value) => &value["autoinstall"],
            Err(error) => {
                answers.left.push(format!("{name}: no YAML: {error}"));
                return answers;
            }
        };
        let texts = |value: &Value| -> Vec<String> {
            let list = value.as_array().into_iter().flatten();
            list.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        answers.add_packages(name, texts(&value["packages"]).iter().map(String::as_str));
        if value["ssh"]["install-server"] == true {
            answers.packages.push("openssh-server".into());
        }
        if let Some(user) = value["identity"]["username"].as_str() {
            answers.users.insert(user.to_owned(), texts(&value["ssh"]["authorized-keys"]));
        }
        let mut others = 0;
        for key in value.as_object().into_iter().flat_map(serde_json::Map::keys) {
            match key.as_str() {
                "packages" | "identity" | "ssh" | "version" => {}
                "late-commands" | "early-commands" | "user-data" | "snaps" => {
                    answers.left.push(format!("{name}: {key}"));
                }
                _ => others += 1,
            }
        }
        answers.others(name, others);
        answers
    }

    fn others(&mut self, name: &str, count: usize) {
        if count > 0 {
            self.left.push(format!("{name}: {count} other answers; there is no installer"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_installer_would_be_served_is_found() {
        let typed = "<esc>auto preseed/url=http://{{ .HTTPIP }}:{{ .HTTPPort }}/preseed-a.cfg \
                     <enter> ks={{.HTTPPort}}/b.cfg<enter> {{ .HTTPPort }}/preseed-a.cfg";
        assert_eq!(files(typed), ["preseed-a.cfg", "b.cfg"]);
        let typed = "ds=nocloud-net\\;seedfrom=http://{{ .HTTPIP }}:{{ .HTTPPort }}/ quiet";
        assert_eq!(files(typed), ["user-data"]);
        assert_eq!(files("<enter>"), Vec::<String>::new());
    }

    #[test]
    fn answers_for_debians_installer() {
        let text = "# a comment\nd-i debian-installer/locale string en_US\n\
                    d-i passwd/username string ann\n\
                    tasksel tasksel/first multiselect standard, ssh-server\n\
                    d-i pkgsel/include string curl, \\\n  vim-tiny x/y\n\
                    d-i preseed/late_command string in-target touch /x\n";
        let answers = Answers::read("p.cfg", text);
        assert_eq!(answers.packages, ["openssh-server", "curl", "vim-tiny"]);
        assert_eq!(answers.users.keys().collect::<Vec<_>>(), ["ann"]);
        let left = [
            "p.cfg: the task standard; name its packages",
            "p.cfg: \"x/y\" is not the name of a package",
            "p.cfg: preseed/late_command: in-target touch /x",
            "p.cfg: 1 other answers; there is no installer",
        ];
        assert_eq!(answers.left, left);
    }

    #[test]
    fn answers_for_ubuntus_installer() {
        let text = "#cloud-config\nautoinstall:\n  version: 1\n  identity: {username: ann, \
                    hostname: h, password: x}\n  ssh: {install-server: true, authorized-keys: \
                    [ssh-ed25519 A]}\n  packages: [curl]\n  storage: {layout: {name: direct}}\n  \
                    late-commands: [poweroff]\n";
        let answers = Answers::read("user-data", text);
        assert_eq!(answers.packages, ["curl", "openssh-server"]);
        assert_eq!(answers.users["ann"], ["ssh-ed25519 A"]);
        let left =
            ["user-data: late-commands", "user-data: 1 other answers; there is no installer"];
        assert_eq!(answers.left, left);
    }

    proptest::proptest! {
        #[test]
        fn no_answers_make_it_panic(text: String) {
            files(&text);
            Answers::read("x", &text);
            Answers::preseed("x", &text);
            Answers::autoinstall("x", &text);
        }
    }

    #[test]
    fn what_is_neither_is_named() {
        let left = &Answers::read("ks.cfg", "%packages\n@core\n").left;
        assert_eq!(left, &["ks.cfg: neither a preseed file nor an autoinstall file"]);
    }
}
