//! CompNode processes on this machine; none outlives its parent.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use fusionllm_broker::Broker;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// How long a CompNode on this machine may take to join: it opens its device first.
const JOIN_LIMIT: Duration = Duration::from_secs(60);
/// How long one may take to leave when asked.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at who has joined.
const LOOK: Duration = Duration::from_millis(20);

/// Child processes that compute for a broker in this process.
///
/// Each holds the read end of a pipe as its standard input and leaves when that closes, however we end.
pub(crate) struct LocalCompNodes {
    children: Vec<Child>,
}

impl LocalCompNodes {
    /// Starts `count` of them one after another, so that names and joining order agree.
    /// They share the cores. With `fresh_profile` they measure their device again.
    pub(crate) async fn start(broker: &Broker, count: u32, device: &str, fresh_profile: bool) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the program's own path")?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (cores / count.max(1) as usize).max(1).to_string();
        let mut started = Self { children: Vec::new() };
        for index in 0..count {
            let child = Command::new(&program)
                .args(["join", "--child", "--bind", "127.0.0.1:0", "--device", device])
                .args(["--name", &format!("compnode-{index}"), "--threads", &threads])
                .args(fresh_profile.then_some("--fresh-profile"))
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
            if let Some(child) = self.children.last_mut()
                && let Some(status) = child.try_wait()?
            {
                bail!("CompNode {} ended before it joined ({status})", joined - 1);
            }
            if Instant::now() > deadline {
                bail!("CompNode {} did not join within {} s", joined - 1, JOIN_LIMIT.as_secs());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Closes their input, waits until they are gone, and ends those that are not. Says which had ended by themselves,
    /// and how.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        let mut crashed = Vec::new();
        for (index, child) in self.children.iter_mut().enumerate() {
            if let Ok(Some(status)) = child.try_wait()
                && !status.success()
            {
                crashed.push(format!("the process of compnode-{index} had ended ({status})"));
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
