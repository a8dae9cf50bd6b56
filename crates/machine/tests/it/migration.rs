//! Machines that come from other hosts and leave for them, as the keeper sees it.

use std::collections::BTreeMap;
use std::time::Duration;

use lodge_machine::Verb;
use lodge_machine::fake::FakeHost;
use lodge_spec::migration::{Expected, Leads, Migration, Passport, VERSION};
use lodge_spec::names::MachineId;
use lodge_spec::request::{Change, Refusal};
use lodge_spec::state::State;
use serde_json::json;

use crate::lifecycle::{ask, create, with};

const ID: &str = "5b1c7a4e-0d5f-4f6c-9d7e-2a2f4f1f0001";

fn arriving(text: &str) -> Migration {
    let draft = lodge_spec::document::parse(&format!("{{uuid: {ID}, {text}}}")).unwrap();
    let (version, passport) = (VERSION, Passport::default());
    Migration { version, draft, ready: true, bootstrap: None, passport }
}

#[tokio::test]
async fn a_machine_that_leaves_is_gone() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    let to = || "ssh://far".to_owned();
    assert!(matches!(keeper.migrate("a", to()).await, Err(Refusal::State { .. })));
    ask(&keeper, "a", Verb::Start).await.unwrap();
    host.fail_departures(true);
    let said = keeper.migrate("a", to()).await.unwrap_err().to_string();
    assert_eq!(said, "nobody takes it in");
    assert_eq!(keeper.list(true)[0].state, State::Running);
    host.fail_departures(false);
    keeper.migrate("a", to()).await.unwrap();
    assert!(keeper.list(true).is_empty());
    assert_eq!((host.live(), host.violations()), (0, Vec::<String>::new()));
    let events = keeper.store().events(None, 0, 100).await.unwrap();
    // That it stands still may be seen before or after.
    let kinds = events.iter().map(|e| e.kind.as_str()).filter(|kind| *kind != "paused");
    let kinds: Vec<&str> = kinds.collect();
    assert!(kinds.ends_with(&["migrated", "exited", "removed"]), "{kinds:?}");
}

#[tokio::test]
async fn a_machine_on_its_way_can_only_be_ended() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "{name: a, cpus: {count: 1, max: 2}}").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    host.hold_departures(true);
    let way = keeper.clone();
    let way = tokio::spawn(async move { way.migrate("a", "ssh://far".into()).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    for verb in [Verb::Pause, Verb::Stop { force: false }, Verb::Restart, Verb::Suspend] {
        let said = ask(&keeper, "a", verb).await.unwrap_err().to_string();
        assert!(said.contains("on its way to ssh://far"), "{said}");
    }
    assert!(keeper.update("a", Change::Cpus { count: 2 }).await.is_err());
    assert!(keeper.migrate("a", "ssh://other".into()).await.is_err());
    ask(&keeper, "a", Verb::Remove { force: true }).await.unwrap();
    assert!(way.await.unwrap().unwrap_err().to_string().contains("ended meanwhile"));
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_that_comes_goes_on() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    let (id, memory) = keeper.admit(arriving("name: a")).await.unwrap();
    assert_eq!((id.to_string().as_str(), memory.to_str()), (ID, Some("/memory")));
    assert_eq!(keeper.list(true)[0].state, State::Suspended);
    assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
    assert!(keeper.list(true)[0].ready, "it was there");
    // The same one twice.
    let twice = keeper.admit(arriving("name: a")).await;
    assert!(matches!(twice, Err(Refusal::Taken { .. })), "{twice:?}");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_that_cannot_come_leaves_nothing() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    let mut other = arriving("name: a");
    other.version += 1;
    assert!(keeper.admit(other).await.unwrap_err().to_string().contains("speaks version 2"));
    host.fail_departures(true);
    assert!(keeper.admit(arriving("name: a")).await.is_err());
    assert!(keeper.list(true).is_empty());
    host.fail_departures(false);
    // Somebody's address.
    let nic = "mac: '52:54:00:00:00:01', address: 10.0.2.99";
    create(&keeper, &format!("{{name: b, nics: [{{{nic}}}]}}")).await.unwrap();
    for nic in ["mac: '52:54:00:00:00:01'", "address: 10.0.2.99"] {
        let said = keeper.admit(arriving(&format!("name: a, nics: [{{{nic}}}]"))).await;
        let said = said.unwrap_err().to_string();
        assert!(said.contains("in use by machine b of this host"), "{said}");
    }
    let elsewhere = "nics: [{network: other, mac: '52:54:00:00:00:01'}]";
    let (id, _) = keeper.admit(arriving(&format!("name: a, {elsewhere}"))).await.unwrap();
    keeper.give_up(id).await;
    assert_eq!(keeper.list(true).len(), 1);
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn what_was_expected_is_different_here() {
    let (_dir, keeper) = with(FakeHost::default()).await;
    let id: MachineId = ID.parse().unwrap();
    let expected = |networks: &[&str]| Expected {
        id,
        nics: networks
            .iter()
            .map(|name| Leads { network: Some((*name).into()), wire: None })
            .collect(),
        ports: serde_json::from_value(json!([{"host": 81, "guest": 80}])).unwrap(),
        document: BTreeMap::from([("/port".into(), json!({"81": 80})), ("/x".into(), json!(1))]),
    };
    let comes = || {
        let origin = "origin: {door: d, id: a, owner: '', document: '{\"port\": {\"80\": 80}}'}";
        arriving(&format!("name: a, nics: [{{}}], ports: [{{host: 80, guest: 80}}], {origin}"))
    };
    keeper.expect(expected(&[]));
    let said = keeper.admit(comes()).await.unwrap_err().to_string();
    assert_eq!(said, "0 interfaces were prepared for it here, and it has 1");
    keeper.expect(expected(&["lab"]));
    keeper.admit(comes()).await.unwrap();
    let Ok(lodge_machine::keeper::Found::Machine(record)) = keeper.find("a") else { panic!() };
    let machine = &record.machine;
    assert_eq!((machine.nics[0].network.as_str(), machine.ports[0].host), ("lab", 81));
    assert_eq!(machine.origin.as_ref().unwrap().document, "{\"port\":{\"81\":80}}");
    // Only once.
    ask(&keeper, "a", Verb::Stop { force: true }).await.unwrap();
    ask(&keeper, "a", Verb::Remove { force: true }).await.unwrap();
    keeper.admit(comes()).await.unwrap();
    let Ok(lodge_machine::keeper::Found::Machine(record)) = keeper.find("a") else { panic!() };
    assert_eq!(record.machine.ports[0].host, 80);
}
