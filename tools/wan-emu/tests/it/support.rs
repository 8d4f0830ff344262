//! A network for a test, and what is left of it afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use wan_emu::measure::End;
use wan_emu::notice::notice;
use wan_emu::{control, emulation, netns};

/// Networks of one test at a time: two that share a CPU would measure each other.
static MACHINE: Mutex<()> = Mutex::new(());

/// The machine to a test alone, or `None` with the reason printed.
pub(crate) fn machine() -> Option<MutexGuard<'static, ()>> {
    if let Err(error) = netns::check_machine() {
        // Past the capture of output, so that nobody takes it for a pass.
        notice(format_args!("test skipped: {error}"));
        return None;
    }
    Some(MACHINE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Name and file of a network that is taken down at the end of the test, even of one that fails.
pub(crate) struct Net {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) directory: PathBuf,
}

impl Net {
    /// Not up yet.
    pub(crate) fn new(name: &str, text: &str) -> Self {
        let name = format!("test-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("network.toml");
        fs::write(&file, text).unwrap();
        Self { name, file, directory }
    }

    /// Up, in the background.
    pub(crate) fn up(name: &str, text: &str) -> Self {
        let net = Self::new(name, text);
        let output = net.wan_emu(&["up", net.file.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        net
    }

    /// The program with `--net`, ready to be started.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wan-emu"));
        command.arg(words[0]).args(["--net", &self.name]).args(&words[1..]).stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub(crate) fn wan_emu(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Its exit code.
    pub(crate) fn code(&self, words: &[&str]) -> i32 {
        let output = self.wan_emu(words);
        println!("{words:?}: {output:?}");
        output.status.code().unwrap_or_else(|| panic!("{words:?}: {output:?}"))
    }

    pub(crate) fn end(&self, node: &str) -> End {
        let status = control::status(&self.name).unwrap();
        let node = status.nodes.into_iter().find(|it| it.name == node).unwrap();
        End { namespace: node.namespace, address: node.address }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(control::status(&self.name).unwrap().pid.cast_signed()).unwrap()
    }

    /// Waits until nothing of it is left.
    pub(crate) fn assert_gone(&self) {
        wait_until("the network is gone", || {
            netns::existing(&self.name).is_empty() && !emulation::networks().contains(&self.name)
        });
        let devices = fs::read_dir("/sys/class/net").unwrap().flatten();
        let left: Vec<_> = devices.map(|it| it.file_name()).filter(|it| it.to_string_lossy().contains("wan")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = emulation::down(&self.name);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Waits for at most ten seconds.
pub(crate) fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The process that wrote its number into a file.
pub(crate) fn pid_in(file: &Path) -> Pid {
    let read = || Pid::from_raw(fs::read_to_string(file).ok()?.trim().parse().ok()?);
    wait_until("there is a process", || read().is_some());
    read().unwrap()
}

pub(crate) fn is_alive(pid: Pid) -> bool {
    // A zombie waits only for its parent to look.
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

pub(crate) fn kill(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
}
