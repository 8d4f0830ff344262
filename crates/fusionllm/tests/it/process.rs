//! Runs the binary and reads what it says.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// No command of these tests takes nearly as long.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A folder with a text and a small job that trains on it in a second or two.
pub(crate) struct Bench {
    folder: TempDir,
    /// For tokens, apart: the folder may be what is trained on.
    cache: TempDir,
}

const JOB: &str = "
name = \"small\"
[model]
name = \"gpt2\"
n_layer = 1
n_embd = 16
n_head = 2
[data]
path = \"text.txt\"
seq_len = 16
[train]
steps = 8
batch = 4
micro_batches = 2
lr = 3e-3
warmup = 2
eval_every = 4
eval_batches = 2
[placement]
strategy = \"equal-compute\"
[compression]
policy = \"dense\"
[checkpoint]
every = 4
";

impl Bench {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = ["the", "broker", "cuts", "graphs", "and", "machines", "train", "them", "over", "slow", "links"];
        let text: Vec<&str> = (0..2000usize).map(|i| words[(i * i + i / 7) % words.len()]).collect();
        std::fs::write(folder.path().join("text.txt"), text.join(" ")).unwrap();
        std::fs::write(folder.path().join("job.toml"), JOB).unwrap();
        Self { folder, cache: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where tokens are kept.
    pub(crate) fn token_cache(&self) -> &Path {
        self.cache.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// The binary, run in this folder with the words of `arguments`.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fusionllm"));
        command
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .env_remove("FUSIONLLM_TICKET")
            .env_remove("FUSIONLLM_LOG")
            .env("XDG_STATE_HOME", self.path("state-home"))
            .env("FUSIONLLM_TOKEN_CACHE", self.cache.path())
            .env("FUSIONLLM_TEST_FOLDER", self.folder.path());
        command
    }

    /// A line for the shell, in this folder, where `fusionllm` is the binary.
    pub(crate) fn shell(&self, line: &str) -> Command {
        self.shell_behind(&[], line)
    }

    /// The same behind a command that runs another one, such as `nsenter`.
    pub(crate) fn shell_behind(&self, before: &[String], line: &str) -> Command {
        let words: Vec<&str> = before.iter().map(String::as_str).chain(["sh", "-c", line]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.folder.path());
        for (name, value) in self.command("").get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let folder = Path::new(env!("CARGO_BIN_EXE_fusionllm")).parent().unwrap().to_owned();
        let others = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(folder).chain(std::env::split_paths(&others))).unwrap();
        command.env("PATH", path);
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs to the end, which must be good; gives standard output.
    pub(crate) fn succeed(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "fusionllm {arguments}\n{out}\n{err}");
        out
    }

    /// Starts it in the background; standard output comes line by line.
    pub(crate) fn start(&self, arguments: &str) -> Running {
        Running::spawn(self.command(arguments))
    }

    /// Every process that was started in this folder, and their children.
    #[cfg(target_os = "linux")]
    pub(crate) fn processes(&self) -> usize {
        self.pids().len()
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn pids(&self) -> Vec<String> {
        let mark = format!("FUSIONLLM_TEST_FOLDER={}", self.folder.path().display());
        let is_ours = |entry: &std::fs::DirEntry| {
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            environ.split(|&b| b == 0).any(|variable| variable == mark.as_bytes())
        };
        let ours = std::fs::read_dir("/proc").unwrap().flatten().filter(is_ours);
        ours.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Looks again and again until it is so.
pub(crate) fn wait_until(is_so: impl Fn() -> bool, what: &str) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "it did not come to this: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process in the background; it is killed if the test ends before it.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        // On a thread of its own, so that whoever waits for a line can give up.
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line of standard output.
    pub(crate) fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => Some(line.trim_end().to_owned()),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => self.give_up("another line, or its end", &[]),
        }
    }

    /// Reads lines up to one that contains `wanted`.
    pub(crate) fn wait_for(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(wanted) => return line.trim_end().to_owned(),
                Ok(line) => seen.push(line),
                Err(_) => self.give_up(wanted, &seen),
            }
        }
    }

    /// Ends the process, and says what it said.
    fn give_up(&mut self, wanted: &str, seen: &[String]) -> ! {
        let _ = self.child.kill();
        let last = seen.len().saturating_sub(100);
        panic!("`{wanted}` did not come; seen last:\n{}\n{}", seen[last..].join("\n"), self.errors());
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            std::io::Read::read_to_string(&mut stderr, &mut text).unwrap();
        }
        text
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    #[cfg(unix)]
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end; gives the exit code, what was left of standard output, and standard error.
    pub(crate) fn finish(mut self) -> (Option<i32>, String, String) {
        let deadline = Instant::now() + LIMIT;
        let mut out = Vec::new();
        while let Some(line) = self.line() {
            out.push(line);
        }
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the process does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        (status.code(), out.join("\n"), self.errors())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has mostly gone before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of a JSON-lines file.
pub(crate) fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The training losses in a run directory.
pub(crate) fn losses(run: &Path) -> Vec<f64> {
    json_lines(&run.join("metrics.jsonl")).iter().map(|m| m["loss"].as_f64().unwrap()).collect()
}
