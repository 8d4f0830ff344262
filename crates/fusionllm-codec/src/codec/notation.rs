//! Codecs as people write them: `topk:0.01:bf16`, `lowrank:16:int8+topk:0.01:bf16`.

use std::fmt;
use std::str::FromStr;

use super::{Codec, LowRankValues, Residual, TopKValues};
use crate::CodecError;

impl fmt::Display for TopKValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl fmt::Display for LowRankValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// The form that [`Codec::from_str`] reads.
impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match self {
            Self::Dense | Self::Bf16 | Self::F16 | Self::Int8 | Self::Int4 => f.write_str(name),
            Self::TopK { density, values } => write!(f, "{name}:{density}:{values}"),
            Self::LowRank { rank, values, residual } => {
                write!(f, "{name}:{rank}:{values}")?;
                match residual {
                    Some(Residual { density, values }) => write!(f, "+topk:{density}:{values}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A name of [`Codec::name`]; `topk:SHARE:VALUES` and `lowrank:RANK:VALUES[+topk:SHARE:VALUES]` with their
/// parameters, of which VALUES may be left out: `bf16` then.
impl FromStr for Codec {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        let unknown = || CodecError::UnknownCodec { name: text.to_owned() };
        let (head, residual) = match text.split_once('+') {
            Some((head, tail)) => (head, Some(tail)),
            None => (text, None),
        };
        let mut parts = head.split(':');
        let (name, first, second) = (parts.next(), parts.next(), parts.next());
        if parts.next().is_some() {
            return Err(unknown());
        }
        let codec = match (name, first, second, residual) {
            (Some("dense"), None, None, None) => Self::Dense,
            (Some("bf16"), None, None, None) => Self::Bf16,
            (Some("f16"), None, None, None) => Self::F16,
            (Some("int8"), None, None, None) => Self::Int8,
            (Some("int4"), None, None, None) => Self::Int4,
            (Some("topk"), Some(share), values, None) => {
                Self::TopK { density: share.parse()?, values: topk_values(values).ok_or_else(unknown)? }
            }
            (Some("lowrank"), Some(rank), values, residual) => {
                let rank = rank.parse().ok().filter(|&rank| rank > 0).ok_or_else(unknown)?;
                let values = low_rank_values(values).ok_or_else(unknown)?;
                let residual = match residual.map(Self::from_str) {
                    None => None,
                    Some(Ok(Self::TopK { density, values })) => Some(Residual { density, values }),
                    Some(Err(error @ CodecError::Density { .. })) => return Err(error),
                    Some(_) => return Err(unknown()),
                };
                Self::LowRank { rank, values, residual }
            }
            _ => return Err(unknown()),
        };
        Ok(codec)
    }
}

fn topk_values(text: Option<&str>) -> Option<TopKValues> {
    match text {
        Some("f32") => Some(TopKValues::F32),
        Some("bf16") | None => Some(TopKValues::Bf16),
        Some("int8") => Some(TopKValues::Int8),
        Some(_) => None,
    }
}

fn low_rank_values(text: Option<&str>) -> Option<LowRankValues> {
    match text {
        Some("bf16") | None => Some(LowRankValues::Bf16),
        Some("int8") => Some(LowRankValues::Int8),
        Some("int4") => Some(LowRankValues::Int4),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::any_codec;

    proptest! {
        #[test]
        fn every_codec_is_read_back_from_its_text(codec in any_codec()) {
            let text = codec.to_string();
            prop_assert_eq!(text.parse::<Codec>().unwrap(), codec);
            prop_assert_eq!(Codec::from_name(&text).unwrap(), codec);
            prop_assert!(text.starts_with(codec.name()));
        }

        #[test]
        fn any_text_is_a_codec_or_an_error(text in "[a-z0-9:+.]{0,30}") {
            if let Ok(codec) = text.parse::<Codec>() {
                prop_assert_eq!(codec.to_string().parse::<Codec>().unwrap(), codec);
            }
        }
    }

    #[test]
    fn texts_are_short_and_values_have_a_default() {
        let texts = ["int4", "topk:0.01:bf16", "lowrank:16:int8", "lowrank:16:int8+topk:0.005:int8"];
        for text in texts {
            assert_eq!(text.parse::<Codec>().unwrap().to_string(), text);
        }
        assert_eq!("topk:0.01".parse::<Codec>().unwrap().to_string(), "topk:0.01:bf16");
        assert_eq!("lowrank:8+topk:1".parse::<Codec>().unwrap().to_string(), "lowrank:8:bf16+topk:1:bf16");
    }

    #[test]
    fn what_is_no_codec_is_refused() {
        for text in ["", "topk", "topk:2", "topk:0.1:f16", "lowrank:0:int8", "lowrank:8:f32", "int8:3", "int8+topk:0.1"]
        {
            assert!(text.parse::<Codec>().is_err(), "{text}");
        }
        assert!("lowrank:8+lowrank:8".parse::<Codec>().is_err());
        let error = "zip".parse::<Codec>().unwrap_err().to_string();
        assert!(error.contains("`zip`") && error.contains("topk:SHARE"), "{error}");
    }
}
