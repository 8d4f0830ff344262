//! How a CompNode or a command gets in at a broker: greeting, hello, welcome.

use std::time::Duration;

use fusionllm_protocol::{Greeting, Hello, PROTOCOL_VERSION, Welcome, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, Session, SessionError};
use tokio::time::timeout;

use crate::CompNodeError;

/// A broker that says nothing for this long on a new connection is not one.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);
/// Largest greeting or welcome.
const WELCOME_BYTES: u64 = 64 << 10;
/// How brokers close connections to those who do not get in. One of an earlier release gives no other sign.
const REFUSED: u64 = 403;

/// A place at a broker.
#[derive(Debug)]
pub struct Admitted {
    /// The name under which the broker knows us.
    pub name: String,
    /// Number of the last message that the broker has of an earlier connection of ours; nothing if it knows of none.
    pub resumed: Option<u64>,
    /// What we say to the broker.
    pub sink: FrameSink,
    /// What the broker says.
    pub source: FrameSource,
}

/// Asks the broker at the other end of `session` to be let in.
///
/// # Errors
/// [`CompNodeError::Refused`] if it says no, [`CompNodeError::Protocol`] if it speaks another version,
/// [`CompNodeError::Broker`] if it does not answer.
pub async fn knock(session: &Session, hello: &Hello) -> Result<Admitted, CompNodeError> {
    let silent = |_| broker_error("did not answer; is the ticket this broker's?".to_owned());
    timeout(WELCOME_LIMIT, exchange(session, hello)).await.map_err(silent)?
}

async fn exchange(session: &Session, hello: &Hello) -> Result<Admitted, CompNodeError> {
    let (mut sink, mut source) = session.open_bi().await.map_err(lost)?;
    // Both at once: a broker of another version reads the first and answers it.
    sink.send(&Greeting::OURS.to_bytes()).await.map_err(lost)?;
    sink.send(&encode(hello)?).await.map_err(lost)?;
    Greeting::check_broker(&receive(&mut source).await?)?;
    match decode(&receive(&mut source).await?)? {
        Welcome::Accepted { name, resumed } => Ok(Admitted { name, resumed, sink, source }),
        Welcome::Refused { reason } => Err(CompNodeError::Refused { reason }),
    }
}

async fn receive(source: &mut FrameSource) -> Result<Vec<u8>, CompNodeError> {
    match source.recv_limited(WELCOME_BYTES).await {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(broker_error("closed the connection".to_owned())),
        Err(error) => Err(lost(error)),
    }
}

/// The connection is gone, be it while something is sent or while an answer is waited for.
fn lost(error: SessionError) -> CompNodeError {
    match error {
        SessionError::Closed { code: REFUSED, reason } => broker_error(format!(
            "it closed the connection: {reason}; it may be of an earlier release, this fusionllm speaks protocol version \
             {PROTOCOL_VERSION}: use the same release on both"
        )),
        error => broker_error(error.to_string()),
    }
}

fn broker_error(reason: String) -> CompNodeError {
    CompNodeError::Broker { reason }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fusionllm_protocol::Role;
    use fusionllm_transport::{AdmitAll, Endpoint, EndpointConfig, Identity};

    use super::*;

    async fn endpoint() -> Endpoint {
        let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
        Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
    }

    /// What comes of knocking at a broker that answers the first frame with `answer`, or if it is nothing, closes.
    async fn knocked(answer: Option<Vec<u8>>) -> String {
        let (caller, broker) = (endpoint().await, endpoint().await);
        let session = caller.connect(&broker.addr()).await.unwrap();
        let answering = tokio::spawn(async move {
            let session = broker.accept().await.unwrap();
            let (mut sink, mut source) = session.accept_bi().await.unwrap();
            source.recv().await.unwrap();
            match answer {
                Some(frame) => {
                    sink.send(&frame).await.unwrap();
                    let _ = sink.finish().await;
                    session.closed().await;
                }
                None => session.close(403, "no hello"),
            }
            broker
        });
        let error = knock(&session, &Hello { secret: [7; 32], role: Role::Client }).await.unwrap_err().to_string();
        session.close(0, "done");
        answering.await.unwrap();
        error
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_broker_of_another_version_is_named() {
        let ours = PROTOCOL_VERSION;
        let later = knocked(Some(Greeting { version: 99 }.to_bytes())).await;
        assert_eq!(
            later,
            format!(
                "the broker speaks protocol version 99, this fusionllm speaks {ours}: use the same release on both"
            )
        );
        let earlier = knocked(None).await;
        assert!(earlier.contains("earlier release") && earlier.contains(&format!("version {ours}")), "{earlier}");
        assert!(knocked(Some(b"HTTP/1.1 400".to_vec())).await.contains("not a broker of FusionLLM"));
    }
}
