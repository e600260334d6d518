//! The text encoder: prompts to the caption features that Z-Image was trained on.

use std::path::Path;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use tch_training::parameters::is_finite;

use crate::text::qwen3::Qwen3Encoder;
use crate::text::tokenizer::{MAX_TOKENS, PromptTokenizer};

/// Tokenizer and language model of a diffusers folder.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: PromptTokenizer,
    model: Qwen3Encoder,
}

impl TextEncoder {
    /// Reads `text_encoder/` and `tokenizer/tokenizer.json` of a diffusers folder.
    ///
    /// # Errors
    /// If a file is missing or broken, or asks for what is not supported, or the two do not fit.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let model = Qwen3Encoder::load(&folder.join("text_encoder"), kind, device)?;
        let path = folder.join("tokenizer").join("tokenizer.json");
        let tokenizer = PromptTokenizer::load(&path, model.config().vocab_size)?;
        Ok(Self { tokenizer, model })
    }

    /// The width F of the features.
    pub fn width(&self) -> i64 {
        self.model.config().hidden_size
    }

    /// Features `[L_i, F]` of each prompt, L_i its own number of tokens, in the dtype and on the
    /// device of the weights. Prompts are run one by one, so that there is neither padding nor a mask;
    /// those of a training are encoded once and kept. A prompt of more than [`MAX_TOKENS`] is cut off at its
    /// end, with a warning on standard error.
    ///
    /// # Errors
    /// If the tokenizer or libtorch fails, or features are not finite (as in float16, which is too
    /// narrow for this model).
    pub fn encode(&self, prompts: &[&str]) -> Result<Vec<Tensor>> {
        prompts
            .iter()
            .map(|prompt| {
                let (ids, cut) = self.tokenizer.encode(prompt)?;
                if cut > 0 {
                    eprintln!(
                        "warning: {cut} tokens at the end of {:?} are cut off: a prompt has at most \
                         {MAX_TOKENS}, its frame included",
                        beginning(prompt)
                    );
                }
                let features = self.model.forward(&ids)?;
                ensure!(is_finite(&features)?, "features of {prompt:?} are not finite");
                Ok(features)
            })
            .collect()
    }
}

/// The first words of a prompt, by which it is known.
fn beginning(prompt: &str) -> String {
    const CHARACTERS: usize = 60;
    let mut text: String = prompt.chars().take(CHARACTERS).collect();
    if text.len() < prompt.len() {
        text.push('…');
    }
    text
}
