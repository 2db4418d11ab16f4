//! When a child starts, when it is started again, and how it is stopped. Pure: time is an argument.
//!
//! One [`Lifecycle`] per child: what happens is told to it by its methods, what to do is asked of
//! it by [`Lifecycle::next_action`] until it answers `None`; [`Lifecycle::deadline`] says when to
//! ask again if nothing happens before.
//!
//! A child that was well comes back at once. One that dies again soon comes back after a pause
//! that doubles; the pause stays short as long as it gets ready each time, because then it is of
//! use between its deaths.
//!
//! Invariant: `Start` is answered only while there is no process, and a stop always ends: asked,
//! then SIGTERM, then SIGKILL, then given up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How soon a dead child is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Pause after the second death in a row; it doubles from there. After the first: none.
    pub first: Duration,
    /// The longest pause for a child that dies before it is ready.
    pub longest: Duration,
    /// The longest pause for a child that gets ready each time.
    pub longest_when_ready: Duration,
    /// A child that was ready for so long has its earlier deaths forgiven.
    pub good_life: Duration,
    /// So many deaths in a row before getting ready are a crash loop.
    pub crash_loop: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(50),
            longest: Duration::from_secs(30),
            longest_when_ready: Duration::from_secs(1),
            good_life: Duration::from_secs(10),
            crash_loop: 5,
        }
    }
}

/// How long a stop may take. Together with the two waits for SIGKILL to take effect the defaults
/// add up to 9 s: the agent has promised to be gone within 10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// From asking the node to SIGKILL.
    pub node: Duration,
    /// From asking the other children to SIGKILL.
    pub others: Duration,
    /// From SIGKILL to giving up: a process may be stuck in the kernel.
    pub kill: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            node: Duration::from_secs(4),
            others: Duration::from_secs(3),
            kill: Duration::from_secs(1),
        }
    }
}

/// What to do about a child now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Start a process; then say `started` or `ended`.
    Start,
    /// Tell it to stop.
    Ask,
    /// Send SIGTERM.
    Terminate,
    /// Send SIGKILL.
    Kill,
}

/// What shall follow a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// A new process.
    Restart,
    /// Nothing: the child is no longer wanted.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No process until then.
    Waiting { until: Instant },
    /// A process that nobody asked to end.
    Running {
        ready_since: Option<Instant>,
        /// When to kill it, for what it did.
        kill_at: Option<Instant>,
    },
    /// A process that is to end; `next` is due `at`.
    Stopping {
        since: Instant,
        next: Step,
        at: Instant,
        then: Then,
    },
    /// No process and none to come.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Ask,
    Terminate,
    Kill,
    GiveUp,
    Nothing,
}

/// The life of one child through all its processes.
#[derive(Clone, Debug)]
pub(super) struct Lifecycle {
    backoff: Backoff,
    patience: Duration,
    kill_patience: Duration,
    phase: Phase,
    /// Deaths in a row without a good life between them.
    deaths: u32,
    /// Deaths in a row before getting ready.
    unready_deaths: u32,
    /// Processes started after the first.
    restarts: u64,
    has_started: bool,
}

impl Lifecycle {
    /// A child to be started at once. A stop of it takes `patience` until SIGKILL and
    /// `kill_patience` more until it is given up.
    pub(super) fn new(
        backoff: Backoff,
        patience: Duration,
        kill_patience: Duration,
        now: Instant,
    ) -> Self {
        Self {
            backoff,
            patience,
            kill_patience,
            phase: Phase::Waiting { until: now },
            deaths: 0,
            unready_deaths: 0,
            restarts: 0,
            has_started: false,
        }
    }

    /// What is due; asked again and again until there is nothing.
    pub(super) fn next_action(&mut self, now: Instant) -> Option<Action> {
        match &mut self.phase {
            Phase::Waiting { until } => (now >= *until).then_some(Action::Start),
            Phase::Running { kill_at, .. } => {
                kill_at.take_if(|at| now >= *at).map(|_| Action::Kill)
            }
            Phase::Stopping {
                since, next, at, ..
            } => {
                if now < *at {
                    return None;
                }
                let (action, following, due) = match next {
                    Step::Ask => (Action::Ask, Step::Terminate, *since + self.patience * 3 / 4),
                    Step::Terminate => (Action::Terminate, Step::Kill, *since + self.patience),
                    Step::Kill => (Action::Kill, Step::GiveUp, now + self.kill_patience),
                    Step::GiveUp | Step::Nothing => {
                        *next = Step::Nothing;
                        return None;
                    }
                };
                (*next, *at) = (following, due);
                Some(action)
            }
            Phase::Ended => None,
        }
    }

