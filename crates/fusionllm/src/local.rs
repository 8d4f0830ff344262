//! CompNode processes on this machine; none outlives its parent.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use fusionllm_broker::Broker;
use fusionllm_protocol::DataSpec;
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

/// A CompNode process that has ended by itself.
#[derive(Debug)]
pub(crate) struct Death {
    pub(crate) index: u32,
    pub(crate) status: std::process::ExitStatus,
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
    /// By number; nothing where one has ended and is not started again.
    children: Vec<Option<Child>>,
    /// How those had ended that ended by themselves and were not started again.
    deaths: Vec<(u32, String)>,
}

/// How a CompNode's process is started.
struct Starter {
    program: PathBuf,
    arguments: Vec<OsString>,
    ticket: String,
}

impl Starter {
    /// Starts number `index`, which measures its device again if `fresh_profile` says so.
    fn start(&self, index: u32, fresh_profile: bool) -> anyhow::Result<Child> {
        Command::new(&self.program)
            .args(["join", "--child", "--bind", "127.0.0.1:0", "--name", &local_name(index)])
            .args(&self.arguments)
            .args(fresh_profile.then_some("--fresh-profile"))
            .env("FUSIONLLM_TICKET", &self.ticket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }
}

impl LocalCompNodes {
    /// Starts `count` of them one after another, so that names and joining order agree.
    /// They share the cores, and let jobs read the data of `home`. With `fresh_profile` they measure their device again.
    pub(crate) async fn start(
        broker: &Broker,
        count: u32,
        device: &str,
        home: &Home<'_>,
        fresh_profile: bool,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the program's own path")?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (cores / count.max(1) as usize).max(1).to_string();
        let scratch = [OsStr::new("--scratch"), home.scratch.as_os_str()];
        let snapshots = [OsStr::new("--snapshots"), home.snapshots.as_os_str()];
        let data = home.data.files().flat_map(|path| [OsStr::new("--data"), path.as_os_str()]);
        let plain = ["--device", device, "--threads", &threads].into_iter().map(OsStr::new);
        let arguments = plain.chain(scratch).chain(snapshots).chain(data).map(OsStr::to_owned).collect();
        let ticket = broker.ticket().to_string();
        let starter = Starter { program, arguments, ticket };
        let mut started = Self { starter, children: Vec::new(), deaths: Vec::new() };
        for index in 0..count {
            let child = started.starter.start(index, fresh_profile)?;
            started.children.push(Some(child));
            started.wait_for(broker, index as usize + 1).await?;
        }
        Ok(started)
    }

    /// Starts the process of a CompNode again that has ended. It joins by itself.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub(crate) fn restart(&mut self, index: u32) -> anyhow::Result<()> {
        if let Some(place) = self.children.get_mut(index as usize) {
            // What it measured at its first start is known.
            *place = Some(self.starter.start(index, false)?);
            self.deaths.retain(|(other, _)| *other != index);
        }
        Ok(())
    }

    async fn wait_for(&mut self, broker: &Broker, joined: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOIN_LIMIT;
        while broker.status().await?.compnodes.len() < joined {
            if let Some(Death { index, status }) = self.dead()? {
                bail!("the process of {} ended before all had joined ({status})", local_name(index));
            }
            if Instant::now() > deadline {
                bail!("CompNode {} did not join within {} s", joined - 1, JOIN_LIMIT.as_secs());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits until one of them has ended, and gives each end once. May be dropped before it is done.
    pub(crate) async fn death(&mut self) -> Death {
        loop {
            // One that cannot be asked is no reason to end.
            if let Ok(Some(death)) = self.dead() {
                return death;
            }
            sleep(WATCH).await;
        }
    }

    fn dead(&mut self) -> std::io::Result<Option<Death>> {
        for (index, place) in (0..).zip(&mut self.children) {
            let Some(child) = place else { continue };
            if let Some(status) = child.try_wait()? {
                *place = None;
                self.deaths.push((index, format!("the process of {} had ended ({status})", local_name(index))));
                return Ok(Some(Death { index, status }));
            }
        }
        Ok(None)
    }

    /// Closes their input, waits until they are gone, and ends those that are not. Says which had ended by themselves,
    /// and how.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        // Those that end just now, too.
        while let Ok(Some(_)) = self.dead() {}
        for child in self.children.iter_mut().flatten() {
            drop(child.stdin.take());
        }
        for child in self.children.iter_mut().flatten() {
            if timeout(LEAVE_LIMIT, child.wait()).await.is_err() {
                // It may have gone in this very moment.
                let _ = child.kill().await;
            }
        }
        self.deaths.into_iter().map(|(_, how)| how).collect()
    }
}
