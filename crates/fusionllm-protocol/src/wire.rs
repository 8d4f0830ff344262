//! Control messages as bytes: postcard, one message a frame.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ProtocolError;
use crate::text::Clean;

/// Encodes one message.
///
/// # Errors
/// [`ProtocolError::Encode`] if the message cannot be represented, which is a bug of ours.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    postcard::to_stdvec(message).map_err(|e| ProtocolError::Encode { reason: e.to_string() })
}

/// Bytes of one message as [`encode`] writes it.
///
/// # Errors
/// As [`encode`].
pub fn encoded_len<T: Serialize>(message: &T) -> Result<u64, ProtocolError> {
    let bytes = postcard::experimental::serialized_size(message);
    bytes.map(|bytes| bytes as u64).map_err(|e| ProtocolError::Encode { reason: e.to_string() })
}

/// Decodes one message; trailing bytes are an error. Strings are as they came: for messages with paths and graphs.
///
/// # Errors
/// [`ProtocolError::Decode`] for every byte string that is not such a message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|e| malformed::<T>(e.to_string()))?;
    whole(value, rest)
}

/// The same with every string [cleaned](crate::clean): for messages whose strings are shown to people.
///
/// # Errors
/// As [`decode`].
pub fn decode_clean<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    let mut deserializer = postcard::Deserializer::from_bytes(bytes);
    let value = T::deserialize(Clean(&mut deserializer)).map_err(|e| malformed::<T>(e.to_string()))?;
    whole(value, deserializer.finalize().map_err(|e| malformed::<T>(e.to_string()))?)
}

fn whole<T>(value: T, rest: &[u8]) -> Result<T, ProtocolError> {
    if rest.is_empty() { Ok(value) } else { Err(malformed::<T>(format!("{} bytes too many", rest.len()))) }
}

fn malformed<T>(reason: String) -> ProtocolError {
    ProtocolError::Decode { message: std::any::type_name::<T>(), reason }
}

/// For fields whose form in JSON files (tags, left-out fields) postcard cannot carry: JSON text within the message.
pub(crate) mod as_json {
    use serde::de::{DeserializeOwned, Error as _};
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::text::Clean;

    pub(crate) fn serialize<T: Serialize, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return value.serialize(serializer);
        }
        serde_json::to_vec(value).map_err(S::Error::custom)?.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, T: DeserializeOwned, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        if deserializer.is_human_readable() {
            return serde_json::from_value(serde_json::Value::deserialize(deserializer)?).map_err(D::Error::custom);
        }
        // Strings within the text are cleaned, not the text: escapes would hide what they stand for.
        let text = Vec::<u8>::deserialize(deserializer)?;
        T::deserialize(Clean(&mut serde_json::Deserializer::from_slice(&text))).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::{FpBp, Measured};

    use super::*;
    use crate::{
        CompNodeSummary, Fault, FromCompNode, JobEvent, JobId, JobState, JobSummary, Recovery, Standstill,
        StatusReport, StepMetrics, ToClient,
    };

    #[test]
    fn what_is_tagged_in_json_passes_through_postcard() {
        let recovery = Recovery {
            kind: Fault::Lost,
            who: vec!["a".to_owned()],
            step: 2,
            lost_steps: 1,
            compnodes: 2,
            detect_s: 4.0,
            decide_s: 1.0,
            build_s: 2.0,
            refill_s: 0.5,
        };
        let metrics = StepMetrics {
            step: 3,
            loss: 5.25,
            tokens: 64,
            step_s: 0.5,
            lr: 1e-3,
            grad_norm: None,
            eval_loss: Some(5.0),
            eval_accuracy: Some(0.5),
            links: Vec::new(),
            codec_changes: Vec::new(),
            recoveries: vec![recovery],
            unix_s: None,
            starts: false,
        };
        let summary = JobSummary {
            job: JobId(1),
            name: "run".to_owned(),
            state: JobState::Failed { reason: "it broke".to_owned(), bad_input: true },
            step: 3,
            steps: 9,
            loss: None,
            run_dir: "runs/run".to_owned(),
            standstill: Some(Standstill { for_s: 2.5, is_recovering: true, reason: "lost".to_owned() }),
            reading: Some((1, 2)),
        };
        for message in [
            ToClient::Event(JobEvent::Step { job: JobId(1), metrics }),
            ToClient::Event(JobEvent::State { job: JobId(1), state: JobState::Done }),
            ToClient::Status(StatusReport {
                jobs: vec![summary],
                compnodes: Vec::new(),
                relayed: Vec::new(),
                trouble: None,
                lost_leaving: Vec::new(),
            }),
        ] {
            assert_eq!(decode::<ToClient>(&encode(&message).unwrap()).unwrap(), message);
            let text = serde_json::to_string(&message).unwrap();
            assert_eq!(serde_json::from_str::<ToClient>(&text).unwrap(), message);
        }
    }

    #[test]
    fn every_string_of_a_cleaned_message_is_clean() {
        let bad = || "\u{1b}[2J\nforged\u{202e}".to_owned();
        let good = "\u{fffd}[2J forged\u{fffd}";
        let state = || JobState::Failed { reason: bad(), bad_input: false };
        let standstill = Some(Standstill { for_s: 1.0, is_recovering: false, reason: bad() });
        let summary = JobSummary {
            job: JobId(1),
            name: bad(),
            state: state(),
            step: 0,
            steps: 1,
            loss: None,
            run_dir: bad(),
            standstill,
            reading: None,
        };
        let compnode =
            CompNodeSummary { name: bad(), id: bad(), device: bad(), org: Some(bad()), job: None, is_leaving: false };
        let report = ToClient::Status(StatusReport {
            jobs: vec![summary],
            compnodes: vec![compnode],
            relayed: Vec::new(),
            trouble: None,
            lost_leaving: Vec::new(),
        });
        let ToClient::Status(report) = decode_clean(&encode(&report).unwrap()).unwrap() else { panic!() };
        let (job, node) = (&report.jobs[0], &report.compnodes[0]);
        assert_eq!(job.state, JobState::Failed { reason: good.to_owned(), bad_input: false });
        let reason = &job.standstill.as_ref().unwrap().reason;
        assert_eq!([&job.name, &job.run_dir, reason, &node.name, &node.id, &node.device], [good; 6]);

        let event = ToClient::Event(JobEvent::State { job: JobId(1), state: state() });
        let ToClient::Event(JobEvent::State { state, .. }) = decode_clean(&encode(&event).unwrap()).unwrap() else {
            panic!()
        };
        assert_eq!(state, job.state);

        let mut times = std::collections::BTreeMap::new();
        times.insert(bad(), FpBp { fp_s: 1.0, bp_s: 2.0 });
        let measured = Measured { ops: times, ..Measured::default() };
        let message = FromCompNode::Measured { request: 1, result: Ok(measured) };
        let FromCompNode::Measured { result: Ok(measured), .. } = decode_clean(&encode(&message).unwrap()).unwrap()
        else {
            panic!()
        };
        assert_eq!(measured.ops.keys().next().unwrap(), good, "keys of maps too");
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
