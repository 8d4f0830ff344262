//! A network that is up: its namespaces, its router, and its end.

use std::io;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use crate::control::{LinkStatus, NodeStatus, Request, Status, ask};
use crate::error::Error;
use crate::lease::{self, Lease};
use crate::link::LinkRule;
use crate::netns;
use crate::network::{Network, pairs};
use crate::notice::notice;
use crate::router::Router;

/// How long a network may take to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(15);

/// A network that is up. Dropped, it is taken down.
#[derive(Debug)]
pub struct Emulation {
    network: Network,
    router: Option<Router>,
    since: Instant,
    /// Last, so that the name is free only when all is gone.
    _lease: Lease,
}

impl Emulation {
    /// Brings a network up; leftovers of one of that name are replaced. `ended` is called if its router cannot go on.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::InUse`], and what making namespaces and devices fails with.
    pub fn up(network: Network, ended: impl FnOnce(io::Error) + Send + 'static) -> Result<Self, Error> {
        netns::check_machine()?;
        let lease = Lease::take(&network.name)?;
        clean(&network.name)?;
        // From here on, whatever was made is unmade on the way out.
        let mut this = Self { network, router: None, since: Instant::now(), _lease: lease };
        let mut devices = Vec::new();
        for (index, node) in this.network.nodes.iter().enumerate() {
            devices.push(netns::create(&this.namespace(index), node.address, this.network.mtu)?);
        }
        this.router = Some(Router::start(&this.network, devices, ended)?);
        this.since = Instant::now();
        Ok(this)
    }

    /// The network as it is now.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// When it came up.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Namespace of a node.
    pub fn namespace(&self, node: usize) -> String {
        netns::name(&self.network.name, &self.network.nodes[node].name)
    }

    /// Changes links.
    ///
    /// # Errors
    /// As [`Network::change`] and [`Router::change`].
    pub fn change(&mut self, rule: &LinkRule) -> Result<(), Error> {
        let changed = self.network.change(rule)?;
        let Some(router) = &self.router else { return Ok(()) };
        changed.into_iter().try_for_each(|(from, to)| router.change(from, to, self.network.link(from, to).clone()))
    }

    /// What it is and does.
    ///
    /// # Errors
    /// [`Error::Router`].
    pub fn status(&self) -> Result<Status, Error> {
        let nodes = &self.network.nodes;
        let (counters, health) = self.router.as_ref().map(Router::report).transpose()?.unwrap_or_default();
        let node = |(index, node): (usize, &crate::network::Node)| NodeStatus {
            name: node.name.clone(),
            site: node.site.clone(),
            address: node.address,
            namespace: self.namespace(index),
            up_mbit_per_s: node.access.up.map(|bits| bits / 1e6),
            down_mbit_per_s: node.access.down.map(|bits| bits / 1e6),
            overrun: netns::overrun(&self.namespace(index)),
        };
        let link = |(from, to): (usize, usize)| {
            let link = self.network.link(from, to);
            LinkStatus {
                from: nodes[from].name.clone(),
                to: nodes[to].name.clone(),
                mbit_per_s: link.bits_per_s / 1e6,
                latency_ms: link.latency.as_secs_f64() * 1e3,
                jitter_ms: link.jitter.as_secs_f64() * 1e3,
                loss_percent: link.loss * 100.0,
                queue_bytes: link.queue.bytes(link.bits_per_s),
                cut: link.cut,
                counters: counters.get(from * nodes.len() + to).copied().unwrap_or_default(),
            }
        };
        Ok(Status {
            net: self.network.name.clone(),
            pid: process::id(),
            health,
            up_s: self.since.elapsed().as_secs_f64(),
            nodes: nodes.iter().enumerate().map(node).collect(),
            links: pairs(nodes.len()).map(link).collect(),
        })
    }
}

impl Drop for Emulation {
    fn drop(&mut self) {
        // Processes end first, so that they can still say goodbye to each other.
        netns::end_all_processes(&netns::existing(&self.network.name));
        if let Some(router) = &mut self.router {
            router.stop();
        }
        if let Err(error) = clean(&self.network.name) {
            notice(format_args!("{error}; `wan-emu down --net {}` tries again", self.network.name));
        }
    }
}

/// Deletes the namespaces of a network whose name this process holds.
fn clean(net: &str) -> Result<(), Error> {
    let namespaces = netns::existing(net);
    netns::end_all_processes(&namespaces);
    // One that cannot be deleted does not keep the others.
    namespaces.iter().map(|namespace| netns::delete(namespace)).fold(Ok(()), Result::and)
}

/// Takes a network down, whether its process lives, hangs or was killed. `false` if there was nothing.
///
/// # Errors
/// What deleting namespaces fails with, and [`Error::InUse`] where the process that holds it cannot be ended.
pub fn down(net: &str) -> Result<bool, Error> {
    let holder = lease::holder(net);
    let is_there = holder.is_some() || !netns::existing(net).is_empty();
    if let Some(pid) = holder {
        use rustix::process::{Signal, kill_process};
        let asked = ask(net, &Request::Down);
        if asked.is_err() || !has_ended(net, PATIENCE) {
            // It may end between the question and the signal.
            let _ = kill_process(pid, Signal::TERM);
            if !has_ended(net, PATIENCE) {
                let _ = kill_process(pid, Signal::KILL);
                has_ended(net, PATIENCE);
            }
        }
    }
    if is_there {
        let _lease = Lease::take(net)?;
        clean(net)?;
    }
    // The log of a network in the background outlives it only where it failed.
    let _ = std::fs::remove_file(lease::log(net));
    Ok(is_there)
}

fn has_ended(net: &str, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    while lease::holder(net).is_some() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Names of all networks that are up or were left over.
pub fn networks() -> Vec<String> {
    let mut nets = netns::networks();
    nets.extend(lease::networks());
    nets.sort();
    nets.dedup();
    nets
}
