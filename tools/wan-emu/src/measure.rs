//! What an emulated link really does: round-trip time, goodput and loss between two namespaces, by plain sockets.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::error::Error;
use crate::netns::within;
use crate::urgent::make_urgent;

/// Longest that one attempt to connect or to read may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Datagrams that one call hands to the kernel, as QUIC stacks do.
const DATAGRAMS: usize = 10;
/// Bytes of payload of a datagram.
const DATAGRAM: usize = 1400;
/// Sockets' buffers: as much as most machines allow.
const SOCKET_BUFFER: usize = 4 << 20;

/// One end: a namespace and its address.
#[derive(Debug, Clone)]
pub struct End {
    /// Name of the namespace.
    pub namespace: String,
    /// Address within.
    pub address: Ipv4Addr,
}

/// What became of a flood of datagrams.
#[derive(Debug, Clone, Copy)]
pub struct Flood {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams received.
    pub received: u64,
    /// Payload that arrived in the time measured, in Mbit/s.
    pub mbit_per_s: f64,
}

impl Flood {
    /// Share of the datagrams that did not arrive.
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }
}

/// Round-trip times of `count` small datagrams, sent one after the other, sorted; those lost are left out.
///
/// # Errors
/// [`Error::Io`].
pub fn round_trips(from: &End, to: &End, count: usize) -> Result<Vec<Duration>, Error> {
    let far = within(&to.namespace, || bind_udp(to.address))?.map_err(Error::io("bind a socket"))?;
    let near = within(&from.namespace, || bind_udp(from.address))?.map_err(Error::io("bind a socket"))?;
    let ping = || -> io::Result<Vec<Duration>> {
        make_urgent();
        near.connect(far.local_addr()?)?;
        near.set_read_timeout(Some(PATIENCE / 2))?;
        let mut times = Vec::new();
        for number in 0..count as u64 {
            let sent = Instant::now();
            near.send(&number.to_ne_bytes())?;
            let mut answer = [0; 8];
            // An answer that comes after all to an earlier one is passed over.
            while let Some(8) = ignore_timeout(near.recv(&mut answer))? {
                if u64::from_ne_bytes(answer) == number {
                    times.push(sent.elapsed());
                    break;
                }
            }
        }
        // Empty: the echo may end.
        near.send(&[])?;
        times.sort();
        Ok(times)
    };
    thread::scope(|scope| {
        // Both urgent: it is the link that is measured, not who else wants the CPU.
        let (echo, ping) = (scope.spawn(|| echo(&far)), scope.spawn(ping));
        let times = ping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let echoed = echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        echoed.and(times).map_err(Error::io("measure round-trip times"))
    })
}

/// Payload that one TCP connection carries in the `window` after `warm_up`, in Mbit/s.
///
/// # Errors
/// [`Error::Io`].
pub fn tcp_goodput(from: &End, to: &End, warm_up: Duration, window: Duration) -> Result<f64, Error> {
    let listener = within(&to.namespace, || TcpListener::bind((to.address, 0)))?.map_err(Error::io("listen"))?;
    let address = listener.local_addr().map_err(Error::io("listen"))?;
    let connect = || TcpStream::connect_timeout(&address, PATIENCE);
    let mut near = within(&from.namespace, connect)?.map_err(Error::io(format!("connect to {address}")))?;
    let end = Instant::now() + warm_up + window;
    let receive = || -> io::Result<f64> {
        let (mut far, _) = listener.accept()?;
        far.set_read_timeout(Some(PATIENCE))?;
        let begin = end - window;
        let (mut buffer, mut bytes) = (vec![0; 1 << 18], 0);
        while Instant::now() < end {
            let got = far.read(&mut buffer)?;
            if Instant::now() >= begin {
                bytes += got;
            }
            if got == 0 {
                break;
            }
        }
        Ok(mbit(bytes, window))
    };
    let send = move || -> io::Result<()> {
        near.set_write_timeout(Some(PATIENCE))?;
        let block = vec![0x5a; 1 << 17];
        while Instant::now() < end {
            near.write_all(&block)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        // Its error says only that the receiver had enough.
        scope.spawn(send);
        receive().map_err(Error::io("measure TCP goodput"))
    })
}

