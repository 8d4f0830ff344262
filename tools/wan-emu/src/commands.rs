//! What each command does.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, ExitCode, Stdio};

use anyhow::{Context, bail};
use wan_emu::Error;
use wan_emu::children::{environment, exit_code};
use wan_emu::control::{self, Request};
use wan_emu::network::Network;
use wan_emu::notice::notice;
use wan_emu::session::{self, Job, Outcome};
use wan_emu::{emulation, lease, netns};

use crate::cli::{Command, Which};
use crate::show;

pub(crate) fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up { file, net, foreground: false, background: false } => up(&file, net.as_deref())?,
        Command::Up { file, net, background, .. } => return stay(&file, net.as_deref(), background),
        Command::Run { file, net, node, logs, cmd } => {
            let job = Job { runs: true, node, command: cmd, logs };
            return finish(session::run(Network::read(&file, net.as_deref())?, &job, || ())?);
        }
        Command::Exec { node, which, cmd } => return exec(&which.net()?, &node, &cmd),
        Command::Link(args) => {
            let net = args.which.net()?;
            control::ask(&net, &Request::Link { rule: Box::new(args.rule()) })?;
        }
        Command::Status { which, all, json } => show::status(&control::status(&which.net()?)?, all, json)?,
        Command::Measure { from, to, which, seconds, json } => {
            show::measure(&control::status(&which.net()?)?, &from, &to, seconds, json)?;
        }
        Command::Down { which, all } => return down(which, all),
        Command::Presets => show::presets()?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Which {
    /// The asked network, or the only one that is up.
    fn net(&self) -> Result<String, Error> {
        if let Some(net) = &self.net {
            return Ok(net.clone());
        }
        let up = emulation::networks().into_iter().filter(|net| lease::holder(net).is_some()).collect::<Vec<_>>();
        match up.as_slice() {
            [net] => Ok(net.clone()),
            [] => Err(Error::input("no network is up: `wan-emu up FILE` brings one up")),
            nets => Err(Error::input(format!("several networks are up, name one by --net: {}", nets.join(", ")))),
        }
    }
}

/// Starts this program again in the background, and waits until the network is up.
fn up(file: &Path, net: Option<&str>) -> anyhow::Result<()> {
    let network = Network::read(file, net)?;
    netns::check_machine()?;
    let log = lease::log(&network.name);
    if lease::holder(&network.name).is_some() {
        bail!(Error::InUse { net: network.name });
    }
    if let Some(directory) = log.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = process::Command::new(std::env::current_exe().context("cannot find this program")?)
        .arg("up")
        .arg(file)
        .args(["--background", "--net", &network.name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(output)
        .spawn()
        .context("cannot start the background process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot hear from the background process")?;
    }
    if line.trim() == "up" {
        notice(format_args!("network `{}` is up, `wan-emu down` takes it down", network.name));
        return Ok(());
    }
    let status = child.wait().context("cannot wait for the background process")?;
    let told = fs::read_to_string(&log).unwrap_or_default();
    bail!("the network did not come up ({status})\n{}", told.trim())
}

fn stay(file: &Path, net: Option<&str>, background: bool) -> anyhow::Result<ExitCode> {
    if background {
        // Away from the terminal's Ctrl-C. It fails only for the leader of a group, which is away already.
        let _ = rustix::process::setsid();
    }
    let network = Network::read(file, net)?;
    let name = network.name.clone();
    let ready = || {
        if background {
            // Without a reader nobody waits for it any more.
            let _ = writeln!(io::stdout(), "up").and_then(|()| io::stdout().flush());
        } else {
            notice(format_args!("network `{name}` is up, Ctrl-C takes it down"));
        }
    };
    match session::run(network, &Job::default(), ready)? {
        // Here a signal is the way to end it.
        Outcome::Signal(_) => Ok(ExitCode::SUCCESS),
        outcome => finish(outcome),
    }
}

fn finish(outcome: Outcome) -> anyhow::Result<ExitCode> {
    Ok(match outcome {
        Outcome::Done => ExitCode::SUCCESS,
        Outcome::Command(status) => ExitCode::from(exit_code(status)),
        // Told when it happened.
        Outcome::NodeFailed => ExitCode::FAILURE,
        Outcome::Signal(signal) => bail!("ended by signal {signal}, the network is down"),
        Outcome::Overtime => bail!("duration_s is over before the command ended, the network is down"),
    })
}

/// Becomes the command, so that signals and exit code are its own.
fn exec(net: &str, node: &str, words: &[OsString]) -> anyhow::Result<ExitCode> {
    let status = control::status(net)?;
    let Some(index) = status.nodes.iter().position(|it| it.name == node) else {
        let names: Vec<&str> = status.nodes.iter().map(|node| node.name.as_str()).collect();
        bail!(Error::input(format!("no node is named `{node}`; there are {}", names.join(", "))));
    };
    let mut command = netns::command(&status.nodes[index].namespace, words);
    let error = command.envs(environment(net, &status.nodes, Some(index))).exec();
    Err(error).context("cannot run `ip`")
}

fn down(which: Which, all: bool) -> anyhow::Result<ExitCode> {
    let nets = match which.net {
        Some(net) => vec![net],
        None => emulation::networks(),
    };
    if nets.len() > 1 && !all {
        bail!(Error::input(format!("there are several networks, name one by --net or use --all: {}", nets.join(", "))));
    }
    let mut found = false;
    for net in &nets {
        found |= emulation::down(net).with_context(|| format!("cannot take `{net}` down"))?;
    }
    if !found {
        notice("there is nothing to take down");
    }
    Ok(ExitCode::SUCCESS)
}
