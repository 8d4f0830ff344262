//! Who gets in, and what the others hear.

use std::sync::Arc;

use fusionllm_transport::{
    AdmitAll, BindError, ConnectError, Endpoint, EndpointConfig, Identity, Members, PeerAddr, PeerId, SessionError,
};

use crate::{any_port, endpoint};

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_refused_and_hears_why() {
    let members = Members::default();
    let (inside, outside) = (endpoint(members.clone()).await, endpoint(AdmitAll).await);
    let session = outside.connect(&inside.addr()).await;
    let refused = SessionError::Closed { code: 403, reason: "not a member".to_owned() };
    match session {
        Ok(session) => assert_eq!(session.accept_uni().await.unwrap_err(), refused),
        Err(error) => assert!(error.to_string().contains("not a member"), "{error}"),
    }

    members.replace([outside.id()]);
    let session = outside.connect(&inside.addr()).await.unwrap();
    let (mut sink, _source) = session.open_bi().await.unwrap();
    sink.send(b"hello").await.unwrap();
    let accepted = inside.accept().await.unwrap();
    assert_eq!(accepted.peer(), outside.id());
    let (_, mut source) = accepted.accept_bi().await.unwrap();
    assert_eq!(source.recv().await.unwrap().unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_of_members_still_lets_us_dial() {
    let (caller, called) = (endpoint(Members::default()).await, endpoint(AdmitAll).await);
    let session = caller.connect(&called.addr()).await.unwrap();
    assert_eq!(session.peer(), called.id());
    assert_eq!(called.accept().await.unwrap().peer(), caller.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let first = endpoint(AdmitAll).await;
    let addr = first.addr().addrs[0];
    let config = EndpointConfig::new(Identity::generate(), addr);
    let error = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap_err();
    assert!(matches!(error, BindError::PortInUse { addr: a } if a == addr), "{error}");
    assert!(error.to_string().contains(&addr.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_another_machine_is_an_error() {
    let config = EndpointConfig::new(Identity::generate(), "192.0.2.1:0".parse().unwrap());
    let error = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap_err();
    assert!(matches!(error, BindError::Address { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_at_the_address_is_no_connection() {
    let (dialler, acceptor) = (endpoint(AdmitAll).await, endpoint(AdmitAll).await);
    let PeerAddr { addrs, .. } = acceptor.addr();
    let wrong = PeerAddr { id: Identity::generate().id(), addrs: addrs.clone() };
    assert!(dialler.connect(&wrong).await.is_err());
    let nowhere = PeerAddr { id: acceptor.id(), addrs: Vec::new() };
    assert!(matches!(dialler.connect(&nowhere).await, Err(ConnectError::NoAddress { .. })));
    let no_key = PeerAddr { id: PeerId::from_bytes([2; 32]), addrs };
    assert!(matches!(dialler.connect(&no_key).await, Err(ConnectError::NotAKey { .. } | ConnectError::Failed { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn advertised_addresses_are_told() {
    let mut config = EndpointConfig::new(Identity::generate(), "0.0.0.0:0".parse().unwrap());
    let forwarded = "203.0.113.9:7710".parse().unwrap();
    config.advertise.push(forwarded);
    let endpoint = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap();
    let addrs = endpoint.addr().addrs;
    assert!(addrs.contains(&forwarded), "{addrs:?}");
    assert!(addrs.iter().any(|a| a.ip().is_loopback()) && addrs.iter().all(|a| !a.ip().is_unspecified()));
    let other =
        Endpoint::bind(EndpointConfig::new(Identity::generate(), any_port()), Arc::new(AdmitAll)).await.unwrap();
    other.connect(&endpoint.addr()).await.unwrap();
}
