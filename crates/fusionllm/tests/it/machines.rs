//! Machines: network namespaces on one bridge, where this process may make them, else this machine alone.

use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::process::text;

/// Where each machine has its address: the first is 10.98.0.1.
const NETWORK: &str = "10.98.0";
/// The outer addresses of the pages, which lead to the machines as forwarded ports do: the first has 203.0.113.9.
const OUTER: (&str, usize) = ("203.0.113", 8);

/// How a router translates addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Nat {
    /// To the same outer port whoever is talked to, as most routers at home do.
    Cone,
    /// To another port for each who is talked to.
    Symmetric,
}

/// Some machines. Nothing of them is left when this goes, nor when the process is killed: namespaces have no names,
/// and end with the process that holds them, which ends by itself.
#[derive(Debug)]
pub(crate) struct Machines {
    holders: Vec<Holder>,
}

impl Machines {
    /// This many machines, or why there can be none.
    pub(crate) fn new(count: usize) -> Result<Self, String> {
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

    /// The first machine, and others that reach it and not each other.
    pub(crate) fn apart(count: usize) -> Result<Self, String> {
        let hub = Holder::new()?;
        hub.ip("link set lo up")?;
        hub.forward(false)?;
        let mut holders = vec![];
        for index in 1..count {
            let machine = Holder::new()?;
            hub.ip(&format!("link add v{index} type veth peer name eth0 netns {}", machine.0.id()))?;
            hub.ip(&format!("addr add 10.98.{index}.1/24 dev v{index}"))?;
            hub.ip(&format!("link set v{index} up"))?;
            machine.ip("link set lo up")?;
            machine.ip(&format!("addr add 10.98.{index}.2/24 dev eth0"))?;
            machine.ip("link set eth0 up")?;
            machine.ip(&format!("route add default via 10.98.{index}.1"))?;
            holders.push(machine);
        }
        holders.insert(0, hub);
        Ok(Self { holders })
    }

    /// The first machine, and others that are each behind a router which translates their addresses. All of these have the
    /// same address at home.
    pub(crate) fn behind_routers(count: usize, nat: Nat) -> Result<Self, String> {
        let found = Command::new("nft").arg("--version").output();
        found.map_err(|e| format!("nft, which sets up routers (apt-get install -y nftables): {e}"))?;
        let (switch, hub) = (Holder::new()?, Holder::new()?);
        switch.ip("link add br0 type bridge")?;
        switch.ip("link set br0 up")?;
        let plug = |holder: &Holder, index: usize| {
            switch.ip(&format!("link add v{index} type veth peer name wan0 netns {}", holder.0.id()))?;
            switch.ip(&format!("link set v{index} master br0 up"))?;
            holder.ip("link set lo up")?;
            holder.ip(&format!("addr add {NETWORK}.{index}/24 dev wan0"))?;
            holder.ip("link set wan0 up")
        };
        plug(&hub, 1)?;
        let (mut homes, mut others) = (vec![hub], Vec::new());
        for index in 2..=count {
            let (router, home) = (Holder::new()?, Holder::new()?);
            plug(&router, index)?;
            router.ip(&format!("link add in0 type veth peer name eth0 netns {}", home.0.id()))?;
            router.ip("addr add 192.168.1.1/24 dev in0")?;
            router.ip("link set in0 up")?;
            home.ip("link set lo up")?;
            home.ip("addr add 192.168.1.2/24 dev eth0")?;
            home.ip("link set eth0 up")?;
            home.ip("route add default via 192.168.1.1")?;
            router.forward(true)?;
            router.translate(nat)?;
            homes.push(home);
            others.push(router);
        }
        others.push(switch);
        homes.extend(others);
        Ok(Self { holders: homes })
    }

    /// What stands before a command that runs on this machine.
    pub(crate) fn enter(&self, machine: usize) -> Vec<String> {
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
        self.inside(&format!("ip {arguments}"))
    }

    /// Whether it passes on what is for others.
    fn forward(&self, forwards: bool) -> Result<(), String> {
        self.inside(&format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(forwards)))
    }

    /// Has everybody behind it seen as one address, and lets nobody in who was not asked.
    fn translate(&self, nat: Nat) -> Result<(), String> {
        let ports = match nat {
            Nat::Cone => "",
            Nat::Symmetric => " fully-random",
        };
        for line in [
            "add table ip t".to_owned(),
            "add chain ip t out { type nat hook postrouting priority 100; }".to_owned(),
            format!("add rule ip t out oifname wan0 masquerade{ports}"),
            "add chain ip t in { type filter hook input priority 0; }".to_owned(),
            "add rule ip t in iifname wan0 ct state new drop".to_owned(),
        ] {
            self.inside(&format!("nft '{line}'"))?;
        }
        Ok(())
    }

    fn inside(&self, line: &str) -> Result<(), String> {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        let output = command.args(&enter[1..]).args(["sh", "-c", line]).output();
        let output = output.map_err(|e| format!("nsenter: {e}"))?;
        if output.status.success() { Ok(()) } else { Err(format!("{line}: {}", text(&output.stderr).trim())) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It has mostly been there until now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
