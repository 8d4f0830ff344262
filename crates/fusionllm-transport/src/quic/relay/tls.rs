//! TLS between a relay and those who use it: the relay shows the broker's bare key (RFC 7250), which its ticket names, so that
//! nobody needs a certificate.

use std::sync::Arc;

use iroh::SecretKey;
use iroh::tls::{CaTlsConfig, default_provider};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, alg_id::ED25519,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::{CertifiedKey, public_key_to_spki};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, PeerIncompatible, ServerConfig, SignatureScheme,
};

use crate::PeerId;

/// PKCS #8 of an Ed25519 key, without its last 32 bytes: the key (RFC 8410).
const PKCS8: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

/// Of the relay, which shows this key.
pub(super) fn server_config(secret: &SecretKey) -> Result<ServerConfig, Error> {
    let pkcs8 = [PKCS8.as_slice(), &secret.to_bytes()].concat();
    let key = rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8))?;
    let shown = CertificateDer::from(spki(secret.public().as_bytes()).to_vec());
    let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::new(CertifiedKey::new(vec![shown], key)));
    let builder = ServerConfig::builder_with_provider(default_provider());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?.with_no_client_auth();
    Ok(builder.with_cert_resolver(Arc::new(resolver)))
}

/// Of those who use it: nobody but the owner of this key is talked to.
pub(super) fn trust(key: PeerId) -> CaTlsConfig {
    CaTlsConfig::custom_server_cert_verifier(Arc::new(move |provider: Arc<CryptoProvider>| {
        let algorithms = provider.signature_verification_algorithms;
        Ok(Arc::new(OnlyThisKey { shown: spki(key.as_bytes()), algorithms }))
    }))
}

/// The same, for a connection that is only to show whether the relay is there.
pub(super) fn client_config(key: PeerId) -> std::io::Result<ClientConfig> {
    trust(key).client_config(default_provider())
}

fn spki(key: &[u8; 32]) -> SubjectPublicKeyInfoDer<'static> {
    public_key_to_spki(&ED25519, key)
}

#[derive(Debug)]
struct OnlyThisKey {
    shown: SubjectPublicKeyInfoDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for OnlyThisKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match intermediates.is_empty() && end_entity.as_ref() == self.shown.as_ref() {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
