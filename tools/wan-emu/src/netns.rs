//! Network namespaces, by way of `ip`: one for each node, named `wanemu.NETWORK.NODE`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::error::Error;

/// Begins the name of every namespace made here.
const PREFIX: &str = "wanemu.";
/// The one device of a node, besides loopback.
pub const DEVICE: &str = "wan0";
/// Packets that the kernel keeps for the router, so that a busy moment of the machine drops none.
const DEVICE_QUEUE: u32 = 4000;
/// Where `ip` keeps namespaces with a name.
const NAMED: &str = "/run/netns";
/// How long processes may take to end before they are killed.
const GRACE: Duration = Duration::from_secs(2);

/// Whether this machine can emulate at all.
///
/// # Errors
/// [`Error::Missing`] says what is not there.
pub fn check_machine() -> Result<(), Error> {
    let missing = |what, cure| Err(Error::Missing { what, cure });
    if !rustix::process::geteuid().is_root() {
        return missing("root", "namespaces and TUN devices need it, run as root");
    }
    if !Path::new("/dev/net/tun").exists() {
        return missing(
            "/dev/net/tun",
            "load the kernel module `tun` (modprobe tun), or pass the device to the container",
        );
    }
    if !Path::new("/proc/self/ns/net").exists() {
        return missing("the kernel's network namespaces", "use a kernel with CONFIG_NET_NS");
    }
    let ip = Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !ip.is_ok_and(|status| status.success()) {
        return missing("the program `ip`", "apt-get install -y iproute2");
    }
    Ok(())
}

/// Name of a node's namespace.
pub fn name(net: &str, node: &str) -> String {
    format!("{PREFIX}{net}.{node}")
}

/// The namespaces of a network that exist, whether it is up or was left over.
pub fn existing(net: &str) -> Vec<String> {
    let prefix = name(net, "");
    all().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

/// Names of all networks of which there is a namespace.
pub fn networks() -> Vec<String> {
    let mut nets: Vec<String> = all()
        .iter()
        .filter_map(|name| name.strip_prefix(PREFIX)?.split_once('.').map(|(net, _)| net.to_owned()))
        .collect();
    nets.sort();
    nets.dedup();
    nets
}

fn all() -> Vec<String> {
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with(PREFIX)).collect()
}

/// Makes a namespace with a TUN device of that address, and returns the device. Loopback is up; everything else goes
/// to the device.
///
/// # Errors
/// [`Error::Command`], [`Error::Io`].
pub fn create(namespace: &str, address: Ipv4Addr, mtu: u16) -> Result<SyncDevice, Error> {
    ip(&["netns", "add", namespace], "")?;
    let device = within(namespace, || -> io::Result<SyncDevice> {
        // The router speaks IPv4 only; a kernel without IPv6 has no such file.
        let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
        let device = DeviceBuilder::new()
            .name(DEVICE)
            .mtu(mtu)
            .with(|builder| {
                builder.offload(true).tx_queue_len(DEVICE_QUEUE);
            })
            .enable(false)
            .build_sync()?;
        device.set_nonblocking(true)?;
        Ok(device)
    })?
    .map_err(Error::io(format!("make a TUN device in namespace {namespace}")))?;
    let batch = format!(
        "link set lo up\naddr add {address}/24 dev {DEVICE}\nlink set {DEVICE} up\nroute add default dev {DEVICE}\n"
    );
    ip(&["-n", namespace, "-batch", "-"], &batch)?;
    Ok(device)
}

/// Packets that a node's device dropped because the router did not read them in time.
pub fn overrun(namespace: &str) -> u64 {
    let table = within(namespace, || fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default());
    let table = table.unwrap_or_default();
    let line = table.lines().find_map(|line| line.trim().strip_prefix(DEVICE)?.strip_prefix(':'));
    // Eight columns of what was received, then bytes, packets, errors and drops of what was sent.
    line.and_then(|line| line.split_whitespace().nth(11)?.parse().ok()).unwrap_or_default()
}

/// Ends whatever runs in a namespace and deletes it.
///
/// # Errors
/// [`Error::Command`].
pub fn delete(namespace: &str) -> Result<(), Error> {
    end_processes(namespace);
    ip(&["netns", "del", namespace], "").map(drop)
}

/// Ends whatever runs in these namespaces, at first gently.
pub fn end_all_processes(namespaces: &[String]) {
    let signal = |signal| {
        let pids: Vec<Pid> = namespaces.iter().flat_map(|namespace| processes(namespace)).collect();
        for pid in &pids {
            // It may have ended by itself meanwhile.
            let _ = rustix::process::kill_process(*pid, signal);
        }
        pids.is_empty()
    };
    let patience = Instant::now() + GRACE;
    while !signal(if Instant::now() < patience { Signal::TERM } else { Signal::KILL }) {
        // The kernel may need a moment for those killed; a process that it cannot end is not waited for.
        if Instant::now() > patience + GRACE {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn end_processes(namespace: &str) {
    end_all_processes(&[namespace.to_owned()]);
}

/// Processes in a namespace, but not this one, whose threads may visit it.
fn processes(namespace: &str) -> Vec<Pid> {
    let listed = ip(&["netns", "pids", namespace], "").unwrap_or_default();
    let own = rustix::process::getpid();
    listed.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)).filter(|pid| *pid != own).collect()
}

/// A command that runs in a namespace: `ip` replaces itself by it, so that it gets the signals and the exit code.
pub fn command<S: AsRef<OsStr>>(namespace: &str, words: &[S]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).args(words);
    command
}

/// Runs a function within a namespace, in a thread of its own: sockets and devices it makes stay there.
///
/// # Errors
/// [`Error::Io`] where there is no such namespace.
pub fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let enter = || -> io::Result<()> {
        let namespace = File::open(Path::new(NAMED).join(namespace))?;
        Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
    };
    let visit = || {
        enter().map_err(Error::io(format!("enter namespace {namespace}")))?;
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(visit).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Calls `ip` and returns what it printed.
fn ip(words: &[&str], input: &str) -> Result<String, Error> {
    let call = || -> io::Result<_> {
        let mut child = Command::new("ip")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let command = || format!("ip {}", words.join(" "));
    let output = call().map_err(Error::io(format!("run `{}`", command())))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Command { command: command(), output })
}