    /// When something becomes due by itself.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            Phase::Running { kill_at, .. } => kill_at,
            Phase::Stopping {
                next: Step::Nothing,
                ..
            }
            | Phase::Ended => None,
            Phase::Stopping { at, .. } => Some(at),
        }
    }

    /// There is a process now.
    pub(super) fn started(&mut self) {
        if self.has_started {
            self.restarts += 1;
        }
        self.has_started = true;
        self.phase = Phase::Running {
            ready_since: None,
            kill_at: None,
        };
    }

    /// The child says that it is ready.
    pub(super) fn became_ready(&mut self, now: Instant) {
        if let Phase::Running { ready_since, .. } = &mut self.phase {
            ready_since.get_or_insert(now);
            self.unready_deaths = 0;
        }
    }

    /// The process is to be killed `after` a while, unless it ends before.
    pub(super) fn condemn(&mut self, after: Duration, now: Instant) {
        if let Phase::Running { kill_at, .. } = &mut self.phase {
            let at = now + after;
            *kill_at = Some(kill_at.map_or(at, |earlier| earlier.min(at)));
        }
    }

    /// The process has ended, or could not be started. Returns the pause before the next one,
    /// if there will be one.
    pub(super) fn ended(&mut self, now: Instant) -> Option<Duration> {
        let pause = match self.phase {
            Phase::Running { ready_since, .. } => self.mourn(ready_since, now),
            Phase::Waiting { .. } => self.mourn(None, now),
            Phase::Stopping {
                then: Then::Restart,
                ..
            } => Duration::ZERO,
            Phase::Stopping {
                then: Then::Remove, ..
            }
            | Phase::Ended => {
                self.phase = Phase::Ended;
                return None;
            }
        };
        self.phase = Phase::Waiting { until: now + pause };
        Some(pause)
    }

    /// Counts a death nobody asked for; returns the pause it earns.
    fn mourn(&mut self, ready_since: Option<Instant>, now: Instant) -> Duration {
        let good = |since| now.saturating_duration_since(since) >= self.backoff.good_life;
        if ready_since.is_some_and(good) {
            self.deaths = 0;
        }
        let longest = match ready_since {
            Some(_) => self.backoff.longest_when_ready,
            None => self.backoff.longest,
        };
        let pause = match self.deaths {
            0 => Duration::ZERO,
            // 2^20 times anything sensible is beyond the longest pause.
            n => (self.backoff.first * (1 << (n - 1).min(20))).min(longest),
        };
        self.deaths = self.deaths.saturating_add(1);
        if ready_since.is_none() {
            self.unready_deaths = self.unready_deaths.saturating_add(1);
        }
        pause
    }

    /// The child is to stop. With [`Then::Restart`] its past is forgiven: it will be another
    /// program that starts. A stop that is under way keeps its pace and only learns what follows.
    pub(super) fn stop(&mut self, then: Then, now: Instant) {
        if then == Then::Restart {
            self.deaths = 0;
            self.unready_deaths = 0;
        }
        match &mut self.phase {
            Phase::Waiting { .. } | Phase::Ended => {
                self.phase = match then {
                    Then::Restart => Phase::Waiting { until: now },
                    Then::Remove => Phase::Ended,
                }
            }
            Phase::Running { kill_at, .. } => {
                let next = match kill_at {
                    Some(_) => Step::Kill,
                    None => Step::Ask,
                };
                self.phase = Phase::Stopping {
                    since: now,
                    next,
                    at: now,
                    then,
                };
            }
            Phase::Stopping { then: before, .. } => *before = then,
        }
    }

    /// Whether there is neither a process nor the wish for one.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether not even SIGKILL ended the process in time.
    pub(super) fn is_given_up(&self) -> bool {
        matches!(
            self.phase,
            Phase::Stopping {
                next: Step::Nothing,
                ..
            }
        )
    }

    /// Whether the process is being stopped.
    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping { .. })
    }

    /// Whether it keeps dying before it is ready.
    pub(super) fn is_crash_looping(&self) -> bool {
        self.unready_deaths >= self.backoff.crash_loop
    }

    /// Deaths in a row before getting ready.
    pub(super) fn unready_deaths(&self) -> u32 {
        self.unready_deaths
    }

    /// Processes started after the first.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// How far the shutdown has come. The node goes first: it drains its doors and takes the
