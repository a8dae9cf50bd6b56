//! Machines from creation to removal, through crashes of the guest, the hypervisor and the daemon.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lodge_machine::fake::FakeHost;
use lodge_machine::{Keeper, Seen, Store, Verb};
use lodge_spec::document;
use lodge_spec::request::{Change, Condition, Refusal};
use lodge_spec::state::State;

pub(crate) type Fake = Arc<Keeper<FakeHost>>;

pub(crate) async fn keeper(dir: &Path, host: &FakeHost) -> Fake {
    let store = Store::open(dir).unwrap();
    Keeper::open(store, Arc::new(host.clone()), false).await.unwrap()
}

pub(crate) async fn with(host: FakeHost) -> (tempfile::TempDir, Fake) {
    let dir = tempfile::tempdir().unwrap();
    let keeper = keeper(dir.path(), &host).await;
    (dir, keeper)
}

pub(crate) async fn create(keeper: &Fake, text: &str) -> Result<(), Refusal> {
    keeper.create(document::parse(text).unwrap()).await.map(drop)
}

pub(crate) async fn ask(keeper: &Fake, name: &str, verb: Verb) -> Result<State, Refusal> {
    keeper.ask(name, verb, Some(Duration::from_millis(50))).await.map(|s| s.state)
}

const STOP: Verb = Verb::Stop { force: false };

#[tokio::test]
async fn a_machine_goes_round() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    for _ in 0..3 {
        assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
        assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
        assert_eq!(ask(&keeper, "a", Verb::Pause).await, Ok(State::Paused));
        assert!(matches!(ask(&keeper, "a", Verb::Start).await, Err(Refusal::State { .. })));
        assert_eq!(ask(&keeper, "a", Verb::Resume).await, Ok(State::Running));
        assert_eq!(ask(&keeper, "a", Verb::Restart).await, Ok(State::Running));
        assert_eq!(ask(&keeper, "a", STOP).await, Ok(State::Stopped));
        assert_eq!(ask(&keeper, "a", STOP).await, Ok(State::Stopped));
    }
    ask(&keeper, "a", Verb::Start).await.unwrap();
    let gently = ask(&keeper, "a", Verb::Remove { force: false }).await;
    assert!(matches!(gently, Err(Refusal::State { .. })));
    ask(&keeper, "a", Verb::Remove { force: true }).await.unwrap();
    assert!(keeper.list(true).is_empty());
    assert!(matches!(ask(&keeper, "a", STOP).await, Err(Refusal::NotFound { .. })));
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_deaf_guest_is_ended_when_its_time_is_over() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    host.set_deaf(true);
    assert_eq!(ask(&keeper, "a", STOP).await, Ok(State::Stopped));
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn names_identities_and_ports_are_unique() {
    let (_dir, keeper) = with(FakeHost::default()).await;
    create(&keeper, "{name: web, ports: ['8080:80']}").await.unwrap();
    create(&keeper, "{name: api, ports: ['0.0.0.0:8080:80']}").await.unwrap();
    let refusal = create(&keeper, "name: web").await.unwrap_err();
    assert!(refusal.to_string().starts_with("the name web is already in use by machine "));
    ask(&keeper, "web", Verb::Start).await.unwrap();
    let refusal = ask(&keeper, "api", Verb::Start).await.unwrap_err();
    assert_eq!(refusal.to_string(), "host port 0.0.0.0:8080/tcp is already in use by machine web");
    let refusal = ask(&keeper, "wbe", STOP).await.unwrap_err();
    assert_eq!(refusal.to_string(), "there is no machine wbe; did you mean web?");
}

#[tokio::test]
async fn failures_are_told_and_restarted_by_policy() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "{name: a, restart: {policy: on-failure, max: 1}}").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    let id = keeper.list(true)[0].id;
    let mut events = keeper.subscribe();
    let mut until = async |kind: &str| while events.recv().await.unwrap().kind != kind {};
    host.kill(id, "signal 9");
    until("exited").await;
    until("restart-due").await;
    until("running").await;
    host.report(id, Seen::Panicked("Kernel panic - not syncing: test".into()));
    until("guest-panic").await;
    until("exited").await;
    // The second failure in a row is one more than the policy forgives.
    let failed = keeper.wait("a", Condition::Ready, None).await.unwrap_err();
    assert_eq!(failed.to_string(), "Kernel panic - not syncing: test");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_launch_that_fails_leaves_nothing_and_says_why() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    host.fail_launches(true);
    let refusal = ask(&keeper, "a", Verb::Start).await.unwrap_err();
    assert_eq!(refusal.to_string(), "told to fail");
    assert_eq!(keeper.list(true)[0].state, State::Failed);
    host.fail_launches(false);
    ask(&keeper, "a", Verb::Start).await.unwrap();
    assert_eq!(host.violations(), Vec::<String>::new());
}

