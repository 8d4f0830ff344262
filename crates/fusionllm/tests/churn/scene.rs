//! The broker and the CompNodes of a run, as processes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fusionllm_transport::Ticket;
use serde_json::Value;

use crate::process::{Bench, LIMIT};

/// What a process takes: when, in seconds of its life, kilobytes of memory, and open descriptors.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Sample {
    pub(crate) at_s: f64,
    pub(crate) rss_kb: u64,
    pub(crate) descriptors: usize,
}

/// A process that can be killed and stopped.
pub(crate) struct Process {
    child: Child,
    began: Instant,
    pub(crate) is_stopped: bool,
    pub(crate) samples: Vec<Sample>,
}

impl Process {
    fn spawn(mut command: Command, log: File) -> Self {
        let child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, began: Instant::now(), is_stopped: false, samples: Vec::new() }
    }

    pub(crate) fn signal(&self, name: &str) {
        let done = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    pub(crate) fn kill(mut self) {
        // It may have ended by itself, which the checks find.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Asks it to leave. Gives how it ended.
    fn leave(mut self) -> Option<i32> {
        self.signal("TERM");
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        None
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn sample(&mut self) {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let Ok(status) = std::fs::read_to_string(proc.join("status")) else { return };
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        let descriptors = std::fs::read_dir(proc.join("fd")).map_or(0, Iterator::count);
        if let Some(rss_kb) = rss {
            self.samples.push(Sample { at_s: self.began.elapsed().as_secs_f64(), rss_kb, descriptors });
        }
    }
}

/// A CompNode; its process comes and goes.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) process: Option<Process>,
    /// Whether the job has no need of it.
    pub(crate) is_spare: bool,
}

/// All of them, in a folder of their own.
pub(crate) struct Scene {
    pub(crate) bench: Bench,
    pub(crate) nodes: Vec<Node>,
    pub(crate) broker: Option<Process>,
    /// Since when the broker is there again.
    broker_began: Instant,
    ticket: String,
    pub(crate) run_dir: PathBuf,
}

/// Large enough that a step takes some tens of milliseconds, and cut by number alone, so that so many CompNodes always get
/// the same cut.
const JOB: &str = "
name = \"churn\"
[model]
name = \"gpt2\"
n_layer = 4
n_embd = 64
n_head = 4
[data]
path = \"text.txt\"
seq_len = 64
cache = false
[train]
batch = 8
micro_batches = 4
lr = 1e-3
warmup = 10
eval_every = 0
eval_batches = 1
[placement]
strategy = \"equal-number\"
[compression]
policy = \"dense\"
[checkpoint]
every = 20
";

impl Scene {
    /// A broker, its CompNodes, and a job of so many steps that is about to begin.
    pub(crate) fn new(compnodes: usize, steps: u64) -> Self {
        let bench = Bench::new();
        bench.write("job.toml", JOB);
        let mut scene = Self {
            bench,
            nodes: Vec::new(),
            broker: None,
            broker_began: Instant::now(),
            ticket: String::new(),
            run_dir: PathBuf::new(),
        };
        scene.start_broker();
        for index in 0..compnodes {
            scene.join(&format!("n{index}"), false);
            scene.wait_for_members(index + 1);
        }
        let keys = format!("--set train.steps={steps} --set placement.compnodes={compnodes}");
        let submitted = scene.bench.succeed(&format!("submit job.toml --state state --json {keys}"));
        let submitted: Value = serde_json::from_str(submitted.lines().next().unwrap()).unwrap();
        scene.run_dir = PathBuf::from(submitted["run_dir"].as_str().unwrap());
        scene
    }

    fn log(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.bench.path(&format!("{name}.log"))).unwrap()
    }

    /// Starts the broker, where it was before if it was.
    pub(crate) fn start_broker(&mut self) {
        let address = match self.ticket.as_str() {
            "" => "127.0.0.1:0".to_owned(),
            ticket => ticket.parse::<Ticket>().unwrap().broker.addrs[0].to_string(),
        };
        let arguments = format!("broker --bind {address} --state state --runs runs --json --show-ticket");
        let mut command = self.bench.command(&arguments);
        command.stdout(Stdio::piped());
        let mut broker = Process::spawn(command, self.log("broker"));
        let mut lines = BufReader::new(broker.child.stdout.take().unwrap()).lines();
        let line = lines.next().unwrap_or_else(|| panic!("the broker ends: {}", self.last_of("broker"))).unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        line["ticket"].as_str().unwrap().clone_into(&mut self.ticket);
        self.broker = Some(broker);
        self.broker_began = Instant::now();
    }

    /// A CompNode joins, by a process that is new or started again.
    pub(crate) fn join(&mut self, name: &str, is_spare: bool) {
        let arguments =
            format!("join --name {name} --bind 127.0.0.1:0 --device cpu --threads 1 --data . --state state-{name}");
        let mut command = self.bench.command(&arguments);
        command.env("FUSIONLLM_TICKET", &self.ticket).stdout(Stdio::null());
        let process = Some(Process::spawn(command, self.log(name)));
        match self.nodes.iter_mut().find(|node| node.name == name) {
            Some(node) => node.process = process,
            None => self.nodes.push(Node { name: name.to_owned(), process, is_spare }),
        }
    }

    pub(crate) fn node(&mut self, name: &str) -> Option<&mut Node> {
        self.nodes.iter_mut().find(|node| node.name == name)
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.bench.succeed("status --state state --json")).unwrap()
    }

    fn wait_for_members(&self, count: usize) {
        let deadline = Instant::now() + LIMIT;
        while self.status()["compnodes"].as_array().unwrap().len() < count {
            assert!(Instant::now() < deadline, "{count} CompNodes do not join: {}", self.last_of("n0"));
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Starts those again that found no broker when they were started, as whoever supervises them would. Gives one that
    /// has ended otherwise.
    pub(crate) fn supervise(&mut self) -> Option<String> {
        if self.broker.as_mut().is_some_and(Process::has_ended) {
            return Some("broker".to_owned());
        }
        let has_broker_since = self.broker.is_some().then_some(self.broker_began);
        let mut again = Vec::new();
        for node in &mut self.nodes {
            let Some(process) = node.process.as_mut().filter(|process| !process.is_stopped) else { continue };
            if !process.has_ended() {
                continue;
            }
            if has_broker_since.is_some_and(|since| process.began > since) {
                return Some(node.name.clone());
            }
            again.push((node.name.clone(), node.is_spare));
        }
        again
            .into_iter()
            .filter(|_| has_broker_since.is_some())
            .for_each(|(name, is_spare)| self.join(&name, is_spare));
        None
    }

    /// The last words of a process.
    pub(crate) fn last_of(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.bench.path(&format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Every process takes a note of what it takes.
    pub(crate) fn sample(&mut self) {
        self.broker.iter_mut().for_each(Process::sample);
        self.nodes.iter_mut().filter_map(|node| node.process.as_mut()).for_each(Process::sample);
    }

    /// All leave. Gives who did not leave as it should, and how many processes are left over.
    pub(crate) fn end(&mut self) -> (Vec<String>, usize) {
        let mut rude = Vec::new();
        for node in &mut self.nodes {
            let code = node.process.take().map(Process::leave);
            rude.extend(code.filter(|code| *code != Some(0)).map(|code| format!("{} ends with {code:?}", node.name)));
        }
        let code = self.broker.take().map(Process::leave);
        rude.extend(code.filter(|code| *code != Some(0)).map(|code| format!("the broker ends with {code:?}")));
        (rude, self.bench.processes())
    }
}

impl Drop for Scene {
    /// A run that fails leaves nothing behind.
    fn drop(&mut self) {
        let processes = self.nodes.iter_mut().map(|node| node.process.take()).chain([self.broker.take()]);
        processes.flatten().for_each(Process::kill);
    }
}
