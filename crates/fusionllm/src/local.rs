//! CompNode processes on this machine; none outlives its parent.

use std::ffi::OsStr;
use std::path::Path;
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
    pub(crate) name: String,
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
}

/// Child processes that compute for a broker in this process.
///
/// Each holds the read end of a pipe as its standard input and leaves when that closes, however we end.
pub(crate) struct LocalCompNodes {
    children: Vec<Child>,
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
        let mut started = Self { children: Vec::new() };
        for index in 0..count {
            let child = Command::new(&program)
                .args(["join", "--child", "--bind", "127.0.0.1:0", "--device", device])
                .args(["--name", &local_name(index), "--threads", &threads])
                .args(fresh_profile.then_some("--fresh-profile"))
                .arg("--scratch")
                .arg(home.scratch)
                .args(home.data.files().flat_map(|path| [OsStr::new("--data"), path.as_os_str()]))
                .env("FUSIONLLM_TICKET", broker.ticket().to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .with_context(|| format!("cannot start {}", program.display()))?;
            started.children.push(child);
            started.wait_for(broker, index as usize + 1).await?;
        }
        Ok(started)
    }

    async fn wait_for(&mut self, broker: &Broker, joined: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOIN_LIMIT;
        while broker.status().await?.compnodes.len() < joined {
            if let Some(Death { name, status }) = self.dead()? {
                bail!("the process of {name} ended before all had joined ({status})");
            }
            if Instant::now() > deadline {
                bail!("CompNode {} did not join within {} s", joined - 1, JOIN_LIMIT.as_secs());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits until one of them has ended. May be dropped before it is done.
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
        for (index, child) in self.children.iter_mut().enumerate() {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(Death { name: local_name(index as u32), status }));
            }
        }
        Ok(None)
    }

    /// Closes their input, waits until they are gone, and ends those that are not. Says which had ended by themselves,
    /// and how.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        let mut crashed = Vec::new();
        for (index, child) in self.children.iter_mut().enumerate() {
            if let Ok(Some(status)) = child.try_wait()
                && !status.success()
            {
                crashed.push(format!("the process of {} had ended ({status})", local_name(index as u32)));
            }
            drop(child.stdin.take());
        }
        for child in &mut self.children {
            if timeout(LEAVE_LIMIT, child.wait()).await.is_err() {
                // It may have gone in this very moment.
                let _ = child.kill().await;
            }
        }
        crashed
    }
}
