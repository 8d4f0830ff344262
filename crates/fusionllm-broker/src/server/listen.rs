//! New connections: greeting, hello, ticket, welcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fusionllm_protocol::{Greeting, Hello, Role, TicketRole, Welcome, clean_to, decode_clean, encode, is_plain_name};
use fusionllm_transport::{Endpoint, FrameSink, FrameSource, Secret, Session};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::gate::{Admission, Gate};
use super::handle::{Handle, blocking};
use super::refusals::Refusals;
use super::{client, compnode};
use crate::core::ConnectionId;

/// Who says nothing for this long is sent away.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Largest hello: nobody needs more memory of ours before being let in.
const HELLO_BYTES: u64 = 64 << 10;
/// Close code of a peer that is not let in.
const REFUSED: u32 = 403;
/// How connections end that meet trouble of this broker.
const TROUBLE: u32 = 500;

/// Longest description of a device, and longest name of a host, in characters.
const DESCRIPTION_CHARS: usize = 200;
/// Addresses of a CompNode that others try.
const MOST_ADDRS: usize = 64;

/// What all connections share.
struct Door {
    gate: Arc<Gate>,
    refusals: Refusals,
    handle: Handle,
}

/// Serves every connection until the endpoint closes.
pub(super) async fn run(endpoint: Endpoint, gate: Arc<Gate>, handle: Handle) {
    let next = AtomicU64::new(1);
    let door = Arc::new(Door { gate, refusals: Refusals::default(), handle });
    let mut connections = JoinSet::new();
    while let Some(session) = endpoint.accept().await {
        while connections.try_join_next().is_some() {}
        let connection = ConnectionId(next.fetch_add(1, Ordering::Relaxed));
        let door = Arc::clone(&door);
        connections.spawn(async move { serve(connection, session, &door).await });
    }
}

async fn serve(connection: ConnectionId, session: Session, door: &Door) {
    let Ok(Some(first)) = timeout(HELLO_LIMIT, first_frame(&session)).await else {
        session.close(REFUSED, "no hello");
        return;
    };
    let (sink, source, greeting) = first;
    let Some((hello, sink, source)) = introduce(&session, greeting, sink, source, door).await else { return };
    let pass = match admit(connection, &session, &hello, door).await {
        Ok(pass) => pass,
        Err(Denied::Refused(reason)) => {
            refuse(&session, sink, &reason, door).await;
            return;
        }
        // Another time it may come in.
        Err(Denied::Trouble(reason)) => {
            session.close(TROUBLE, &reason);
            return;
        }
    };
    session.admitted();
    let handle = door.handle.clone();
    match hello.role {
        Role::CompNode { name, device, org, mut addr, mut profile, resume, standing } => {
            let device = clean_to(&device, DESCRIPTION_CHARS).into_owned();
            profile.host = clean_to(&profile.host, DESCRIPTION_CHARS).into_owned();
            addr.addrs.truncate(MOST_ADDRS);
            // Others let in who it says it is.
            addr.id = *session.peer().as_bytes();
            let (id, key) = (session.peer().to_string(), *session.peer().as_bytes());
            let joining = crate::core::Joining { name, id, key, device, org, addr, profile, standing };
            compnode::serve(pass, session, joining, resume, sink, source, handle).await;
        }
        Role::Client => client::serve(pass, session, sink, source, handle).await,
    }
}

/// Why somebody does not get in.
enum Denied {
    /// By its ticket or by what it says of itself: it would be refused again.
    Refused(String),
    /// By trouble of this broker.
    Trouble(String),
}

/// Lets somebody in, or says why not.
async fn admit(connection: ConnectionId, session: &Session, hello: &Hello, door: &Door) -> Result<Admission, Denied> {
    let role = match &hello.role {
        Role::CompNode { .. } => TicketRole::Join,
        Role::Client => TicketRole::Operate,
    };
    let (gate, session, secret) = (Arc::clone(&door.gate), session.clone(), Secret::from_bytes(hello.secret));
    // A ticket for one use is not used up by a name that does not do.
    if let Role::CompNode { name, org, .. } = &hello.role {
        let names = [("CompNode", Some(name)), ("organisation", org.as_ref())];
        let wrong = names.into_iter().find(|(_, name)| name.is_some_and(|name| !is_plain_name(name)));
        if let Some((whose, _)) = wrong {
            let reason = format!("the name of a {whose} has 1 to 100 letters, digits, spaces or punctuation");
            return Err(Denied::Refused(reason));
        }
    }
    if let Role::CompNode { profile, .. } = &hello.role {
        profile.check().map_err(Denied::Refused)?;
    }
    let admitted = blocking(move || gate.admit(connection, &session, &secret, role)).await;
    admitted
        .map_err(|error| {
            tracing::error!(%error, "cannot keep who came in by which ticket");
            // What lies where is not for everybody.
            Denied::Trouble("the broker cannot write its tickets".to_owned())
        })?
        .map_err(|refusal| Denied::Refused(refusal.to_string()))
}

async fn first_frame(session: &Session) -> Option<(FrameSink, FrameSource, Greeting)> {
    let (sink, mut source) = session.accept_bi().await.ok()?;
    let frame = source.recv_limited(HELLO_BYTES).await.ok()??;
    Some((sink, source, Greeting::from_bytes(&frame)?))
}

/// Tells our version and reads the hello of who speaks the same. Nothing if the peer was sent away.
async fn introduce(
    session: &Session,
    greeting: Greeting,
    mut sink: FrameSink,
    mut source: FrameSource,
    door: &Door,
) -> Option<(Hello, FrameSink, FrameSource)> {
    if !greeting.is_answered_by_a_greeting() {
        let theirs = greeting.version;
        let ours = Greeting::OURS.version;
        let reason = format!("you speak protocol version {theirs}, this broker speaks {ours}: use the same release");
        refuse(session, sink, &reason, door).await;
        return None;
    }
    let hello = async {
        sink.send(&Greeting::OURS.to_bytes()).await.ok()?;
        match greeting.check("it") {
            Ok(()) => decode_clean::<Hello>(&source.recv_limited(HELLO_BYTES).await.ok()??).ok(),
            Err(error) => {
                door.refusals.log(session.peer(), &error.to_string());
                None
            }
        }
    };
    match timeout(HELLO_LIMIT, hello).await {
        Ok(Some(hello)) => Some((hello, sink, source)),
        Ok(None) | Err(_) => {
            // Closing earlier could overtake the greeting.
            let _ = timeout(HELLO_LIMIT, sink.finish()).await;
            session.close(REFUSED, "no hello");
            None
        }
    }
}

/// Sends a peer away that could read why.
async fn refuse(session: &Session, mut sink: FrameSink, reason: &str, door: &Door) {
    door.refusals.log(session.peer(), reason);
    let refused = Welcome::Refused { reason: reason.to_owned() };
    if let Ok(frame) = encode(&refused)
        && sink.send(&frame).await.is_ok()
    {
        // Closing earlier could overtake the answer.
        let _ = timeout(HELLO_LIMIT, sink.finish()).await;
    }
    session.close(REFUSED, "refused");
}