/// detection mark away while the shards still serve the pods that found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody asked to stop.
    Serving,
    /// The node is stopping.
    NodeStops,
    /// The node is gone, the others are stopping.
    OthersStop,
    /// Nobody is left that could be waited for.
    Over,
}

impl Stage {
    /// The next stage, if this one has reached its end.
    pub(super) fn next(self, is_node_gone: bool, are_others_gone: bool) -> Option<Self> {
        match self {
            Self::NodeStops if is_node_gone => Some(Self::OthersStop),
            Self::OthersStop if are_others_gone => Some(Self::Over),
            Self::Serving | Self::NodeStops | Self::OthersStop | Self::Over => None,
        }
    }
}

/// What a new set of wanted children changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changes {
    /// Wanted and not there.
    pub(super) add: Vec<String>,
    /// There, and wanted with other arguments.
    pub(super) replace: Vec<String>,
    /// There and no longer wanted.
    pub(super) remove: Vec<String>,
}

/// Compares what runs with what is wanted, by name.
pub(super) fn changes<P: PartialEq>(
    present: &BTreeMap<&str, &P>,
    wanted: &BTreeMap<&str, &P>,
) -> Changes {
    let names = |map: &BTreeMap<&str, &P>| -> BTreeSet<String> {
        map.keys().map(|&name| name.to_owned()).collect()
    };
    let (here, there) = (names(present), names(wanted));
    let differs = |name: &&String| present.get(name.as_str()) != wanted.get(name.as_str());
    Changes {
        add: there.difference(&here).cloned().collect(),
        replace: here.intersection(&there).filter(differs).cloned().collect(),
        remove: here.difference(&there).cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);

    fn child(now: Instant) -> Lifecycle {
        Lifecycle::new(Backoff::default(), 4 * S, S, now)
    }

    /// Lets the child live `ready` after getting ready (`None`: never), then die; the pause.
    fn live_and_die(child: &mut Lifecycle, now: &mut Instant, ready: Option<Duration>) -> Duration {
        *now = child.deadline().unwrap();
        assert_eq!(child.next_action(*now), Some(Action::Start));
        child.started();
        assert_eq!(child.next_action(*now), None);
        if let Some(ready) = ready {
            child.became_ready(*now);
            *now += ready;
        }
        child.ended(*now).unwrap()
    }

    #[test]
    fn a_child_that_was_well_comes_back_at_once() {
        let mut now = Instant::now();
        let mut child = child(now);
        for _ in 0..3 {
            assert_eq!(
                live_and_die(&mut child, &mut now, Some(11 * S)),
                Duration::ZERO
            );
        }
        assert_eq!(child.restarts(), 2);
    }

    #[test]
    fn the_pause_doubles_up_to_half_a_minute_and_a_good_life_resets_it() {
        let mut now = Instant::now();
        let mut child = child(now);
        let pauses: Vec<_> = (0..13)
            .map(|_| live_and_die(&mut child, &mut now, None).as_millis())
            .collect();
        assert_eq!(
            pauses,
            [
                0, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000
            ]
        );
        assert_eq!(
            live_and_die(&mut child, &mut now, Some(10 * S)),
            Duration::ZERO
        );
        assert_eq!(live_and_die(&mut child, &mut now, None), 50 * MS);
    }

    #[test]
    fn a_child_that_gets_ready_each_time_never_waits_long() {
        let mut now = Instant::now();
        let mut child = child(now);
        for _ in 0..20 {
            live_and_die(&mut child, &mut now, Some(S));
        }
        assert_eq!(live_and_die(&mut child, &mut now, Some(S)), S);
        assert!(!child.is_crash_looping());
    }

    #[test]
    fn deaths_in_a_row_before_getting_ready_are_a_crash_loop_until_it_gets_ready() {
        let mut now = Instant::now();
        let mut child = child(now);
        for n in 1..=6 {
            live_and_die(&mut child, &mut now, None);
            assert_eq!(child.is_crash_looping(), n >= 5, "{n}");
        }
        live_and_die(&mut child, &mut now, Some(MS));
        assert!(!child.is_crash_looping());
    }

    #[test]
    fn a_process_that_could_not_be_started_is_tried_again_with_pauses() {
        let now = Instant::now();
        let mut child = child(now);
        assert_eq!(child.next_action(now), Some(Action::Start));
        assert_eq!(child.ended(now), Some(Duration::ZERO));
        assert_eq!(child.next_action(now), Some(Action::Start));
        assert_eq!(child.ended(now), Some(50 * MS));
        assert_eq!(child.next_action(now), None);
        assert_eq!(child.deadline(), Some(now + 50 * MS));
    }

    #[test]
    fn a_stop_asks_then_terminates_then_kills_then_gives_up() {
        let start = Instant::now();
        let mut child = child(start);
        child.started();
        child.stop(Then::Remove, start);
        let mut seen = Vec::new();
        let mut now = start;
        loop {
            while let Some(action) = child.next_action(now) {
                seen.push((action, now - start));
            }
            match child.deadline() {
                Some(next) => now = next,
                None => break,
            }
        }
        assert_eq!(
            seen,
            [
                (Action::Ask, Duration::ZERO),
                (Action::Terminate, 3 * S),
                (Action::Kill, 4 * S)
            ]
        );
        assert!(child.is_given_up());
        assert_eq!(now - start, 5 * S);
        assert_eq!(child.ended(now), None);
        assert!(child.is_over());
    }

    #[test]
    fn the_default_patience_ends_within_ten_seconds() {
        let Patience { node, others, kill } = Patience::default();
        assert!(node + kill + others + kill < 10 * S);
    }

    #[test]
    fn a_replaced_child_starts_again_at_once_with_a_clean_slate() {
        let mut now = Instant::now();
        let mut child = child(now);
        for _ in 0..8 {
            live_and_die(&mut child, &mut now, None);
        }
        child.stop(Then::Restart, now);
        assert_eq!(child.next_action(now), Some(Action::Start));
        assert!(!child.is_crash_looping());
        child.started();
        child.stop(Then::Restart, now);
        assert_eq!(child.next_action(now), Some(Action::Ask));
        assert_eq!(child.ended(now), Some(Duration::ZERO));
    }

    #[test]
    fn the_last_word_about_a_stopping_child_counts() {
        let now = Instant::now();
        let mut child = child(now);
        child.started();
        child.stop(Then::Remove, now);
        child.stop(Then::Restart, now);
        assert_eq!(child.ended(now), Some(Duration::ZERO));
        child.started();
        child.stop(Then::Restart, now);
        child.stop(Then::Remove, now);
        assert_eq!(child.ended(now), None);
    }

    #[test]
    fn a_condemned_child_is_killed_once_and_its_death_counts() {
        let now = Instant::now();
        let mut child = child(now);
        child.started();
        child.condemn(S, now);
        child.condemn(2 * S, now);
        assert_eq!(child.next_action(now), None);
        assert_eq!(child.deadline(), Some(now + S));
        assert_eq!(child.next_action(now + S), Some(Action::Kill));
        assert_eq!(child.next_action(now + S), None);
        assert_eq!(child.ended(now + S), Some(Duration::ZERO));
        child.started();
        assert_eq!(child.ended(now + S), Some(50 * MS));
    }

    #[test]
    fn the_node_goes_first_and_the_others_only_when_it_is_gone() {
        assert_eq!(Stage::Serving.next(true, true), None);
        assert_eq!(Stage::NodeStops.next(false, true), None);
        assert_eq!(Stage::NodeStops.next(true, false), Some(Stage::OthersStop));
        assert_eq!(Stage::OthersStop.next(true, false), None);
        assert_eq!(Stage::OthersStop.next(true, true), Some(Stage::Over));
    }

    #[test]
    fn a_wanted_set_touches_only_what_differs() {
        let present = BTreeMap::from([("a", &1), ("b", &2), ("c", &3)]);
        let wanted = BTreeMap::from([("b", &2), ("c", &4), ("d", &5)]);
        let changes = changes(&present, &wanted);
        assert_eq!(changes.add, ["d"]);
        assert_eq!(changes.replace, ["c"]);
        assert_eq!(changes.remove, ["a"]);
    }
}
