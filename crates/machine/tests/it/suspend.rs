//! Machines whose memory is saved: there and back, and what may go wrong between.

use std::time::Duration;

use lodge_machine::fake::FakeHost;
use lodge_machine::{Seen, Verb};
use lodge_spec::request::{Change, Condition, OneBoot, Refusal};
use lodge_spec::state::State;

use crate::lifecycle::{ask, create, keeper, with};

const KILL: Verb = Verb::Stop { force: true };

#[tokio::test]
async fn a_machine_goes_on_where_it_was() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "{name: a, cpus: {count: 1, max: 2}}").await.unwrap();
    assert!(matches!(ask(&keeper, "a", Verb::Suspend).await, Err(Refusal::State { .. })));
    let id = keeper.list(true)[0].id;
    ask(&keeper, "a", Verb::Start).await.unwrap();
    host.report(id, Seen::Ready);
    keeper.wait("a", Condition::Ready, None).await.unwrap();
    assert_eq!(ask(&keeper, "a", Verb::Suspend).await, Ok(State::Suspended));
    assert_eq!(ask(&keeper, "a", Verb::Suspend).await, Ok(State::Suspended));
    assert_eq!((host.live(), host.saved()), (0, 1));
    assert!(!keeper.list(true)[0].ready);
    for verb in [Verb::Stop { force: false }, Verb::Restart, Verb::Pause, Verb::Reset] {
        let refused = ask(&keeper, "a", verb).await;
        assert!(matches!(refused, Err(Refusal::State { .. })), "{verb:?}: {refused:?}");
    }
    let change = keeper.update("a", Change::Cpus { count: 2 }).await;
    assert!(matches!(change, Err(Refusal::State { .. })), "{change:?}");
    let once = keeper.boot("a", OneBoot::default()).await;
    assert!(matches!(once, Err(Refusal::State { .. })), "{once:?}");
    assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
    assert!(keeper.list(true)[0].ready, "it was when it was suspended");
    assert_eq!(host.saved(), 0);
    // What stood still can be suspended too; resuming is as good as starting.
    ask(&keeper, "a", Verb::Pause).await.unwrap();
    assert_eq!(ask(&keeper, "a", Verb::Suspend).await, Ok(State::Suspended));
    assert_eq!(ask(&keeper, "a", Verb::Resume).await, Ok(State::Running));
    assert_eq!(host.violations(), Vec::<String>::new());
}

/// The daemon that comes after finds what is suspended, and what another left half done.
#[test]
fn saved_memory_outlives_the_daemon() {
    let (dir, host) = (tempfile::tempdir().unwrap(), FakeHost::default());
    let daemon = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    daemon().block_on(async {
        let keeper = keeper(dir.path(), &host).await;
        create(&keeper, "name: a").await.unwrap();
        ask(&keeper, "a", Verb::Start).await.unwrap();
        ask(&keeper, "a", Verb::Suspend).await.unwrap();
        create(&keeper, "name: b").await.unwrap();
        ask(&keeper, "b", Verb::Start).await.unwrap();
        // Its memory is never saved while this daemon is there.
        host.hold_saves(true);
        let waiting = ask(&keeper, "b", Verb::Suspend);
        assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err());
        assert_eq!(keeper.list(true)[1].state, State::Stopping);
    });
    host.hold_saves(false);
    daemon().block_on(async {
        let keeper = keeper(dir.path(), &host).await;
        keeper.wait("b", Condition::Stopped, None).await.unwrap();
        let states: Vec<_> = keeper.list(true).iter().map(|s| s.state).collect();
        assert_eq!(states, [State::Suspended, State::Suspended]);
        for name in ["a", "b"] {
            assert_eq!(ask(&keeper, name, Verb::Start).await, Ok(State::Running));
        }
    });
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn saved_memory_is_given_up_by_force_only() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    ask(&keeper, "a", Verb::Suspend).await.unwrap();
    assert_eq!(ask(&keeper, "a", KILL).await, Ok(State::Stopped));
    assert_eq!(host.saved(), 0);
    assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_saved_runs_on() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    host.fail_saves(true);
    let refused = ask(&keeper, "a", Verb::Suspend).await.unwrap_err();
    assert_eq!(refused.to_string(), "told to fail");
    let running = Condition::Running;
    keeper.wait("a", running, None).await.unwrap();
    assert_eq!(ask(&keeper, "a", Verb::Pause).await, Ok(State::Paused));
    assert!(ask(&keeper, "a", Verb::Suspend).await.is_err());
    assert_eq!(keeper.list(true)[0].state, State::Paused, "it stood still before");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_start_that_fails_keeps_the_memory() {
    let host = FakeHost::default();
    let (_dir, keeper) = with(host.clone()).await;
    create(&keeper, "name: a").await.unwrap();
    ask(&keeper, "a", Verb::Start).await.unwrap();
    ask(&keeper, "a", Verb::Suspend).await.unwrap();
    host.fail_launches(true);
    let refused = ask(&keeper, "a", Verb::Start).await.unwrap_err();
    assert_eq!(refused.to_string(), "told to fail");
    let list = keeper.list(true);
    assert_eq!(
        (list[0].state, list[0].reason.as_deref()),
        (State::Suspended, Some("told to fail"))
    );
    assert_eq!(host.saved(), 1);
    host.fail_launches(false);
    assert_eq!(ask(&keeper, "a", Verb::Start).await, Ok(State::Running));
    assert_eq!(host.violations(), Vec::<String>::new());
}
