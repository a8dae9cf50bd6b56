//! The words of the command line. Knows what may be said, not what it means for a machine.

/// A mistake in the command line; the text may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Usage(pub(super) String);

/// Where a document comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Stdin,
    File(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) parsable: bool,
    /// `-H` or `-h`; what `-p` implies where absent.
    pub(super) header: Option<bool>,
    pub(super) columns: Option<Vec<String>>,
    pub(super) sort: Option<Vec<String>>,
    pub(super) filters: Vec<(String, String)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lookup {
    pub(super) json: bool,
    pub(super) unique: bool,
    pub(super) columns: Option<Vec<String>>,
    pub(super) filters: Vec<(String, String)>,
}

/// A drive for one boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Drive {
    pub(super) cdrom: bool,
    pub(super) path: String,
    pub(super) model: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BootWords {
    /// What stands after `order=`.
    pub(super) order: Option<String>,
    pub(super) drives: Vec<Drive>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Help,
    Create(Source),
    Receive,
    List(Table),
    Lookup(Lookup),
    Events {
        target: Option<String>,
        full: bool,
        json: bool,
        ready: bool,
    },
    Validate {
        action: String,
        brand: Option<String>,
        source: Source,
    },
    /// All that concern one machine.
    One {
        target: String,
        what: One,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum One {
    Console,
    Delete,
    Get,
    Info(Vec<String>),
    Install,
    Kill(String),
    Reboot { force: bool, timeout: Option<u64> },
    Reprovision(Source),
    Send,
    Start(BootWords),
    Stop { force: bool, timeout: Option<u64> },
    Sysrq(String),
    Update { operands: Vec<(String, String)>, source: Source },
    CreateSnapshot(String),
    RollbackSnapshot(String),
    DeleteSnapshot(String),
}

/// A command: its names, what follows it.
const COMMANDS: &[(&[&str], &str)] = &[
    (&["create"], "[-f <filename>]"),
    (&["create-snapshot"], "<uuid> <snapname>"),
    (&["console"], "<uuid>"),
    (&["delete", "destroy"], "<uuid>"),
    (&["delete-snapshot"], "<uuid> <snapname>"),
    (&["events"], "[-fjr] [uuid]"),
    (&["get", "json"], "<uuid>"),
    (&["info"], "<uuid> [type,...]"),
    (&["install"], "<uuid>"),
    (&["kill"], "[-s SIGNAL|-SIGNAL] <uuid>"),
    (&["list"], "[-p] [-H] [-o field,...] [-s field,...] [field=value ...]"),
    (&["lookup"], "[-j|-1] [-o field,...] [field=value ...]"),
    (&["reboot"], "<uuid> [-F] [-t timeout]"),
    (&["receive", "recv"], ""),
    (&["reprovision"], "<uuid> [-f <filename>]"),
    (&["rollback-snapshot"], "<uuid> <snapname>"),
    (&["send"], "<uuid>"),
    (&["start", "boot"], "<uuid> [option=value ...]"),
    (&["stop", "halt"], "<uuid> [-F] [-t timeout]"),
    (&["sysrq"], "<uuid> <nmi|screenshot>"),
    (&["update"], "<uuid> [-f <filename>]"),
    (&["update"], "<uuid> property=value ..."),
    (&["validate"], "create [-f <filename>]"),
    (&["validate"], "update <brand> [-f <filename>]"),
];

/// What there is to say, a command a line.
pub(super) fn usage(program: &str) -> String {
    let mut text = format!("Usage: {program} <command> [options]\n\n");
    for (names, rest) in COMMANDS {
        text.push_str(format!("{} {rest}", names[0]).trim_end());
        text.push('\n');
    }
    text.push_str(
        "\nA machine is named by its UUID, the start of it, or its alias where only one has it.\n",
    );
    text
}

/// The words after a command, sorted into flags with and without values, and operands.
struct Words {
    flags: Vec<char>,
    values: Vec<(char, String)>,
    operands: Vec<String>,
}

impl Words {
    /// `bare`: flags that stand alone; `valued`: flags that a value follows.
    fn sort(words: &[String], bare: &str, valued: &str) -> Result<Self, Usage> {
        let mut sorted = Self { flags: Vec::new(), values: Vec::new(), operands: Vec::new() };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|l| !l.is_empty()) else {
                sorted.operands.push(word.clone());
                continue;
            };
            if matches!(letters, "-verbose" | "-debug") {
                continue;
            }
            let mut rest = letters.chars();
            while let Some(letter) = rest.next() {
                if matches!(letter, 'v' | 'd') {
                    continue;
                }
                if bare.contains(letter) {
                    sorted.flags.push(letter);
                } else if valued.contains(letter) {
                    let glued: String = rest.by_ref().collect();
                    let value = if glued.is_empty() { words.next().cloned() } else { Some(glued) };
                    let missing = || Usage(format!("Option -{letter} needs a value."));
                    sorted.values.push((letter, value.ok_or_else(missing)?));
                } else {
                    return Err(Usage(format!("Unknown option: {word}")));
                }
            }
        }
        Ok(sorted)
    }

    fn has(&self, flag: char) -> bool {
        self.flags.contains(&flag)
    }

    fn value(&self, flag: char) -> Option<&String> {
        self.values.iter().rev().find(|(f, _)| *f == flag).map(|(_, value)| value)
    }

    fn list(&self, flag: char) -> Option<Vec<String>> {
        Some(self.value(flag)?.split(',').map(|word| word.trim().to_owned()).collect())
    }

    fn source(&self) -> Source {
        match self.value('f').map(String::as_str) {
            None | Some("-") => Source::Stdin,
            Some(path) => Source::File(path.to_owned()),
        }
    }

    fn timeout(&self) -> Result<Option<u64>, Usage> {
        let Some(text) = self.value('t') else { return Ok(None) };
        let wrong = |_| Usage(format!("Invalid timeout: \"{text}\" is not a number of seconds."));
        text.parse().map(Some).map_err(wrong)
    }

    /// `key=value`, or a key alone.
    fn pairs(operands: &[String]) -> Vec<(String, String)> {
        let pair = |word: &String| match word.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (word.clone(), String::new()),
        };
        operands.iter().map(pair).collect()
    }

    /// The machine, and what may follow it.
    fn target(&self, typed: &str, most: usize) -> Result<(String, Vec<String>), Usage> {
        let mut rest = self.operands.clone();
        // Words may come in any order; those with a value are not the machine.
        let at = rest.iter().position(|word| !word.contains('='));
        let target = at.map(|at| rest.remove(at)).ok_or_else(|| no_target(typed))?;
        match rest.get(most) {
            Some(odd) => Err(Usage(format!("Unexpected argument: {odd}"))),
            None => Ok((target, rest)),
        }
    }
}

