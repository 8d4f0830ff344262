//! CompNode processes on this machine; none outlives its parent.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use fusionllm_broker::Broker;
use fusionllm_protocol::DataSpec;
use fusionllm_transport::is_same_file;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// How long a CompNode on this machine may take to join: it opens its device first.
const JOIN_LIMIT: Duration = Duration::from_secs(60);
/// How long one may take to leave when asked.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at who has joined.
const LOOK: Duration = Duration::from_millis(20);

/// Between two looks at whether all are alive.
const WATCH: Duration = Duration::from_millis(100);
/// A process that has joined and lived for this long was well: its end says nothing of the next one.
const LIVED: Duration = Duration::from_secs(10);
/// Pauses before another process is started double from one second up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The program that runs, on Linux.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The process of a CompNode has ended by itself, does not join, or cannot be started.
#[derive(Debug)]
pub(crate) struct Death {
    pub(crate) index: u32,
    /// Such as `ended (signal: 9)`.
    pub(crate) how: String,
    /// How many processes of this CompNode in a row were not well for long.
    pub(crate) in_a_row: u32,
}

/// Name of the CompNode that is started as number `index`.
pub(crate) fn local_name(index: u32) -> String {
    format!("compnode-{index}")
}

/// What the files of a CompNode are for one job.
pub(crate) struct Home<'a> {
    /// What it may read.
    pub(crate) data: &'a DataSpec,
    /// An existing folder, for weights and shards while they come and go.
    pub(crate) scratch: &'a Path,
    /// For snapshots, as long as the processes are started again.
    pub(crate) snapshots: &'a Path,
}

/// Child processes that compute for a broker in this process.
///
/// Each holds the read end of a pipe as its standard input and leaves when that closes, however we end.
pub(crate) struct LocalCompNodes {
    starter: Starter,
    /// Whether another process is started in the place of one that has ended.
    restarts: bool,
    /// By number.
    places: Vec<Place>,
}

/// How a CompNode's process is started.
struct Starter {
    program: PathBuf,
    arguments: Vec<OsString>,
    ticket: String,
}

/// A CompNode and its processes, one after the other.
#[derive(Default)]
struct Place {
    process: Option<Process>,
    /// How the last one has ended.
    ended: Option<String>,
    /// So many in a row were not well for long.
    in_a_row: u32,
    /// When the next one is started.
    due: Option<Instant>,
}

/// A process of a CompNode.
struct Process {
    child: Child,
    started: Instant,
    has_joined: bool,
}

impl Starter {
    /// The program that runs now: other bytes may lie under its name since, or none.
    fn program(&self) -> &Path {
        let this = Path::new(THIS_PROGRAM);
        if this.exists() && !is_same_file(this, &self.program) { this } else { &self.program }
    }

    /// Starts number `index`.
    fn start(&self, index: u32) -> std::io::Result<Process> {
        let child = self.command(index).kill_on_drop(true).spawn()?;
        Ok(Process { child, started: Instant::now(), has_joined: false })
    }

    fn command(&self, index: u32) -> Command {
        let mut command = Command::new(self.program());
        #[cfg(unix)]
        command.arg0(&self.program);
        command
            .args(["join", "--child", "--bind", "127.0.0.1:0", "--name", &local_name(index)])
            .args(&self.arguments)
            .env("FUSIONLLM_TICKET", &self.ticket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        command
    }
}

impl Place {
    /// The process has gone, or there is none. Another one is started after a pause if that is wanted: at once if it was
    /// well for a while, and else ever later, as what keeps one from starting may keep the next one too.
    fn ended(&mut self, index: u32, how: String, restarts: bool) -> Death {
        let process = self.process.take();
        if process.is_some_and(|process| process.has_joined && process.started.elapsed() >= LIVED) {
            self.in_a_row = 0;
        }
        self.in_a_row += 1;
        self.due = restarts.then(|| Instant::now() + pause(self.in_a_row));
        self.ended = Some(how.clone());
        Death { index, how, in_a_row: self.in_a_row }
    }

    /// How its process has come to its end, if it has. One that does not join in time is given up: what it waits for, as a
    /// driver that hangs, may never come.
    fn end(&mut self) -> std::io::Result<Option<String>> {
        let Some(Process { child, started, has_joined }) = &mut self.process else { return Ok(None) };
        if let Some(status) = child.try_wait()? {
            return Ok(Some(format!("ended ({status})")));
        }
        if *has_joined || started.elapsed() <= JOIN_LIMIT {
            return Ok(None);
        }
        // It may have gone in this very moment.
        let _ = child.start_kill();
        Ok(Some(format!("did not join within {} s, and was ended", JOIN_LIMIT.as_secs())))
    }
}

/// How long to wait after so many ends in a row.
fn pause(in_a_row: u32) -> Duration {
    match in_a_row.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => LONGEST_PAUSE.min(Duration::from_secs(1 << doublings.min(6))),
    }
}

