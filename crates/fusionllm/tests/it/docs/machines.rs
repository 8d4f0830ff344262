//! Machines: network namespaces on one bridge, where this process may make them, else this machine alone.

use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::process::text;

/// Where each machine has its address: the first is 10.98.0.1.
const NETWORK: &str = "10.98.0";
/// The outer addresses of the pages, which lead to the machines as forwarded ports do: the first has 203.0.113.9.
const OUTER: (&str, usize) = ("203.0.113", 8);

/// Some machines. Nothing of them is left when this goes, nor when the process is killed: namespaces have no names,
/// and end with the process that holds them, which ends by itself.
#[derive(Debug)]
pub(super) struct Machines {
    holders: Vec<Holder>,
}

impl Machines {
    /// This many machines, or why there can be none.
    pub(super) fn new(count: usize) -> Result<Self, String> {
        let switch = Holder::new()?;
        switch.ip("link add br0 type bridge")?;
        switch.ip("link set br0 up")?;
        let mut holders = Vec::new();
        for index in 1..=count {
            let machine = Holder::new()?;
            switch.ip(&format!("link add v{index} type veth peer name eth0 netns {}", machine.0.id()))?;
            switch.ip(&format!("link set v{index} master br0 up"))?;
            machine.ip("link set lo up")?;
            machine.ip(&format!("addr add {NETWORK}.{index}/24 dev eth0"))?;
            machine.ip("link set eth0 up")?;
            let (outer, before) = OUTER;
            machine.ip(&format!("addr add {outer}.{}/32 dev lo", before + index))?;
            for other in (1..=count).filter(|other| *other != index) {
                machine.ip(&format!("route add {outer}.{} via {NETWORK}.{other}", before + other))?;
            }
            machine.ip("route add default dev eth0")?;
            holders.push(machine);
        }
        holders.push(switch);
        Ok(Self { holders })
    }

    /// What stands before a command that runs on this machine.
    pub(super) fn enter(&self, machine: usize) -> Vec<String> {
        self.holders[machine].enter()
    }
}

/// A process that does nothing in a network namespace of its own, and so keeps it.
#[derive(Debug)]
struct Holder(Child);

impl Holder {
    fn new() -> Result<Self, String> {
        let fail = |e: std::io::Error| format!("unshare: {e}");
        let child = Command::new("unshare")
            .args(["-n", "sleep", "600"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(fail)?;
        let mut holder = Self(child);
        let namespace = |process: &str| std::fs::metadata(format!("/proc/{process}/ns/net")).map(|m| m.ino()).ok();
        let deadline = Instant::now() + Duration::from_secs(10);
        while namespace(&holder.0.id().to_string()).is_none_or(|inode| Some(inode) == namespace("self")) {
            let ended = holder.0.try_wait().map_err(fail)?.is_some();
            if ended || Instant::now() > deadline {
                let mut reason = String::new();
                if let Some(mut stderr) = holder.0.stderr.take().filter(|_| ended) {
                    std::io::Read::read_to_string(&mut stderr, &mut reason).map_err(fail)?;
                }
                return Err(format!("no network namespace can be made: {}", reason.trim()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(holder)
    }

    fn enter(&self) -> Vec<String> {
        ["nsenter", "-t", &self.0.id().to_string(), "-n", "--"].map(str::to_owned).to_vec()
    }

    fn ip(&self, arguments: &str) -> Result<(), String> {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        let output = command.args(&enter[1..]).arg("ip").args(arguments.split_whitespace()).output();
        let output = output.map_err(|e| format!("nsenter: {e}"))?;
        if output.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {}", text(&output.stderr).trim())) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It has mostly been there until now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