pub(super) fn no_target(typed: &str) -> Usage {
    Usage(format!("Invalid or missing UUID for {typed}"))
}

/// Understands a command line, the program's name left out. The command as typed comes with it.
pub(super) fn parse(words: &[String]) -> Result<(String, Verb), Usage> {
    let is_global = |word: &&String| matches!(word.as_str(), "-v" | "--verbose" | "-d" | "--debug");
    let mut words = words.iter().skip_while(is_global).cloned();
    let typed = words.next().ok_or_else(|| Usage(String::new()))?;
    let rest: Vec<String> = words.collect();
    if matches!(typed.as_str(), "-h" | "-?" | "help" | "--help") {
        return Ok((typed, Verb::Help));
    }
    let named = COMMANDS.iter().find(|(names, _)| names.contains(&typed.as_str()));
    let Some((names, _)) = named else {
        return Err(Usage(format!("Invalid command: \"{typed}\".")));
    };
    // What was called `halt` speaks of itself as `stop`.
    let spoken = if typed == "halt" { "stop".to_owned() } else { typed };
    let verb = verb(names[0], &spoken, &rest)?;
    Ok((spoken, verb))
}

fn verb(name: &str, typed: &str, rest: &[String]) -> Result<Verb, Usage> {
    match name {
        "create" => Ok(Verb::Create(Words::sort(rest, "", "f")?.source())),
        "receive" => Words::sort(rest, "", "f").map(|_| Verb::Receive),
        "events" => {
            let words = Words::sort(rest, "fjr", "")?;
            let target = words.operands.first().cloned();
            let (full, json, ready) = (words.has('f'), words.has('j'), words.has('r'));
            Ok(Verb::Events { target, full, json, ready })
        }
        "list" => {
            let words = Words::sort(rest, "pHh", "os")?;
            let header = words.flags.iter().rev().find(|f| matches!(f, 'h' | 'H'));
            Ok(Verb::List(Table {
                parsable: words.has('p'),
                header: header.map(|flag| *flag == 'h'),
                columns: words.list('o'),
                sort: words.list('s'),
                filters: Words::pairs(&words.operands),
            }))
        }
        "lookup" => {
            let words = Words::sort(rest, "j1", "o")?;
            Ok(Verb::Lookup(Lookup {
                json: words.has('j'),
                unique: words.has('1'),
                columns: words.list('o'),
                filters: Words::pairs(&words.operands),
            }))
        }
        "validate" => validate(rest),
        "kill" => kill(rest),
        _ => {
            let (target, what) = one(name, typed, rest)?;
            Ok(Verb::One { target, what })
        }
    }
}

