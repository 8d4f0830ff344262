//! The shell around the core: sockets, files, clock.
//!
//! One task, the [`actor`], owns the core; every connection has tasks of its own that talk to it. One thread, the
//! [`files`] keeper, writes run directories and the store, in the order in which the core decided.

mod actor;
mod answers;
mod blob;
mod client;
mod command;
mod compnode;
mod events;
mod files;
mod gate;
mod handle;
mod late_report;
mod listen;
mod open_runs;
mod records;
mod refusals;
mod returned;
mod run_files;
mod start;
mod state;
mod watched;
mod work;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fusionllm_protocol::{Inventory, JobId, JobSpec, StatusReport, TicketRole};
use fusionllm_transport::{
    AdmitOnTrial, Endpoint, EndpointConfig, Identity, Relay, RelayListener, RelayServer, RelayToken, Secret, Ticket,
    make_private_dir,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use events::{JobEvents, Submitted};

use crate::BrokerError;
use crate::core::{Core, Restored, ResumedBy};
use crate::files::io_error;
use crate::reach::Reach;
use crate::report::RunReport;
use crate::resume::{Resumption, checkpoints_in};
use crate::store::Store;
use command::{Command, RunDirChoice};
use gate::Gate;
use handle::{Handle, Taken, blocking};
use open_runs::OpenRuns;
use start::{restored, start_at};
use watched::Watched;

/// How long connections may take to say goodbye.
const GOODBYE_LIMIT: Duration = Duration::from_secs(3);
/// Requests that may wait for the actor.
const COMMAND_QUEUE: usize = 256;

/// What a broker is made of.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Where it listens; port 0 takes any.
    pub bind: SocketAddr,
    /// Further addresses under which it is reached, such as a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Port of a relay of the broker's own, of TCP and UDP, 0 takes any; nothing: it has none.
    pub relay: Option<u16>,
    /// Key, tickets and job records. Nobody else on the machine may use it.
    pub state_dir: PathBuf,
    /// Where run directories are made.
    pub runs_dir: PathBuf,
    /// Where jobs may put checkpoints besides `runs_dir`.
    pub checkpoint_dirs: Vec<PathBuf>,
    /// Where models and cluster files may lie that others than the broker's own user name.
    pub model_dirs: Vec<PathBuf>,
    /// An existing folder for weights on their way to CompNodes; nothing: `state_dir`.
    pub scratch: Option<PathBuf>,
    /// What to name where a job ends early.
    pub resumed_by: ResumedBy,
}

/// A running broker.
#[derive(Debug)]
pub struct Broker {
    ticket: Ticket,
    ticket_path: PathBuf,
    handle: Handle,
    endpoint: Endpoint,
    relay: Option<RelayServer>,
    listener: JoinHandle<()>,
    actor: Watched,
}

impl Broker {
    /// Starts a broker.
    ///
    /// # Errors
    /// [`BrokerError`] if the address or the state directory cannot be had, or the store is damaged.
    pub async fn start(config: BrokerConfig) -> Result<Self, BrokerError> {
        let path = config.state_dir.clone();
        Self::start_on(config).await.map_err(|error| match error.is_disk_full() {
            true => BrokerError::StateFull { path, reason: error.to_string() },
            false => error,
        })
    }

    async fn start_on(config: BrokerConfig) -> Result<Self, BrokerError> {
        let BrokerConfig {
            bind,
            advertise,
            relay,
            state_dir,
            runs_dir,
            checkpoint_dirs,
            model_dirs,
            scratch,
            resumed_by,
        } = config;
        make_private_dir(&state_dir)?;
        state::check(&state_dir)?;
        // The store's lock comes first: a second broker must not touch what the first one uses.
        let store_path = state_dir.join("broker.redb");
        let store = state::open_store_soon(&store_path).await?;
        let records: Vec<Restored> = store.jobs()?.into_iter().map(restored).collect();
        let identity = Identity::load_or_create(&state_dir.join("key"))?;
        let open_relay = |port: u16| RelayListener::bind(&identity, SocketAddr::new(bind.ip(), port));
        let relay = relay.map(open_relay).transpose()?;
        // The broker is reached over its relay as others are.
        let own = relay.as_ref().map(|relay| own_relay(&identity, bind, relay.port()));
        let endpoint_config = EndpointConfig { advertise, relay: own, ..EndpointConfig::new(identity, bind) };
        let endpoint = Endpoint::bind(endpoint_config, Arc::new(AdmitOnTrial)).await?;
        let port = relay.as_ref().map(RelayListener::port);
        let (gate, ticket) = Gate::open(&state_dir, endpoint.addr(), port)?;
        let relay = relay.map(|relay| relay.serve(gate.clone())).transpose()?;
        let ticket_path = gate::ticket_path(&state_dir, TicketRole::Join);

        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let (mut core, actions) = Core::restore(records, resumed_by);
        core.number_from(u64::from(rand::random::<u32>()) << 32);
        let open_runs = OpenRuns::new();
        let reopen = Box::new(move || Store::open(&store_path));
        let files = files::Files::start(commands.clone(), open_runs.clone());
        let records = records::Records::start(store, reopen, &commands);
        let runs_dir = absolute(&runs_dir)?;
        let mut reach = Reach { checkpoints: vec![runs_dir.clone()], models: Vec::new() };
        for folder in checkpoint_dirs {
            reach.checkpoints.push(absolute(&folder)?);
        }
        for folder in model_dirs {
            reach.models.push(absolute(&folder)?);
        }
        let scratch = scratch.unwrap_or(state_dir);
        let (runs_dir, scratch, reach) = (runs_dir.into(), scratch.into(), Arc::new(reach));
        let to_self = commands.downgrade();
        let actor = actor::run(core, actions, to_self, inbox, files, records, Arc::clone(&reach));
        let actor = Watched::new("the broker's task", tokio::spawn(actor));
        let handle = Handle { commands, runs_dir, scratch, reach, open_runs, has_relay: port.is_some() };
        let listener = tokio::spawn(listen::run(endpoint.clone(), gate, handle.clone()));
        tracing::info!(addrs = ?ticket.broker.addrs, relay = port, "the broker listens");
        Ok(Self { ticket, ticket_path, handle, endpoint, relay, listener, actor })
    }

