//! The commands that a session started, and their end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::control::NodeStatus;
use crate::error::Error;
use crate::netns;
use crate::notice::notice;

/// How long commands may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(3);

/// Whose command it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The command line's: the session ends with it.
    Session,
    /// The network file's, on that node.
    Node(usize),
}

#[derive(Debug)]
struct Running {
    owner: Owner,
    child: Child,
    /// Whether it leads a process group of its own.
    leads: bool,
    /// Whether its end was asked for.
    ending: bool,
}

impl Running {
    fn signal(&mut self, signal: Signal) {
        self.ending = true;
        let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else { return };
        // It may have ended by itself; it is not reaped yet, so the number is still its own.
        let _ = if self.leads { kill_process_group(pid, signal) } else { kill_process(pid, signal) };
    }
}

/// All commands of a session.
#[derive(Debug, Default)]
pub struct Children {
    running: Vec<Running>,
    nodes: Vec<NodeStatus>,
    net: String,
    logs: Option<PathBuf>,
    /// How the session's own command ended.
    ended: Option<ExitStatus>,
    /// Whether a node's command failed by itself.
    failed: bool,
}

impl Children {
    /// None yet. With `logs`, each node's output goes to a file there.
    pub fn new(net: &str, nodes: Vec<NodeStatus>, logs: Option<PathBuf>) -> Self {
        Self { net: net.to_owned(), nodes, logs, ..Self::default() }
    }

    /// Starts the session's own command, on a node or outside of all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start(&mut self, node: Option<usize>, words: &[OsString]) -> Result<(), Error> {
        // At a terminal it has to stay in the foreground; then Ctrl-C reaches it as well. Elsewhere a group of its own
        // lets it end together with what it started.
        let leads = !io::stdin().is_terminal();
        let mut command = match node {
            Some(node) => netns::command(&self.nodes[node].namespace, words),
            None => {
                let Some((program, arguments)) = words.split_first() else { return Ok(()) };
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
        };
        command.envs(environment(&self.net, &self.nodes, node));
        if leads {
            command.process_group(0);
        }
        let shown = words.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
        let child = command.spawn().map_err(Error::io(format!("start `{shown}`")))?;
        self.running.push(Running { owner: Owner::Session, child, leads, ending: false });
        Ok(())
    }

    /// Starts a node's command.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start_on(&mut self, node: usize, line: &str) -> Result<(), Error> {
        let name = &self.nodes[node].name;
        let mut command = netns::command(&self.nodes[node].namespace, &["sh", "-c", line]);
        command.envs(environment(&self.net, &self.nodes, Some(node))).stdin(Stdio::null()).process_group(0);
        if let Some(directory) = &self.logs {
            let path = directory.join(format!("{name}.log"));
            let open = || -> io::Result<(File, File)> {
                fs::create_dir_all(directory)?;
                let file = File::options().create(true).append(true).open(&path)?;
                Ok((file.try_clone()?, file))
            };
            let (out, err) = open().map_err(Error::io(format!("write {}", path.display())))?;
            command.stdout(out).stderr(err);
        }
        let child = command.spawn().map_err(Error::io(format!("start the command of `{name}`")))?;
        self.running.push(Running { owner: Owner::Node(node), child, leads: true, ending: false });
        Ok(())
    }

    /// Ends a node's commands.
    pub fn kill(&mut self, node: usize, gently: bool) {
        let signal = if gently { Signal::TERM } else { Signal::KILL };
        self.running.iter_mut().filter(|running| running.owner == Owner::Node(node)).for_each(|it| it.signal(signal));
    }

    /// Takes note of those that have ended.
    pub fn reap(&mut self) {
        let (nodes, ended, failed) = (&self.nodes, &mut self.ended, &mut self.failed);
        self.running.retain_mut(|running| {
            let Ok(Some(status)) = running.child.try_wait() else { return true };
            match running.owner {
                Owner::Session => *ended = Some(status),
                Owner::Node(node) if !status.success() && !running.ending => {
                    notice(format_args!("the command of `{}` ended with {status}", nodes[node].name));
                    *failed = true;
                }
                Owner::Node(_) => {}
            }
            false
        });
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// How the session's own command ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.ended
    }

    /// Whether a node's command failed by itself.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Ends all, at first gently.
    pub fn end(&mut self) {
        let patience = Instant::now() + GRACE;
        self.running.iter_mut().for_each(|running| running.signal(Signal::TERM));
        while !self.is_empty() && Instant::now() < patience {
            thread::sleep(Duration::from_millis(10));
            self.reap();
        }
        self.running.iter_mut().for_each(|running| running.signal(Signal::KILL));
        for running in &mut self.running {
            let _ = running.child.wait();
        }
        self.running.clear();
    }
}

/// What a command may want to know: `WAN_EMU_NET`, `WAN_EMU_ADDR_BROKER` for a node `broker`, and on a node
/// `WAN_EMU_NODE` and `WAN_EMU_ADDR`.
pub fn environment(net: &str, nodes: &[NodeStatus], on: Option<usize>) -> Vec<(String, String)> {
    let mut all = vec![("WAN_EMU_NET".to_owned(), net.to_owned())];
    for node in nodes {
        let shout = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let name: String = node.name.chars().map(shout).collect();
        all.push((format!("WAN_EMU_ADDR_{name}"), node.address.to_string()));
    }
    if let Some(node) = on.map(|node| &nodes[node]) {
        all.push(("WAN_EMU_NODE".to_owned(), node.name.clone()));
        all.push(("WAN_EMU_ADDR".to_owned(), node.address.to_string()));
    }
    all
}

/// The exit code that stands for a status: its own, or 128 and the signal.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_learn_the_addresses() {
        let nodes: Vec<NodeStatus> = (0..2_u8)
            .map(|i| NodeStatus {
                name: format!("gpu-{i}"),
                site: String::new(),
                address: [10, 77, 0, i + 1].into(),
                namespace: String::new(),
                up_mbit_per_s: None,
                down_mbit_per_s: None,
                overrun: 0,
            })
            .collect();
        let all = environment("x", &nodes, Some(1));
        assert!(all.contains(&("WAN_EMU_ADDR_GPU_0".to_owned(), "10.77.0.1".to_owned())));
        assert!(all.contains(&("WAN_EMU_NODE".to_owned(), "gpu-1".to_owned())));
        assert_eq!(environment("x", &nodes, None).len(), 3);
    }

    #[test]
    fn a_node_that_fails_by_itself_is_told_from_one_that_was_ended() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
