//! The tokenizer: prompts in the frame of a chat message, as token ids.

use std::fmt::Display;
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::de::IgnoredAny;
use tokenizers::Tokenizer;

/// Most tokens of a prompt, its frame included; what is more is cut off at the end.
pub const MAX_TOKENS: usize = 512;

/// Marks that frame a message: each must be one token.
const MARKS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// What the model is told: the prompt as a user's message, and the start of an answer. The empty
/// prompt in this frame is the unconditional one.
pub fn frame(prompt: &str) -> String {
    let [start, end] = MARKS;
    format!("{start}user\n{prompt}{end}\n{start}assistant\n")
}

/// Text to token ids.
#[derive(Debug)]
pub struct PromptTokenizer(Tokenizer);

impl PromptTokenizer {
    /// Reads a `tokenizer.json` of the `tokenizers` library.
    ///
    /// # Errors
    /// If the file cannot be read or parsed, a mark of the frame is not one of its tokens, or a token
    /// does not fit in a `vocabulary` of that many rows.
    pub fn load(path: &Path, vocabulary: i64) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let broken = |error: &dyn Display| anyhow!("parsing {}: {error}", path.display());
        // The library panics on a syntax error within some parts, and on some values.
        let _: IgnoredAny = serde_json::from_slice(&bytes).map_err(|error| broken(&error))?;
        let parsed = catch_unwind(|| Tokenizer::from_bytes(&bytes));
        let parsed = parsed.map_err(|_panic| broken(&"the tokenizers library gave up on it"))?;
        let mut tokenizer = parsed.map_err(|error| broken(&error))?;
        // Both are ours: files may carry settings of their own, from whoever saved them.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let ids = tokenizer.get_vocab(true);
        if let Some((token, id)) = ids.iter().max_by_key(|(_, id)| **id) {
            ensure!(
                i64::from(*id) < vocabulary,
                "{}: token {token:?} has id {id}, but the model's vocabulary ends at {}",
                path.display(),
                vocabulary - 1
            );
        }
        let tokenizer = Self(tokenizer);
        for mark in MARKS {
            let found = tokenizer.split(mark)?;
            ensure!(
                found.len() == 1 && ids.get(mark).is_some_and(|id| i64::from(*id) == found[0]),
                "{}: {mark} must be one token, found {found:?}",
                path.display()
            );
        }
        Ok(tokenizer)
    }

    /// Ids of the framed prompt, at most [`MAX_TOKENS`], and how many are cut off behind them.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, prompt: &str) -> Result<(Vec<i64>, usize)> {
        let mut ids = self.split(&frame(prompt))?;
        let cut = ids.len().saturating_sub(MAX_TOKENS);
        ids.truncate(MAX_TOKENS);
        Ok((ids, cut))
    }

    fn split(&self, text: &str) -> Result<Vec<i64>> {
        let encoding =
            self.0.encode_fast(text, true).map_err(|error| anyhow!("tokenizing: {error}"))?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }
}
