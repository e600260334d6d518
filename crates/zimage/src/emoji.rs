//! The embedded world: small pictures of emoji, word vectors, the judge of generated pictures, and the
//! distillation of the small model against them.

mod classifier;
mod evaluation;
mod pictures;
mod report;
pub mod run;
mod scores;
mod words;

pub use classifier::{Classifier, FEATURES};
pub use evaluation::{Evaluator, Row};
pub use pictures::{EmojiData, Item};
pub use report::{Report, Summary, table};
pub use scores::{Judge, Scores, frechet_distance, mean_variance, saturation, variance_drift};
pub use words::Vocabulary;
