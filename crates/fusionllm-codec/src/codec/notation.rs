//! Codecs as people write them: `topk:0.01:bf16`, `transform:2`.

use std::fmt;
use std::str::FromStr;

use super::Codec;
use crate::{CodecError, TopKValues};

impl fmt::Display for TopKValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
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
            Self::Transform { bits } => write!(f, "{name}:{bits}"),
        }
    }
}

/// A name of [`Codec::name`]; `topk:SHARE:VALUES` and `transform:BITS` with their parameters, of which
/// VALUES may be left out: `bf16` then.
impl FromStr for Codec {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        let unknown = || CodecError::UnknownCodec { name: text.to_owned() };
        let mut parts = text.split(':');
        let (name, first, second) = (parts.next(), parts.next(), parts.next());
        if parts.next().is_some() {
            return Err(unknown());
        }
        let codec = match (name, first, second) {
            (Some("dense"), None, None) => Self::Dense,
            (Some("bf16"), None, None) => Self::Bf16,
            (Some("f16"), None, None) => Self::F16,
            (Some("int8"), None, None) => Self::Int8,
            (Some("int4"), None, None) => Self::Int4,
            (Some("topk"), Some(share), values) => {
                Self::TopK { density: share.parse()?, values: topk_values(values).ok_or_else(unknown)? }
            }
            (Some("transform"), Some(bits), None) => Self::Transform { bits: bits.parse()? },
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
        fn any_text_is_a_codec_or_an_error(text in "[a-z0-9:.]{0,30}") {
            if let Ok(codec) = text.parse::<Codec>() {
                prop_assert_eq!(codec.to_string().parse::<Codec>().unwrap(), codec);
            }
        }
    }

    #[test]
    fn texts_are_short_and_values_have_a_default() {
        for text in ["int4", "topk:0.01:bf16", "transform:2", "transform:0.125"] {
            assert_eq!(text.parse::<Codec>().unwrap().to_string(), text);
        }
        assert_eq!("topk:0.01".parse::<Codec>().unwrap().to_string(), "topk:0.01:bf16");
    }

    #[test]
    fn what_is_no_codec_is_refused() {
        for text in ["", "topk", "topk:2", "topk:0.1:f16", "transform", "transform:0", "transform:2:int8", "int8:3"] {
            assert!(text.parse::<Codec>().is_err(), "{text}");
        }
        let error = "zip".parse::<Codec>().unwrap_err().to_string();
        assert!(error.contains("`zip`") && error.contains("topk:SHARE"), "{error}");
    }
}
