//! One command from its words to its exit status. Asks the daemon; prints data on standard output
//! and everything else on standard error, as scripts expect.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use lodge_spec::request::{Page, Refusal, Reply, Request};
use lodge_spec::state::Detail;
use serde_json::Value;

use super::build::{self, World};
use super::draft::{self, DOOR, Settings};
use super::events;
use super::grammar::{self, Lookup, One, Source, Table, Usage, Verb};
use super::one;
use super::properties::Brand;
use super::table;
use super::validate::{self, Action, Image, Images};
use super::values::{Object, has_uuid_shape, text};
use super::view::{doc_of, glance, view};
use crate::native::wire::Client;

/// What the program around it brings.
pub struct Place<'a> {
    /// As it was called.
    pub program: String,
    pub settings: Settings,
    /// Names of links, each with the network that it stands for.
    pub tags: BTreeMap<String, String>,
    /// The folder of machines' folders.
    pub zones: String,
    /// What the file system of the machines holds, in MiB.
    pub pool_mib: u64,
    pub stdin_is_terminal: bool,
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
    /// Reads a file, or standard input where it is `None`.
    pub read: &'a dyn Fn(Option<&str>) -> std::io::Result<Vec<u8>>,
    pub stdout_is_terminal: bool,
    /// A file to be read in pieces; `-` is standard input.
    pub open: &'a dyn Fn(&str) -> std::io::Result<Box<dyn Read>>,
    /// Makes a file of so many bytes for a user.
    pub store: Store<'a>,
    /// Keeps a machine's description and logs, where there is a place to keep them.
    pub archive: &'a dyn Fn(&str, &str) -> std::io::Result<()>,
}

pub type Store<'a> = &'a dyn Fn(&str, u32, &mut dyn Read, u64) -> std::io::Result<()>;

/// How a command ended.
pub enum End {
    Status(u8),
    /// A terminal is to be connected to this machine's console.
    Console(String),
}

/// What went wrong, and how the command ends for it.
#[derive(Debug)]
pub(super) enum Fault {
    /// Exit status 2, with the usage.
    Usage(String),
    /// Exit status 1.
    Error(String),
    /// Said, and no error.
    Notice(String),
    Io(std::io::Error),
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Fault::Io(error)
    }
}

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Fault::Error(why)
    }
}

impl From<Usage> for Fault {
    fn from(Usage(why): Usage) -> Self {
        Fault::Usage(why)
    }
}

pub(super) type Done = Result<End, Fault>;

/// Carries a command out. The error is about the daemon or the output, not about the command.
pub async fn run(words: &[String], client: &mut Client, place: Place<'_>) -> std::io::Result<End> {
    let mut session = Session { client, place };
    let program = session.place.program.clone();
    let (message, code) = match session.carry_out(words).await {
        Ok(end) => return Ok(end),
        Err(Fault::Io(error)) => return Err(error),
        Err(Fault::Notice(text)) => (text, 0),
        Err(Fault::Error(text)) => (text, 1),
        Err(Fault::Usage(why)) => {
            let why = if why.is_empty() { why } else { why + "\n" };
            (why + &grammar::usage(&program), 2)
        }
    };
    writeln!(session.place.stderr, "{}", message.trim_end())?;
    Ok(End::Status(code))
}

pub(super) struct Session<'a, 'b> {
    pub(super) client: &'a mut Client,
    pub(super) place: Place<'b>,
}

impl Session<'_, '_> {
    async fn carry_out(&mut self, words: &[String]) -> Done {
        let (typed, verb) = grammar::parse(words)?;
        match verb {
            Verb::Help => {
                write!(self.place.stdout, "{}", grammar::usage(&self.place.program))?;
                Ok(End::Status(0))
            }
            Verb::Create(source) => self.create(&source).await,
            Verb::Receive => super::bundle::receive(self).await,
            Verb::List(table) => self.list(&table).await,
            Verb::Lookup(asked) => self.lookup(&asked).await,
            Verb::Events { target, full, json, ready } => {
                events::follow(self, target, (full, json, ready)).await
            }
            Verb::Validate { action, brand, source } => {
                self.validate(&action, brand.as_deref(), &source).await
            }
            Verb::One { target, what } => {
                let uuid = self.resolve(&typed, &target).await?;
                one::carry_out(self, &uuid, what).await
            }
        }
    }

    pub(super) async fn ask(&mut self, request: Request) -> Result<Result<Reply, Refusal>, Fault> {
        Ok(self.client.ask(&request).await?)
    }

    pub(super) fn say(&mut self, text: &str) -> Done {
        writeln!(self.place.stderr, "{text}")?;
        Ok(End::Status(0))
    }

    pub(super) fn show(&mut self, value: &Value) -> Done {
        let text = serde_json::to_string_pretty(value).map_err(|e| e.to_string())?;
        writeln!(self.place.stdout, "{text}")?;
        Ok(End::Status(0))
    }

