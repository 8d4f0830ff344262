//! A command's connection to a running broker.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use fusionllm_compnode::{Admitted, knock};
use fusionllm_protocol::{ClientRequest, Hello, Role, ToClient, decode_clean, encode};
use fusionllm_transport::{
    Endpoint, EndpointConfig, FrameSink, FrameSource, Identity, Members, Relay, Session, Ticket, shell_path,
};
use tokio::time::timeout;

use crate::cli::BrokerAddress;
use crate::exit::{bad_input, started};
use crate::paths::state_dir;
use crate::secrets::{given_ticket, local_ticket};

/// A broker that says nothing for this long on a new connection is not one.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Largest answer: a status of many jobs.
const ANSWER_BYTES: u64 = 64 << 20;

impl BrokerAddress {
    /// The options that name the broker as they are typed, after a blank each; never a ticket itself.
    pub(crate) fn typed(&self) -> String {
        let options = [("--ticket-file", &self.ticket_file), ("--state", &self.state)];
        let typed = options.into_iter().filter_map(|(option, path)| Some((option, path.as_deref()?)));
        typed.map(|(option, path)| format!(" {option} {}", shell_path(path))).collect()
    }
}

/// What a broker says of a job, with what was `typed` to reach it in the commands that it names: it does not know how it is
/// reached.
pub(crate) fn addressed(said: &str, typed: &str) -> String {
    const COMMAND: &str = "`fusionllm resume ";
    let mut parts = said.split(COMMAND);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (job, rest) = part.split_at(part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len()));
        text.extend([COMMAND, job, typed, rest]);
    }
    text
}

/// An open connection.
pub(crate) struct Client {
    endpoint: Endpoint,
    session: Session,
    sink: FrameSink,
    source: FrameSource,
}

impl Client {
    /// Connects by the ticket given, that of the environment, or that of a broker on this machine.
    pub(crate) async fn connect(address: &BrokerAddress) -> anyhow::Result<Self> {
        let ticket = find_ticket(address)?;
        // Own addresses are of no use to a client: whatever interface leads to the broker will do.
        let bind = "0.0.0.0:0".parse().context("wildcard address")?;
        let relay = Relay::by(&ticket);
        let config = EndpointConfig { relay, ..EndpointConfig::new(Identity::generate(), bind) };
        let endpoint = Endpoint::bind(config, Arc::new(Members::default())).await?;
        let session = endpoint.connect(&ticket.broker).await.context("cannot reach the broker; is it running?")?;
        let hello = Hello { secret: *ticket.secret.as_bytes(), role: Role::Client };
        let admitted = knock(&session, &hello).await;
        let Admitted { sink, source, .. } = admitted.map_err(started)?;
        Ok(Self { endpoint, session, sink, source })
    }

    /// Sends a request and waits for its answer; a broker's error becomes ours.
    pub(crate) async fn request(&mut self, request: &ClientRequest) -> anyhow::Result<ToClient> {
        self.sink.send(&encode(request)?).await?;
        let answer = loop {
            match receive(&mut self.source).await? {
                ToClient::Working => {}
                answer => break answer,
            }
        };
        match answer {
            ToClient::Error { reason, bad_input: true } => Err(bad_input(reason)),
            ToClient::Error { reason, bad_input: false } => bail!(reason),
            answer => Ok(answer),
        }
    }

    /// The next message of a followed job; nothing when the broker has no more.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<ToClient>> {
        let frame = self.source.recv_limited(ANSWER_BYTES).await.context("lost the broker")?;
        Ok(frame.map(|f| decode_clean(&f)).transpose()?)
    }

    /// Says goodbye.
    pub(crate) async fn close(self) {
        self.session.close(0, "done");
        self.endpoint.close().await;
    }
}

async fn receive<T: serde::de::DeserializeOwned>(source: &mut FrameSource) -> anyhow::Result<T> {
    let waited = timeout(ANSWER_LIMIT, source.recv_limited(ANSWER_BYTES)).await;
    let frame = waited.context("the broker does not answer")??.context("the broker closed the connection")?;
    Ok(decode_clean(&frame)?)
}

/// The ticket that is given, that of the environment, or that of a broker on this machine.
fn find_ticket(address: &BrokerAddress) -> anyhow::Result<Ticket> {
    let (argument, file) = (address.ticket.as_deref(), address.ticket_file.as_deref());
    // Who names a state folder does not mean the environment's broker.
    if (argument.is_some() || file.is_some() || address.state.is_none())
        && let Some(ticket) = given_ticket(argument, file)?
    {
        return Ok(ticket);
    }
    local_ticket(&state_dir(address.state.as_deref())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_that_a_broker_names_reach_it() {
        let said = "no memory; `fusionllm resume 12 --step 3` goes on, as `fusionllm resume 1` does";
        let typed = " --ticket-file op.ticket";
        assert_eq!(
            addressed(said, typed),
            "no memory; `fusionllm resume 12 --ticket-file op.ticket --step 3` goes on, as `fusionllm resume 1 --ticket-file \
             op.ticket` does"
        );
        assert_eq!(addressed(said, ""), said);
        assert_eq!(addressed("no memory", typed), "no memory");
    }
}
