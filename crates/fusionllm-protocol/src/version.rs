//! The protocol's version, and the first frame of a connection, which says it.

use crate::ProtocolError;

/// Both ends of a connection must speak the same version; it grows whenever a message changes its form.
pub const PROTOCOL_VERSION: u32 = 18;

/// How a greeting begins. What follows is the version, four bytes, little-endian.
const MAGIC: &[u8; 9] = b"fusionllm";
/// The first version whose connections begin with a greeting. Before, the first frame was a hello that began with the
/// version.
const FIRST_WITH_GREETINGS: u32 = 7;
/// The least bytes of such a hello: version, secret, role.
const LEAST_HELLO_BYTES: usize = 34;

/// First frame of both ends of a connection to a broker. Its form is the same in every version, so that two ends that
/// speak different ones can name both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u32,
}

impl Greeting {
    /// That of this build.
    pub const OURS: Self = Self { version: PROTOCOL_VERSION };

    /// Its frame: a word that is the same in all versions, then the version, little-endian.
    pub fn to_bytes(self) -> Vec<u8> {
        [MAGIC.as_slice(), &self.version.to_le_bytes()].concat()
    }

    /// Reads the first frame of somebody else, which may be of any version. Nothing if it is no greeting.
    pub fn from_bytes(frame: &[u8]) -> Option<Self> {
        match frame.strip_prefix(MAGIC) {
            // Later versions may say more.
            Some(rest) => rest.first_chunk().map(|&version| Self { version: u32::from_le_bytes(version) }),
            None if frame.len() >= LEAST_HELLO_BYTES => {
                let (version, _) = postcard::take_from_bytes::<u32>(frame).ok()?;
                (version < FIRST_WITH_GREETINGS).then_some(Self { version })
            }
            None => None,
        }
    }

    /// Whether its sender reads greetings; earlier releases read only a [`crate::Welcome`].
    pub fn is_answered_by_a_greeting(self) -> bool {
        self.version >= FIRST_WITH_GREETINGS
    }

    /// Holds the version of the other end, here called `peer`, against ours.
    ///
    /// # Errors
    /// [`ProtocolError::Version`] if it is another one.
    pub fn check(self, peer: &'static str) -> Result<(), ProtocolError> {
        let Self { version: got } = self;
        if got == PROTOCOL_VERSION {
            Ok(())
        } else {
            Err(ProtocolError::Version { peer, expected: PROTOCOL_VERSION, got })
        }
    }

    /// Reads the broker's first frame and holds its version against ours.
    ///
    /// # Errors
    /// [`ProtocolError`] if it is no greeting or names another version.
    pub fn check_broker(frame: &[u8]) -> Result<(), ProtocolError> {
        let no_greeting =
            || ProtocolError::Decode { message: "greeting", reason: "not a broker of FusionLLM".to_owned() };
        Self::from_bytes(frame).ok_or_else(no_greeting)?.check("the broker")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_of_any_version_is_read() {
        for version in [0, 1, PROTOCOL_VERSION, u32::MAX] {
            let frame = Greeting { version }.to_bytes();
            assert_eq!(Greeting::from_bytes(&frame), Some(Greeting { version }));
            assert_eq!(Greeting::from_bytes(&[&frame, b"more".as_slice()].concat()), Some(Greeting { version }));
        }
        for bytes in [b"" as &[u8], b"fusionllm", b"fusionllm\x07\0\0", b"GET / HTTP/1.1", &[0xff; 100]] {
            assert_eq!(Greeting::from_bytes(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn the_hello_of_an_earlier_release_tells_its_version() {
        let hello = postcard::to_stdvec(&(6u32, [7u8; 32], 1u8)).unwrap();
        let greeting = Greeting::from_bytes(&hello).unwrap();
        assert_eq!(greeting.version, 6);
        assert!(!greeting.is_answered_by_a_greeting());
        // What begins like a hello of this or a later version is none: those begin with a greeting.
        assert_eq!(Greeting::from_bytes(&postcard::to_stdvec(&(7u32, [7u8; 32], 1u8)).unwrap()), None);
    }

    #[test]
    fn another_version_is_named_with_ours() {
        assert_eq!(Greeting::OURS.check("the broker"), Ok(()));
        let error = Greeting::check_broker(&Greeting { version: 3 }.to_bytes()).unwrap_err().to_string();
        let ours = PROTOCOL_VERSION;
        assert_eq!(
            error,
            format!("the broker speaks protocol version 3, this fusionllm speaks {ours}: use the same release on both")
        );
    }
}