fn one(name: &str, typed: &str, rest: &[String]) -> Result<(String, One), Usage> {
    let many = usize::MAX;
    let words = match name {
        "reboot" | "stop" => Words::sort(rest, "F", "t")?,
        "update" | "reprovision" => Words::sort(rest, "", "f")?,
        _ => Words::sort(rest, "", "")?,
    };
    let (target, more) = words.target(
        typed,
        match name {
            "info" | "start" | "update" | "sysrq" => many,
            "send" => 1,
            _ if name.ends_with("-snapshot") => many,
            _ => 0,
        },
    )?;
    let more = more.as_slice();
    let (force, timeout) = (words.has('F'), words.timeout()?);
    let snapshot = || match more {
        [name] => Ok(name.clone()),
        _ => Err(Usage(format!("Wrong number of parameters to \"{name}\""))),
    };
    let what = match name {
        "console" => One::Console,
        "delete" => One::Delete,
        "get" => One::Get,
        "info" => {
            let types = more.iter().flat_map(|word| word.split(','));
            One::Info(types.filter(|word| !word.is_empty()).map(str::to_owned).collect())
        }
        "install" => One::Install,
        "reboot" => One::Reboot { force, timeout },
        "stop" => One::Stop { force, timeout },
        "reprovision" => One::Reprovision(words.source()),
        "send" => One::Send,
        "start" => One::Start(boot_words(more)?),
        "sysrq" => match more {
            [what] if matches!(what.as_str(), "nmi" | "screenshot") => One::Sysrq(what.clone()),
            [what] => return Err(Usage(format!("Invalid sysrq type: {what}"))),
            _ => return Err(Usage("Wrong number of parameters to \"sysrq\"".into())),
        },
        "update" => {
            if let Some(odd) = more.iter().find(|word| !word.contains('=') || word.starts_with('{'))
            {
                let why = "is not property=value; a JSON document comes with -f or on stdin";
                return Err(Usage(format!("{odd} {why}")));
            }
            One::Update { operands: Words::pairs(more), source: words.source() }
        }
        "create-snapshot" => One::CreateSnapshot(snapshot()?),
        "rollback-snapshot" => One::RollbackSnapshot(snapshot()?),
        "delete-snapshot" => One::DeleteSnapshot(snapshot()?),
        other => return Err(Usage(format!("Invalid command: \"{other}\"."))),
    };
    Ok((target, what))
}

fn boot_words(operands: &[String]) -> Result<BootWords, Usage> {
    let mut words = BootWords::default();
    for (key, value) in Words::pairs(operands) {
        match key.as_str() {
            "order" if words.order.is_some() => {
                let why = "You can only specify 'order' once when starting a VM";
                return Err(Usage(why.into()));
            }
            "order" => words.order = Some(value),
            "cdrom" | "disk" => {
                let mut parts = value.split(',');
                let part = |part: Option<&str>| part.filter(|p| !p.is_empty()).map(str::to_owned);
                let (path, model) = (part(parts.next()), part(parts.next()));
                let Some((path, model)) = path.zip(model) else {
                    return Err(Usage(format!("Parameter to {key} must be: path,model")));
                };
                words.drives.push(Drive { cdrom: key == "cdrom", path, model });
            }
            other => return Err(Usage(format!("Invalid argument to start: {other}"))),
        }
    }
    Ok(words)
}

fn validate(rest: &[String]) -> Result<Verb, Usage> {
    let words = Words::sort(rest, "", "f")?;
    let mut operands = words.operands.iter().cloned();
    let Some(action) = operands.next() else {
        return Err(Usage("Will not validate without a valid action.".into()));
    };
    let brand = operands.next();
    if action == "update" && brand.is_none() {
        return Err(Usage("Will not validate without a valid action and brand.".into()));
    }
    Ok(Verb::Validate { action, brand, source: words.source() })
}

