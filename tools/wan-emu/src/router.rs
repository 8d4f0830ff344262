//! The thread that carries the packets: reads the TUN devices, asks the [`Fabric`] when each packet arrives, and writes
//! it to its receiver's device at that time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::{Deserialize, Serialize};
use tun_rs::{SyncDevice, VIRTIO_NET_HDR_LEN};

use crate::error::Error;
use crate::fabric::{Counters, Fabric};
use crate::link::Link;
use crate::network::Network;
use crate::packet::Unit;
use crate::pipe::Nanos;
use crate::urgent::make_urgent;

/// Largest packet that a TUN device hands over.
const BUFFER: usize = VIRTIO_NET_HDR_LEN + 65_536;
/// Packets read from one device before others, and what is due, get their turn.
const BATCH: usize = 32;
/// A packet may be delivered so much too early: to wake up costs about as much, and two packets due at nearly the same
/// time then need one wake-up.
const EARLY: Nanos = 60_000;
/// From when on a delivery counts as late.
const LATE: Nanos = 1_000_000;

/// What became of each directed pair's packets, row by row, and how well the router keeps up.
pub type Report = (Vec<Counters>, Health);

/// How well the router keeps up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// The most that a delivery was late, in milliseconds.
    pub latest_ms: f64,
    /// Deliveries more than a millisecond late.
    pub late: u64,
    /// Whether its thread has real-time priority; without, other processes hold it up.
    pub real_time: bool,
}

enum Request {
    Change(usize, usize, Link),
    Report(SyncSender<Report>),
    Stop,
}

/// The running router.
#[derive(Debug)]
pub struct Router {
    requests: Sender<Request>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    /// Starts it; `devices` in the order of the network's nodes. `ended` is called if it cannot go on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start(
        network: &Network,
        devices: Vec<SyncDevice>,
        ended: impl FnOnce(io::Error) + Send + 'static,
    ) -> Result<Self, Error> {
        let access: Vec<_> = network.nodes.iter().map(|node| node.access).collect();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(Error::io("make an eventfd"))?;
        let wake = Arc::new(wake);
        let (requests, inbox) = channel();
        let carrier = Carrier {
            fabric: Fabric::new(&access, &network.links, network.seed),
            devices,
            inbox,
            wake: Arc::clone(&wake),
            start: Instant::now(),
            buffer: vec![0; BUFFER],
            health: Health::default(),
        };
        let run = move || {
            if let Err(error) = carrier.run() {
                ended(error);
            }
        };
        let thread =
            thread::Builder::new().name("router".to_owned()).spawn(run).map_err(Error::io("start a thread"))?;
        Ok(Self { requests, wake, thread: Some(thread) })
    }

    /// Gives a directed link new numbers.
    ///
    /// # Errors
    /// [`Error::Router`] if it ended.
    pub fn change(&self, from: usize, to: usize, link: Link) -> Result<(), Error> {
        self.send(Request::Change(from, to, link))
    }

    /// What it did so far.
    ///
    /// # Errors
    /// [`Error::Router`] if it ended.
    pub fn report(&self) -> Result<Report, Error> {
        let (reply, answer) = sync_channel(1);
        self.send(Request::Report(reply))?;
        answer.recv_timeout(Duration::from_secs(5)).map_err(|_| ended())
    }

    /// Ends it; the devices vanish with it.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.send(Request::Stop);
            let _ = thread.join();
        }
    }

    fn send(&self, request: Request) -> Result<(), Error> {
        self.requests.send(request).map_err(|_| ended())?;
        rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()).map_err(Error::io("wake the router"))?;
        Ok(())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop();
    }
}

fn ended() -> Error {
    Error::Router { reason: "it does not answer".to_owned() }
}

struct Carrier {
    fabric: Fabric,
    devices: Vec<SyncDevice>,
    inbox: Receiver<Request>,
    wake: Arc<OwnedFd>,
    start: Instant,
    buffer: Vec<u8>,
    health: Health,
}

impl Carrier {
    fn run(mut self) -> io::Result<()> {
        self.health.real_time = make_urgent();
        loop {
            let ready = self.wait()?;
            if ready[self.devices.len()] && !self.serve()? {
                return Ok(());
            }
            for (node, ready) in ready.iter().take(self.devices.len()).enumerate() {
                if *ready {
                    self.read(node)?;
                    self.deliver();
                }
            }
            self.deliver();
        }
    }

    /// Waits until a device has packets, a request is there (the last of the flags), or a packet is due.
    fn wait(&self) -> io::Result<Vec<bool>> {
        let wait = self.fabric.next_due().map(|at| at.saturating_sub(self.now() + EARLY));
        let timeout =
            wait.map(|ns| Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 });
        let mut fds: Vec<PollFd<'_>> =
            self.devices.iter().map(|device| PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)).collect();
        fds.push(PollFd::new(&*self.wake, PollFlags::IN));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => Ok(vec![false; fds.len()]),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves the requests; `false` means stop.
    fn serve(&mut self) -> io::Result<bool> {
        rustix::io::read(&*self.wake, &mut [0_u8; 8])?;
        loop {
            match self.inbox.try_recv() {
                Ok(Request::Change(from, to, link)) => self.fabric.change(from, to, link),
                // Who asked may have lost patience.
                Ok(Request::Report(reply)) => drop(reply.try_send((self.fabric.counters(), self.health))),
                Ok(Request::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => return Ok(true),
            }
        }
    }

    fn read(&mut self, node: usize) -> io::Result<()> {
        for _ in 0..BATCH {
            match self.devices[node].recv(&mut self.buffer) {
                Ok(length) => {
                    let now = self.now();
                    let Some(unit) = Unit::parse(&self.buffer[..length]) else { continue };
                    if let Some(to) = self.receiver(&unit) {
                        self.fabric.arrive(now, node, to, unit);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Addresses are 10.77.0.1, 10.77.0.2 and so on; what goes elsewhere goes nowhere.
    fn receiver(&self, unit: &Unit) -> Option<usize> {
        match unit.destination().octets() {
            [10, 77, 0, last] if (1..=self.devices.len()).contains(&usize::from(last)) => Some(usize::from(last) - 1),
            _ => None,
        }
    }

    fn deliver(&mut self) {
        let now = self.now();
        if let Some(late) = self.fabric.next_due().and_then(|at| now.checked_sub(at)) {
            self.health.latest_ms = self.health.latest_ms.max(late as f64 / 1e6);
            self.health.late += u64::from(late > LATE);
        }
        let now = now + EARLY;
        while let Some((to, unit)) = self.fabric.next_out(now) {
            // A node whose device was taken down (`ip link set wan0 down`) refuses; so does an unplugged machine.
            let _ = self.devices[to].send(unit.as_bytes());
        }
    }

    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos() as Nanos
    }
}
