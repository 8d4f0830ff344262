//! What a `tokenizer.json` does to single texts, and not to a corpus.

use tokenizers::models::ModelWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{Encoding, PostProcessor, Token};

/// Ids before and after a text.
pub(super) type Around = (Vec<i32>, Vec<i32>);

/// What the post-processor puts around a text, here of one token: nothing else of the file is tried out, which may be made
/// to take without an end.
fn around_a_text(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<Around> {
    let Some(processor) = tokenizer.get_post_processor() else { return Ok(Around::default()) };
    let text = Encoding::from_tokens(vec![Token::new(0, "a".to_owned(), (0, 1))], 0);
    let encoding = processor.process(text, None, true)?;
    let added = encoding.get_special_tokens_mask();
    let before = added.iter().take_while(|&&mask| mask == 1).count();
    let after = added.iter().skip(before).rev().take_while(|&&mask| mask == 1).count();
    let ids: Vec<i32> = encoding.get_ids().iter().filter_map(|&id| i32::try_from(id).ok()).collect();
    let part = |range: std::ops::Range<usize>| ids.get(range).unwrap_or_default().to_vec();
    Ok((part(0..before), part(ids.len().saturating_sub(after)..ids.len())))
}

/// Takes away what is meant for single inputs, and says what that was, and what stands around a text.
pub(super) fn for_a_corpus(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<(Vec<String>, Around)> {
    let mut passed_over = Vec::new();
    if let Some(truncation) = tokenizer.get_truncation() {
        passed_over.push(format!("truncation to {} tokens", truncation.max_length));
        tokenizer.with_truncation(None)?;
    }
    if tokenizer.get_padding().is_some() {
        passed_over.push("padding".to_owned());
        tokenizer.with_padding(None);
    }
    let around = around_a_text(tokenizer)?;
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && let Some(share) = bpe.dropout.filter(|&share| share > 0.0)
    {
        passed_over.push(format!("dropout of merges ({share})"));
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
    Ok((passed_over, around))
}

#[cfg(test)]
mod tests {
    use crate::data::Tokenizer;

    #[test]
    fn what_the_post_processor_puts_around_a_text_is_known() {
        let bytes = Tokenizer::Bytes.to_json();
        let with = |single: serde_json::Value| {
            let mut keys: serde_json::Value = serde_json::from_str(&bytes).unwrap();
            let special = |id: u32, content: &str| {
                serde_json::json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true
                })
            };
            keys["added_tokens"] = serde_json::json!([special(256, "<s>"), special(257, "</s>")]);
            keys["post_processor"] = serde_json::json!({
                "type": "TemplateProcessing",
                "single": single,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    "<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]},
                    "</s>": {"id": "</s>", "ids": [257], "tokens": ["</s>"]}
                }
            });
            Tokenizer::from_json(keys.to_string(), "tok.json").unwrap()
        };
        let special = |token: &str| serde_json::json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let begun = with(serde_json::json!([special("<s>"), text]));
        assert_eq!(begun.around(), (vec![256], vec![]));
        let both = with(serde_json::json!([special("<s>"), text, special("</s>")]));
        assert_eq!(both.around(), (vec![256], vec![257]));
        assert_eq!(both.encode("a").unwrap(), [97]);
        assert_eq!(Tokenizer::Bytes.around(), (vec![], vec![]));
    }
}