/// `kill U`, `kill -s SIG U`, `kill -SIG U`.
fn kill(rest: &[String]) -> Result<Verb, Usage> {
    let (mut signal, mut operands) = ("TERM".to_owned(), Vec::new());
    let mut words = rest.iter();
    while let Some(word) = words.next() {
        match word.strip_prefix('-') {
            Some("s") => {
                let missing = || Usage("Option -s needs a value.".into());
                signal = words.next().cloned().ok_or_else(missing)?;
            }
            Some(name) => name.clone_into(&mut signal),
            None => operands.push(word.clone()),
        }
    }
    match operands.as_slice() {
        [target] => Ok(Verb::One { target: target.clone(), what: One::Kill(signal) }),
        [] => Err(Usage("Invalid or missing argument UUID".into())),
        _ => Err(Usage("Too many arguments.".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const U: &str = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";

    fn parse(line: &str) -> Result<Verb, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        super::parse(&words).map(|(_, verb)| verb).map_err(|Usage(why)| why)
    }

    fn one(line: &str) -> Result<One, String> {
        match parse(line)? {
            Verb::One { what, .. } => Ok(what),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_boot_line_of_the_walk() {
        let drive = |cdrom, path: &str, model: &str| Drive {
            cdrom,
            path: path.into(),
            model: model.into(),
        };
        let boot = one(&format!("boot {U} order=cd,once=d cdrom=/image.iso,ide")).unwrap();
        let words = BootWords {
            order: Some("cd,once=d".into()),
            drives: vec![drive(true, "/image.iso", "ide")],
        };
        assert_eq!(boot, One::Start(words));
        let boot = one(&format!("start disk=/debian.img,ide,more {U}")).unwrap();
        let words = BootWords { order: None, drives: vec![drive(false, "/debian.img", "ide")] };
        assert_eq!(boot, One::Start(words));
    }

    #[test]
    fn cases_4_5_6_words_that_make_no_boot() {
        for (words, why) in [
            ("cdrom=/image.iso", "Parameter to cdrom must be: path,model"),
            ("disk=,ide", "Parameter to disk must be: path,model"),
            ("order=c order=d", "You can only specify 'order' once when starting a VM"),
            ("foo=1", "Invalid argument to start: foo"),
        ] {
            assert_eq!(one(&format!("boot {U} {words}")), Err(why.into()));
        }
    }

    #[test]
    fn flags_combine_and_mistakes_are_named() {
        let Ok(Verb::List(table)) = parse("list -pH -o uuid,ram -s -ram state=running") else {
            panic!("no list")
        };
        assert!(table.parsable && table.header == Some(false));
        assert_eq!(table.columns.unwrap(), ["uuid", "ram"]);
        assert_eq!(table.filters, [("state".into(), "running".into())]);
        let Ok(Verb::Lookup(lookup)) = parse("lookup -1j alias=~x") else { panic!("no lookup") };
        assert!(lookup.unique && lookup.json);
        for (line, why) in [
            ("frobnicate", "Invalid command: \"frobnicate\"."),
            ("get", "Invalid or missing UUID for get"),
            ("json", "Invalid or missing UUID for json"),
            ("halt", "Invalid or missing UUID for stop"),
            ("list -z", "Unknown option: -z"),
            ("stop x -t abc", "Invalid timeout: \"abc\" is not a number of seconds."),
            ("sysrq x", "Wrong number of parameters to \"sysrq\""),
            ("sysrq x boom", "Invalid sysrq type: boom"),
            ("create-snapshot x", "Wrong number of parameters to \"create-snapshot\""),
            ("validate", "Will not validate without a valid action."),
            ("validate update", "Will not validate without a valid action and brand."),
            ("kill", "Invalid or missing argument UUID"),
            ("kill a b", "Too many arguments."),
        ] {
            assert_eq!(parse(line), Err(why.into()), "{line}");
        }
        let json = parse("update x {\"ram\":5}").unwrap_err();
        assert!(json.contains("is not property=value"), "{json}");
        assert_eq!(one("kill -9 x"), Ok(One::Kill("9".into())));
        assert_eq!(one("kill -s HUP x"), Ok(One::Kill("HUP".into())));
        assert_eq!(one("stop x -Ft 5"), Ok(One::Stop { force: true, timeout: Some(5) }));
        assert_eq!(parse("-v help"), Ok(Verb::Help));
    }
}