impl LocalCompNodes {
    /// Starts `count` of them one after another, so that names and joining order agree.
    /// They share the cores, and let jobs read the data of `home`. With `fresh_profile` they measure their device again.
    /// `restarts` says whether those that end later are started again.
    pub(crate) async fn start(
        broker: &Broker,
        count: u32,
        device: &str,
        home: &Home<'_>,
        (fresh_profile, restarts): (bool, bool),
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the program's own path")?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (cores / count.max(1) as usize).max(1).to_string();
        let scratch = [OsStr::new("--scratch"), home.scratch.as_os_str()];
        let snapshots = [OsStr::new("--snapshots"), home.snapshots.as_os_str()];
        let beside = home.data.files_beside_tokenizer();
        // What is not there cannot be allowed either.
        let beside = beside.iter().map(PathBuf::as_path).filter(|path| path.is_file());
        let data = home.data.files().chain(beside).flat_map(|path| [OsStr::new("--data"), path.as_os_str()]);
        let plain = ["--device", device, "--threads", &threads].into_iter().map(OsStr::new);
        // Those that are started again, too: nothing that was measured anew is kept.
        let fresh = fresh_profile.then_some(OsStr::new("--fresh-profile"));
        let arguments = plain.chain(scratch).chain(snapshots).chain(data).chain(fresh).map(OsStr::to_owned).collect();
        let ticket = broker.ticket().to_string();
        let starter = Starter { program, arguments, ticket };
        let mut started = Self { starter, restarts, places: Vec::new() };
        for index in 0..count {
            let cannot = || format!("cannot start {}", started.starter.program.display());
            let process = Some(started.starter.start(index).with_context(cannot)?);
            started.places.push(Place { process, ..Place::default() });
            started.wait_for(broker, index as usize + 1).await?;
        }
        Ok(started)
    }

    async fn wait_for(&mut self, broker: &Broker, joined: usize) -> anyhow::Result<()> {
        while broker.status().await?.compnodes.len() < joined {
            if let Some(Death { index, how, .. }) = self.dead()? {
                bail!("the process of {} {how} before all had joined", local_name(index));
            }
            sleep(LOOK).await;
        }
        self.places.iter_mut().filter_map(|place| place.process.as_mut()).for_each(|process| process.has_joined = true);
        Ok(())
    }

    /// Starts those again that are to be, and waits until one has ended, has not joined in time, or cannot be started;
    /// gives each end once. May be dropped before it is done.
    pub(crate) async fn death(&mut self, broker: &Broker) -> Death {
        loop {
            self.look_who_joined(broker).await;
            // One that cannot be asked is no reason to end.
            if let Ok(Some(death)) = self.dead() {
                return death;
            }
            if let Some(death) = self.start_due() {
                return death;
            }
            sleep(WATCH).await;
        }
    }

    /// Asks the broker only while somebody is on the way.
    async fn look_who_joined(&mut self, broker: &Broker) {
        if self.places.iter().filter_map(|place| place.process.as_ref()).all(|process| process.has_joined) {
            return;
        }
        let Ok(status) = broker.status().await else { return };
        for (index, place) in (0..).zip(&mut self.places) {
            if let Some(process) = &mut place.process {
                process.has_joined |= status.compnodes.iter().any(|compnode| compnode.name == local_name(index));
            }
        }
    }

    /// Starts those for which it is time. Gives the first that cannot be started.
    fn start_due(&mut self) -> Option<Death> {
        for (index, place) in (0..).zip(&mut self.places) {
            if place.due.is_none_or(|due| Instant::now() < due) {
                continue;
            }
            place.due = None;
            match self.starter.start(index) {
                Ok(process) => place.process = Some(process),
                Err(error) => {
                    let how = format!("cannot be started: {}: {error}", self.starter.program.display());
                    return Some(place.ended(index, how, self.restarts));
                }
            }
        }
        None
    }

    fn dead(&mut self) -> std::io::Result<Option<Death>> {
        for (index, place) in (0..).zip(&mut self.places) {
            if let Some(how) = place.end()? {
                return Ok(Some(place.ended(index, how, self.restarts)));
            }
        }
        Ok(None)
    }

