//! What happens while a network is up: commands, steps at their times, requests, signals; and then its end.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::children::Children;
use crate::control::{self, Request, Response};
use crate::emulation::Emulation;
use crate::error::Error;
use crate::network::{Network, Step};
use crate::notice::notice;

/// Longest sleep of the session's loop; a lost SIGCHLD then only costs so much time.
const TICK: Duration = Duration::from_millis(500);

/// What a session is for.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// Whether the nodes' commands are started.
    pub runs: bool,
    /// The node of the session's own command; outside of all if left out.
    pub node: Option<String>,
    /// The session's own command; may be empty.
    pub command: Vec<OsString>,
    /// Where the output of the nodes' commands goes.
    pub logs: Option<PathBuf>,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should: asked by `down`, or nothing was left to do.
    Done,
    /// Its command ended.
    Command(ExitStatus),
    /// A node's command failed by itself.
    NodeFailed,
    /// By this signal.
    Signal(i32),
    /// `duration_s` was over before its command ended.
    Overtime,
}

enum Event {
    Signal(i32),
    Request(Request, SyncSender<Response>),
    RouterEnded(io::Error),
}

/// Brings a network up, does the job, and takes it down, whatever happens. `ready` is called when it is up.
///
/// # Errors
/// As [`Emulation::up`]; [`Error::Router`] if the router ends.
pub fn run(network: Network, job: &Job, ready: impl FnOnce()) -> Result<Outcome, Error> {
    let (sender, events) = channel();
    // Before anything is made, so that a signal cannot leave it behind.
    watch_signals(sender.clone())?;
    let node = job.node.as_deref().map(|name| network.node(name)).transpose()?;
    let router_ended = sender.clone();
    // The receiver lives as long as this function, and nothing is sent after it.
    let emulation = Emulation::up(network, move |error| drop(router_ended.send(Event::RouterEnded(error))))?;
    control::listen(&emulation.network().name, move |(request, reply)| {
        drop(sender.send(Event::Request(request, reply)));
    })?;
    let network = emulation.network();
    let children = Children::new(&network.name, emulation.status()?.nodes, job.logs.clone());
    let steps = network.steps.clone();
    let mut session = Session { emulation, children, steps, job, going_down: false };
    ready();
    let result = session.start(node).and_then(|()| session.serve(&events));
    session.children.end();
    result
}

fn watch_signals(sender: Sender<Event>) -> Result<(), Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGCHLD]).map_err(Error::io("catch signals"))?;
    let forward = move || signals.forever().try_for_each(|signal| sender.send(Event::Signal(signal)));
    let name = "signals".to_owned();
    thread::Builder::new().name(name).spawn(forward).map_err(Error::io("start a thread")).map(drop)
}

struct Session<'a> {
    emulation: Emulation,
    children: Children,
    /// Those still to come.
    steps: Vec<Step>,
    job: &'a Job,
    going_down: bool,
}

impl Session<'_> {
    fn start(&mut self, node: Option<usize>) -> Result<(), Error> {
        if self.job.runs {
            for index in 0..self.emulation.network().nodes.len() {
                if let Some(line) = self.emulation.network().nodes[index].run.clone() {
                    self.children.start_on(index, &line)?;
                }
            }
        }
        self.children.start(node, &self.job.command)
    }

    fn serve(&mut self, events: &Receiver<Event>) -> Result<Outcome, Error> {
        loop {
            self.take_steps();
            self.children.reap();
            if let Some(outcome) = self.outcome() {
                return Ok(outcome);
            }
            match events.recv_timeout(self.sleep()) {
                Ok(Event::Signal(SIGCHLD)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::Signal(signal)) => return Ok(Outcome::Signal(signal)),
                Ok(Event::Request(request, reply)) => {
                    // Who asked may be gone.
                    let _ = reply.try_send(Response::of(self.answer(request)));
                }
                Ok(Event::RouterEnded(error)) => return Err(Error::Router { reason: error.to_string() }),
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Router { reason: "no events".to_owned() }),
            }
        }
    }

    fn answer(&mut self, request: Request) -> Result<Option<control::Status>, Error> {
        match request {
            Request::Status => self.emulation.status().map(Some),
            Request::Link { rule } => self.emulation.change(&rule).map(|()| None),
            Request::Down => {
                self.going_down = true;
                Ok(None)
            }
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        let has_command = !self.job.command.is_empty();
        let failed = self.children.failed();
        let ended = if failed { Outcome::NodeFailed } else { Outcome::Done };
        if let Some(status) = self.children.ended() {
            return Some(if status.success() && failed { Outcome::NodeFailed } else { Outcome::Command(status) });
        }
        if self.going_down {
            return Some(Outcome::Done);
        }
        if self.job.runs && self.end().is_some_and(|end| end <= Instant::now()) {
            return Some(if has_command { Outcome::Overtime } else { ended });
        }
        let has_more = self.steps.iter().any(|step| step.run.is_some()) || !self.children.is_empty();
        (self.job.runs && !has_command && !has_more && self.end().is_none()).then_some(ended)
    }

    fn end(&self) -> Option<Instant> {
        self.emulation.network().duration.map(|duration| self.emulation.since() + duration)
    }

    fn sleep(&self) -> Duration {
        let next = self.steps.first().map(|step| self.time_of(step));
        let wake = [next, self.end()].into_iter().flatten().min();
        wake.map_or(TICK, |wake| wake.saturating_duration_since(Instant::now()).min(TICK))
    }

    fn time_of(&self, step: &Step) -> Instant {
        self.emulation.since() + Duration::from_secs_f64(step.at_s)
    }

    fn take_steps(&mut self) {
        while self.steps.first().is_some_and(|step| self.time_of(step) <= Instant::now()) {
            let step = self.steps.remove(0);
            // All steps were tried on a copy when the file was read, so only the machine can make one fail.
            if let Err(error) = self.take(&step) {
                notice(format_args!("step at_s = {}: {error}", step.at_s));
            }
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), Error> {
        if let Some(rule) = &step.link {
            self.emulation.change(rule)?;
        }
        if let Some(kill) = &step.kill {
            let node = self.emulation.network().node(&kill.node)?;
            self.children.kill(node, kill.gently);
        }
        if let Some(run) = step.run.as_ref().filter(|_| self.job.runs) {
            let node = self.emulation.network().node(&run.node)?;
            self.children.start_on(node, &run.command)?;
        }
        Ok(())
    }
}
