//! Control messages as bytes: postcard, one message a frame.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ProtocolError;

/// Encodes one message.
///
/// # Errors
/// [`ProtocolError::Encode`] if the message cannot be represented, which is a bug of ours.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    postcard::to_stdvec(message).map_err(|e| ProtocolError::Encode { reason: e.to_string() })
}

/// Decodes one message; trailing bytes are an error.
///
/// # Errors
/// [`ProtocolError::Decode`] for every byte string that is not such a message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    let fail = |reason: String| ProtocolError::Decode { message: std::any::type_name::<T>(), reason };
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|e| fail(e.to_string()))?;
    if rest.is_empty() { Ok(value) } else { Err(fail(format!("{} bytes too many", rest.len()))) }
}

/// For fields whose form in JSON files (tags, left-out fields) postcard cannot carry: JSON text within the message.
pub(crate) mod as_json {
    use serde::de::{DeserializeOwned, Error as _};
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<T: Serialize, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return value.serialize(serializer);
        }
        serde_json::to_string(value).map_err(S::Error::custom)?.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, T: DeserializeOwned, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        if deserializer.is_human_readable() {
            return serde_json::from_value(serde_json::Value::deserialize(deserializer)?).map_err(D::Error::custom);
        }
        serde_json::from_str(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{JobEvent, JobId, JobState, JobSummary, StatusReport, StepMetrics, ToClient};

    #[test]
    fn what_is_tagged_in_json_passes_through_postcard() {
        let metrics = StepMetrics {
            step: 3,
            loss: 5.25,
            tokens: 64,
            step_s: 0.5,
            lr: 1e-3,
            grad_norm: None,
            eval_loss: Some(5.0),
            links: Vec::new(),
            codec_changes: Vec::new(),
        };
        let summary = JobSummary {
            job: JobId(1),
            name: "run".to_owned(),
            state: JobState::Failed { reason: "it broke".to_owned(), bad_input: true },
            step: 3,
            steps: 9,
            loss: None,
            run_dir: "runs/run".to_owned(),
        };
        for message in [
            ToClient::Event(JobEvent::Step { job: JobId(1), metrics }),
            ToClient::Event(JobEvent::State { job: JobId(1), state: JobState::Done }),
            ToClient::Status(StatusReport { jobs: vec![summary], compnodes: Vec::new(), trouble: None }),
        ] {
            assert_eq!(decode::<ToClient>(&encode(&message).unwrap()).unwrap(), message);
            let text = serde_json::to_string(&message).unwrap();
            assert_eq!(serde_json::from_str::<ToClient>(&text).unwrap(), message);
        }
    }

    #[test]
    fn damaged_messages_are_errors() {
        let bytes = encode(&ToClient::Submitted { job: JobId(1), run_dir: "x".to_owned() }).unwrap();
        for end in 0..bytes.len() {
            assert!(decode::<ToClient>(&bytes[..end]).is_err(), "cut to {end} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(decode::<ToClient>(&longer).unwrap_err().to_string().ends_with("1 bytes too many"));
    }
}