/// What a daemon killed at any moment leaves behind: only its store and the host's processes.
#[test]
fn daemons_come_and_go_and_guests_stay() {
    let dir = tempfile::tempdir().unwrap();
    let host = FakeHost::default();
    let daemon = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = daemon();
    first.block_on(async {
        let keeper = keeper(dir.path(), &host).await;
        for name in ["a", "b", "c"] {
            create(&keeper, &format!("name: {name}")).await.unwrap();
            ask(&keeper, name, Verb::Start).await.unwrap();
        }
        ask(&keeper, "b", Verb::Pause).await.unwrap();
    });
    drop(first);
    let gone = {
        let store = daemon().block_on(async {
            let keeper = keeper(dir.path(), &host).await;
            let ids: Vec<_> = keeper.list(true).iter().map(|s| s.id).collect();
            keeper.wait("a", Condition::Running, None).await.unwrap();
            ids
        });
        store[2]
    };
    host.kill(gone, "out of memory");
    let third = daemon();
    third.block_on(async {
        let keeper = keeper(dir.path(), &host).await;
        keeper.wait("c", Condition::Stopped, None).await.unwrap();
        let states: Vec<_> = keeper.list(true).iter().map(|s| s.state).collect();
        assert_eq!(states, [State::Running, State::Paused, State::Failed]);
        assert_eq!(ask(&keeper, "b", Verb::Resume).await, Ok(State::Running));
        for name in ["a", "b"] {
            assert_eq!(ask(&keeper, name, STOP).await, Ok(State::Stopped));
        }
    });
    assert_eq!(host.live(), 0);
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn two_daemons_do_not_share_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Store::open(dir.path()).unwrap();
    let second = Store::open(dir.path()).err().unwrap().to_string();
    assert!(second.ends_with("is in use by another lodge daemon"), "{second}");
}

#[tokio::test]
async fn one_damaged_record_does_not_stop_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let host = FakeHost::default();
    let first = keeper(dir.path(), &host).await;
    for name in ["a", "b"] {
        create(&first, &format!("name: {name}")).await.unwrap();
    }
    let spoil = |c: &rusqlite::Connection| {
        c.execute("UPDATE machines SET record = substr(record, 1, 90) WHERE name = 'a'", [])
    };
    first.store().write(spoil).await.unwrap();
    drop(first);
    // The machines' tasks hold the store; give them up as the end of the process would.
    let copy = tempfile::tempdir().unwrap();
    for file in ["lodge.db", "lodge.db-wal"] {
        std::fs::copy(dir.path().join(file), copy.path().join(file)).unwrap();
    }
    let second = keeper(copy.path(), &host).await;
    let states: Vec<_> = second.list(true).iter().map(|s| s.state).collect();
    assert_eq!(states, [State::Broken, State::Created]);
    let reason = second.list(true)[0].reason.clone().unwrap();
    assert!(reason.starts_with("the record is unreadable: "), "{reason}");
    assert!(matches!(ask(&second, "a", Verb::Start).await, Err(Refusal::State { .. })));
    ask(&second, "b", Verb::Start).await.unwrap();
    ask(&second, "a", Verb::Remove { force: false }).await.unwrap();
    assert_eq!(second.list(true).len(), 1);
}

#[tokio::test]
async fn changes_are_checked_and_kept() {
    let (_dir, keeper) = with(FakeHost::default()).await;
    create(&keeper, "{name: a, cpus: {count: 1, max: 4}}").await.unwrap();
    let summary = keeper.update("a", Change::Cpus { count: 3 }).await.unwrap();
    assert_eq!(summary.cpus, 3);
    let refusal = keeper.update("a", Change::Cpus { count: 9 }).await.unwrap_err();
    assert!(refusal.to_string().contains("less than the 9 CPUs"), "{refusal}");
    let refusal = keeper.update("a", Change::RemoveDisk { name: "x".into() }).await.unwrap_err();
    assert_eq!(refusal.to_string(), "disks: there is none named x");
}

#[tokio::test]
async fn an_ephemeral_machine_is_gone_when_it_ends() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "{name: a, ephemeral: true}").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    ask(&keeper, "a", STOP).await.unwrap();
    keeper.wait("a", Condition::Stopped, None).await.ok();
    while !keeper.list(true).is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(host.violations(), Vec::<String>::new());
}