    /// All machines of this interface.
    pub(super) async fn all(&mut self) -> Result<Vec<Detail>, Fault> {
        let page = Page {
            door: DOOR.into(),
            owner: None,
            states: Vec::new(),
            after: None,
            limit: usize::MAX,
        };
        match self.ask(Request::Page(page)).await? {
            Ok(Reply::Page { machines, .. }) => Ok(machines),
            Ok(other) => Err(Fault::Error(format!("unexpected reply {other:?}"))),
            Err(refusal) => Err(Fault::Error(refusal.to_string())),
        }
    }

    /// A machine of this interface; `None` where there is none.
    pub(super) async fn fetch(&mut self, uuid: &str) -> Result<Option<Detail>, Fault> {
        let found = self.ask(Request::Fetch { target: uuid.to_owned() }).await?;
        match found {
            Ok(Reply::Detail { machine }) => {
                let ours = machine.origin.as_ref().is_some_and(|o| o.door == DOOR && o.id == uuid);
                Ok(ours.then_some(*machine))
            }
            Ok(_) | Err(Refusal::NotFound { .. } | Refusal::Ambiguous { .. }) => Ok(None),
            Err(refusal) => Err(Fault::Error(refusal.to_string())),
        }
    }

    /// The identity that is meant: itself, the start of it, or an alias that only one has.
    pub(super) async fn resolve(&mut self, typed: &str, target: &str) -> Result<String, Fault> {
        if has_uuid_shape(target) {
            return Ok(target.to_owned());
        }
        let docs = self.docs().await?;
        let uuid = |doc: &Object| text(doc, "uuid").unwrap_or("").to_owned();
        let meant = |doc: &&Object| {
            text(doc, "alias") == Some(target)
                || (target.len() >= 4 && uuid(doc).starts_with(target))
        };
        let found: Vec<String> = docs.iter().filter(meant).map(uuid).collect();
        match found.as_slice() {
            [one] => Ok(one.clone()),
            [] => Err(grammar::no_target(typed).into()),
            many => Err(Fault::Error(format!("\"{target}\" could be any of {}", many.join(", ")))),
        }
    }

    async fn docs(&mut self) -> Result<Vec<Object>, Fault> {
        Ok(self.all().await?.iter().filter_map(|detail| doc_of(detail).ok()).collect())
    }

    pub(super) async fn images(&mut self) -> Result<Images, Fault> {
        let list = match self.ask(Request::ImageList).await? {
            Ok(Reply::Document { value }) => value,
            Ok(_) | Err(_) => return Ok(Images::new()),
        };
        let image = |image: &Value| {
            let bytes = image["disk"]["virtual_bytes"].as_u64()?;
            let size = i64::try_from(bytes.div_ceil(1 << 20)).ok()?;
            let (name, direct) = (image["name"].as_str()?.to_owned(), image["kernel"].is_object());
            Some((image["uuid"].as_str()?.to_owned(), Image { name, size, direct }))
        };
        Ok(list.as_array().into_iter().flatten().filter_map(image).collect())
    }

    pub(super) async fn world(&mut self) -> Result<World, Fault> {
        Ok(World {
            images: self.images().await?,
            tags: self.place.tags.clone(),
            others: self.docs().await?,
            pool_mib: self.place.pool_mib,
        })
    }

    /// The text that a command works on; `verb` is what it would not do with a terminal's.
    pub(super) fn read(&mut self, source: &Source, verb: &str) -> Result<Object, Fault> {
        let file = match source {
            Source::Stdin if self.place.stdin_is_terminal => {
                return Err(Fault::Usage(format!("Will not {verb} stdin when stdin is a tty.")));
            }
            Source::Stdin => None,
            Source::File(path) => Some(path.as_str()),
        };
        let bytes = (self.place.read)(file).map_err(|error| {
            let name = file.unwrap_or("stdin");
            match error.kind() {
                std::io::ErrorKind::NotFound => format!("File: {name} does not exist."),
                _ => format!("Error reading: {name} {{\"message\":\"{error}\"}}"),
            }
        })?;
        let value: Value =
            serde_json::from_slice(&bytes).map_err(|e| format!("Invalid JSON payload: {e}"))?;
        match value {
            Value::Object(object) => Ok(object),
            _ => Err(Fault::Error("Invalid JSON payload: it is not an object".into())),
        }
    }

    /// The brand that a document names.
    fn brand(payload: &Object) -> Result<Brand, String> {
        let named = payload.get("brand").map_or("undefined".to_owned(), |brand| {
            brand.as_str().map_or_else(|| brand.to_string(), str::to_owned)
        });
        Brand::of(&named).ok_or(named)
    }