    /// The ticket by which CompNodes join.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// The file that holds it.
    pub fn ticket_path(&self) -> &Path {
        &self.ticket_path
    }

    /// Jobs and CompNodes.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub async fn status(&self) -> Result<StatusReport, BrokerError> {
        self.handle.status().await
    }

    /// What the joined machines and links can do. Links measured longer ago than `max_age` are measured again, and the
    /// ops of `job` are measured; what is not there yet is pending.
    ///
    /// # Errors
    /// [`BrokerError`] if the job's model cannot be read.
    pub async fn inventory(&self, max_age: Option<Duration>, job: Option<JobSpec>) -> Result<Inventory, BrokerError> {
        self.handle.inventory(max_age, job).await
    }

    /// Takes a job in; paths in it must be absolute. Without `run_dir` one is made under `runs_dir`.
    /// `tokenizer` is the content of the job's tokenizer file, which its checkpoints then carry.
    ///
    /// # Errors
    /// [`BrokerError`] if the job cannot be run.
    pub async fn submit(&self, spec: JobSpec, run_dir: Option<PathBuf>, tokenizer: Option<String>) -> Taken {
        self.handle.submit(spec, run_dir, tokenizer).await
    }

    /// Takes in a job that goes on from a checkpoint, in the run directory that was found for it.
    ///
    /// # Errors
    /// [`BrokerError`] if the job cannot be run.
    pub async fn resume_from(&self, spec: JobSpec, from: Resumption) -> Taken {
        let Resumption { checkpoint, run_dir, start } = from;
        let trained = spec.clone();
        let start = blocking(move || start_at(checkpoint, start, &trained)).await?;
        self.handle.submit_at(spec, start, RunDirChoice::Given(run_dir)).await
    }

    /// Stops a job.
    ///
    /// # Errors
    /// [`BrokerError`] if there is no such job or it has ended.
    pub async fn stop(&self, job: JobId) -> Result<(), BrokerError> {
        self.handle.stop(job).await
    }

    /// Says that the CompNode of this name is gone, for whoever knows that before its lease ends.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub async fn lost(&self, name: String, reason: String) -> Result<(), BrokerError> {
        self.handle.ask(|reply| Command::Lost { name, reason, reply }).await
    }

    /// What came out of a job that has ended.
    ///
    /// # Errors
    /// [`BrokerError`] if there is no such job or its run directory is not readable.
    pub async fn report(&self, job: JobId) -> Result<RunReport, BrokerError> {
        self.handle.ask(|reply| Command::Report { job, reply }).await?
    }

    /// Steps of the whole checkpoints that a job has in its run directory now, newest first.
    ///
    /// # Errors
    /// [`BrokerError`] if there is no such job, or the directory or the folder of its checkpoints cannot be read.
    pub async fn checkpoints(&self, job: JobId) -> Result<Vec<u64>, BrokerError> {
        let record = self.handle.ask(|reply| Command::Record { job, reply }).await??;
        blocking(move || checkpoints_in(&record.run_dir, record.run.as_ref())).await
    }

    /// Resolves when the broker has ended without having been asked to, by a defect of ours.
    pub async fn failed(&mut self) {
        self.actor.ended().await;
    }

    /// Sends the CompNodes away and ends. Jobs that run can be resumed by the next broker on the same state.
    pub async fn shutdown(mut self) {
        // If the actor has ended there is nobody to tell.
        let _ = self.handle.ask(|reply| Command::Shutdown { reply }).await;
        let _ = timeout(GOODBYE_LIMIT, self.actor.ended()).await;
        self.listener.abort();
        self.endpoint.close().await;
        if let Some(relay) = self.relay.take() {
            relay.close().await;
        }
    }
}

/// As the broker itself uses its relay.
fn own_relay(identity: &Identity, bind: SocketAddr, port: u16) -> Relay {
    let ips = match bind.ip() {
        ip if ip.is_unspecified() => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        ip => vec![ip],
    };
    // Its key says enough.
    Relay { key: identity.id(), ips, port, token: RelayToken::of(&Secret::generate()) }
}

fn absolute(path: &Path) -> Result<PathBuf, BrokerError> {
    std::path::absolute(path).map_err(|e| io_error(path, e))
}

#[cfg(test)]
mod tests;