/// Sends datagrams of `size` bytes at `offered` Mbit/s for `window`. `batched` hands several to the kernel at once.
///
/// # Errors
/// [`Error::Io`].
pub fn udp_flood(
    from: &End,
    to: &End,
    offered: f64,
    window: Duration,
    size: usize,
    batched: bool,
) -> Result<Flood, Error> {
    let far = within(&to.namespace, || bind_udp(to.address))?.map_err(Error::io("bind a socket"))?;
    let near = within(&from.namespace, || bind_udp(from.address))?.map_err(Error::io("bind a socket"))?;
    let datagrams = if batched { DATAGRAMS } else { 1 };
    let options = || -> io::Result<()> {
        near.connect(far.local_addr()?)?;
        setsockopt(&near, sockopt::SndBuf, &SOCKET_BUFFER)?;
        setsockopt(&far, sockopt::RcvBuf, &SOCKET_BUFFER)?;
        setsockopt(&far, sockopt::UdpGroSegment, &true)?;
        if batched {
            setsockopt(&near, sockopt::UdpGsoSegment, &(size as i32))?;
        }
        Ok(())
    };
    options().map_err(Error::io("set up sockets"))?;
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&far, size));
        let sent = send_paced(&near, size * datagrams, offered, window);
        let received = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (received, time) = received.map_err(Error::io("receive"))?;
        let sent = sent.map_err(Error::io("send"))? * datagrams as u64;
        // A receiver that gets the CPU late finds much at once, but no link carried it in less time than it was sent in.
        Ok(Flood { sent, received, mbit_per_s: mbit(received as usize * size, time.max(window)) })
    })
}

/// As [`udp_flood`] with full datagrams, handed over in batches.
///
/// # Errors
/// [`Error::Io`].
pub fn udp_goodput(from: &End, to: &End, offered: f64, window: Duration) -> Result<Flood, Error> {
    udp_flood(from, to, offered, window, DATAGRAM, true)
}

/// Keeps to the offered rate on the whole: what a busy machine holds up is sent later.
fn send_paced(near: &UdpSocket, size: usize, offered: f64, window: Duration) -> io::Result<u64> {
    let block = vec![0x5a; size];
    let start = Instant::now();
    let mut sent = 0_u64;
    while start.elapsed() < window {
        let due = (start.elapsed().as_secs_f64() * offered * 1e6 / 8.0 / size as f64) as u64 + 1;
        while sent < due && start.elapsed() < window {
            match near.send(&block) {
                Ok(_) => sent += 1,
                // The device's queue is full.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => break,
                Err(error) => return Err(error),
            }
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(sent)
}

/// Datagrams received until half a second of silence, and the time from the first to the last.
fn receive(far: &UdpSocket, size: usize) -> io::Result<(u64, Duration)> {
    let mut buffer = vec![0; 1 << 16];
    far.set_read_timeout(Some(PATIENCE))?;
    let (mut count, mut first, mut last) = (0, None, Instant::now());
    while let Some(got) = ignore_timeout(far.recv(&mut buffer))? {
        // The first arrival starts the clock, so it is not part of what the time carried.
        last = Instant::now();
        if first.is_none() {
            first = Some(last);
            far.set_read_timeout(Some(Duration::from_millis(500)))?;
        }
        count += got.div_ceil(size) as u64;
    }
    Ok((count, first.map_or(Duration::ZERO, |first| last - first)))
}

fn echo(far: &UdpSocket) -> io::Result<()> {
    make_urgent();
    far.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 64];
    while let Ok((length, peer)) = far.recv_from(&mut buffer) {
        if length == 0 {
            break;
        }
        far.send_to(&buffer[..length], peer)?;
    }
    Ok(())
}

fn bind_udp(address: Ipv4Addr) -> io::Result<UdpSocket> {
    UdpSocket::bind(SocketAddr::from((address, 0)))
}

fn ignore_timeout(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(got) => Ok(Some(got)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
        Err(error) => Err(error),
    }
}

fn mbit(bytes: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { bytes as f64 * 8e-6 / time.as_secs_f64() }
}