    /// Closes their input, waits until they are gone, and ends those that are not. Says of which there was none, and why.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        // Those that end just now, too.
        while let Ok(Some(_)) = self.dead() {}
        let is_gone = |place: &Place| place.ended.clone().filter(|_| place.process.is_none());
        let gone = (0..).zip(&self.places).filter_map(|(index, place)| Some((index, is_gone(place)?)));
        let gone = gone.map(|(index, how)| format!("the process of {} {how}", local_name(index))).collect();
        let mut children: Vec<Child> =
            self.places.into_iter().filter_map(|place| place.process).map(|process| process.child).collect();
        for child in &mut children {
            drop(child.stdin.take());
        }
        for child in &mut children {
            if timeout(LEAVE_LIMIT, child.wait()).await.is_err() {
                // It may have gone in this very moment, and one that hangs in a driver does not go.
                let _ = timeout(LEAVE_LIMIT, child.kill()).await;
            }
        }
        gone
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    fn starter(program: &str) -> Starter {
        let arguments = ["--device", "cpu", "--fresh-profile"].map(OsString::from).to_vec();
        Starter { program: program.into(), arguments, ticket: String::new() }
    }

    fn place(has_joined: bool, lived: Duration) -> Place {
        let child = Command::new("cat").stdin(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let started = Instant::now().checked_sub(lived).unwrap();
        Place { process: Some(Process { child, started, has_joined }), ..Place::default() }
    }

    fn pauses(place: &mut Place) -> u64 {
        let died = place.ended(0, "ended".to_owned(), true);
        assert!(died.in_a_row > 0);
        place.due.unwrap().saturating_duration_since(Instant::now()).as_secs_f64().round() as u64
    }

    /// What keeps one from starting, such as a full disk, would else be tried some ten times a second.
    #[tokio::test]
    async fn processes_that_end_at_once_are_started_ever_later() {
        let mut ill = Place::default();
        let all: Vec<u64> = (0..10).map(|_| pauses(&mut ill)).collect();
        assert_eq!(all, [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
        // Another one was well before it ended.
        let mut well = Place { in_a_row: 7, ..place(true, LIVED) };
        assert_eq!(pauses(&mut well), 0);
        let mut short = Place { in_a_row: 7, ..place(true, LIVED / 2) };
        assert_eq!(pauses(&mut short), 60);
    }

    #[tokio::test]
    async fn a_process_that_does_not_join_is_given_up() {
        let places = vec![place(true, 2 * JOIN_LIMIT), place(false, JOIN_LIMIT / 2), place(false, 2 * JOIN_LIMIT)];
        let mut compnodes = LocalCompNodes { starter: starter("/none"), restarts: true, places };
        let Death { index, how, in_a_row } = compnodes.dead().unwrap().unwrap();
        assert_eq!((index, how.as_str(), in_a_row), (2, "did not join within 60 s, and was ended", 1));
        assert!(compnodes.dead().unwrap().is_none(), "each end is told once");
        assert!(compnodes.places[2].due.is_some() && compnodes.places[2].process.is_none());
        compnodes.restarts = false;
        assert_eq!(compnodes.stop().await, ["the process of compnode-2 did not join within 60 s, and was ended"]);
    }

    #[cfg(not(target_os = "linux"))]
    #[tokio::test]
    async fn a_program_that_is_gone_is_named() {
        let due = Some(Instant::now());
        let places = vec![Place { due, ..Place::default() }];
        let mut compnodes = LocalCompNodes { starter: starter("/none"), restarts: true, places };
        let Death { how, .. } = compnodes.start_due().unwrap();
        assert!(how.starts_with("cannot be started: /none: "), "{how}");
        assert!(compnodes.start_due().is_none() && compnodes.places[0].due.is_some(), "it is tried again later");
    }

    #[test]
    fn a_process_that_is_started_again_is_started_as_the_first_was() {
        let this = std::env::current_exe().unwrap();
        let command = starter(this.to_str().unwrap()).command(3);
        let arguments: Vec<&OsStr> = command.as_std().get_args().collect();
        assert!(arguments.ends_with(&["--name", "compnode-3", "--device", "cpu", "--fresh-profile"].map(OsStr::new)));
        assert_eq!(command.as_std().get_program(), this);
        // Its file was replaced or removed.
        #[cfg(target_os = "linux")]
        assert_eq!(starter("/none").command(3).as_std().get_program(), THIS_PROGRAM);
    }
}