    /// Says what of a document is left out, or has no effect.
    pub(super) fn warn(&mut self, left_out: &[String], payload: &Object) -> Result<(), Fault> {
        if !left_out.is_empty() {
            let list = left_out.join(", ");
            writeln!(self.place.stderr, "Warning: these properties are left out: {list}")?;
        }
        let inert = validate::inert(payload);
        if !inert.is_empty() {
            let list = inert.join(", ");
            writeln!(self.place.stderr, "Warning: these are kept and have no effect here: {list}")?;
        }
        Ok(())
    }

    async fn create(&mut self, source: &Source) -> Done {
        let payload = self.read(source, "create from")?;
        let brand = Self::brand(&payload)
            .map_err(|named| format!("Invalid brand: \"{named}\"; known are kvm, bhyve"))?;
        let world = self.world().await?;
        validate::refuse(&validate::check(Action::Create, brand, &payload, &world.images))?;
        let (cleaned, left_out) = validate::clean(Action::Create, brand, &payload);
        self.warn(&left_out, &cleaned)?;
        let (doc, metadata) = build::create(brand, cleaned, &world)?;
        let uuid = text(&doc, "uuid").unwrap_or("").to_owned();
        let draft = draft::draft(&doc, &metadata, &world, &self.place.settings)?;
        let created = self.ask(Request::Create { draft: Box::new(draft) }).await?;
        if let Err(refusal) = created {
            let why = match refusal {
                Refusal::Taken { what, .. } if what.contains("identity") => {
                    format!("VM with UUID {uuid} already exists")
                }
                refusal => format!("Failed to create VM {uuid}: {refusal}"),
            };
            return Err(Fault::Error(why));
        }
        if super::values::is_true(&doc, "autoboot") {
            let words = grammar::BootWords::default();
            if let Err(fault) = one::start(self, &uuid, &words).await {
                let why = match fault {
                    Fault::Error(why) | Fault::Notice(why) => why,
                    other => return Err(other),
                };
                return Err(Fault::Error(format!("VM {uuid} was created, but: {why}")));
            }
        }
        self.say(&format!("Successfully created VM {uuid}"))
    }

    async fn views(&mut self) -> Result<Vec<Object>, Fault> {
        let details = self.all().await?;
        let (zones, settings) = (&self.place.zones, &self.place.settings);
        Ok(details.iter().filter_map(|detail| view(detail, zones, settings).ok()).collect())
    }

    async fn list(&mut self, asked: &Table) -> Done {
        let details = self.all().await?;
        let names = table::members(asked);
        let (zones, settings) = (&self.place.zones, &self.place.settings);
        let vms = details.iter().filter_map(|d| glance(d, &names, zones, settings).ok());
        let vms = table::shortened(vms.collect());
        write!(self.place.stdout, "{}", table::list(&vms, asked)?)?;
        Ok(End::Status(0))
    }

    async fn lookup(&mut self, asked: &Lookup) -> Done {
        let vms = table::shortened(self.views().await?);
        write!(self.place.stdout, "{}", table::lookup(&vms, asked)?)?;
        Ok(End::Status(0))
    }

    async fn validate(&mut self, action: &str, brand: Option<&str>, source: &Source) -> Done {
        let payload = self.read(source, "validate from")?;
        let found = match brand {
            Some(named) => Brand::of(named).ok_or_else(|| named.to_owned()),
            None => Self::brand(&payload),
        };
        let bad = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default();
        let brand = match found {
            Ok(brand) => brand,
            Err(named) => return Err(Fault::Error(bad(&serde_json::json!({"bad_brand": named})))),
        };
        let images = self.images().await?;
        let verdict = validate::check(Action::of(action), brand, &payload, &images);
        if !verdict.is_good() {
            return Err(Fault::Error(bad(&verdict.to_json())));
        }
        self.say(&format!("VALID '{action}' payload for {} brand VMs.", brand.as_str()))
    }
}

impl One {
    /// The word by which an unknown machine is reported.
    pub(super) fn not_found(&self, uuid: &str) -> String {
        match self {
            One::Get => format!("zoneadm: {uuid}: No such zone configured"),
            One::Start(_) => format!("Unable to start VM {uuid}: VM {uuid} not found"),
            One::Info(_) => format!("Unable to get VM info for VM {uuid}: VM {uuid} not found"),
            One::Delete => format!("Failed to delete VM {uuid}: VM {uuid} not found"),
            One::Console
            | One::Install
            | One::Kill(_)
            | One::Reboot { .. }
            | One::Reprovision(_)
            | One::Send
            | One::Stop { .. }
            | One::Sysrq(_)
            | One::Update { .. }
            | One::CreateSnapshot(_)
            | One::RollbackSnapshot(_)
            | One::DeleteSnapshot(_) => format!("VM {uuid} not found"),
        }
    }
}
