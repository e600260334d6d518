//! Prompts to caption features: Qwen3 with its tokenizer, and the features on disk.

mod encoder;
mod encoder_key;
mod feature_cache;
mod prompt_file;
mod qwen3;
mod tokenizer;

pub use encoder::TextEncoder;
pub use encoder_key::encoder_key;
pub use feature_cache::FeatureCache;
pub use prompt_file::{Prompt, read_prompts};
pub use qwen3::Qwen3Encoder;
pub use tokenizer::{MAX_TOKENS, PromptTokenizer, frame};
