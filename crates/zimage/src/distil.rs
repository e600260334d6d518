//! Decoupled DMD on a Z-Image model: roles of one frozen teacher, their training, and the student that is left.

mod adapter;
mod alarms;
mod curves;
mod distillation;
mod export;
mod fake_score;
mod flow_matching;
mod model_card;
mod pairs;
mod picture_size;
mod plan;
mod processes;
mod prompts;
mod readings;
mod recipe;
mod renderer;
mod role_trainer;
mod rollout;
pub mod run;
mod sampling;
mod saved_student;
mod stream;
mod student;
mod tensorboard;
mod terms;
mod training_loop;
mod weights;

pub use adapter::{denoiser, fake_denoiser};
pub use alarms::{Alarm, Alarms};
pub use curves::{FONT, register_font, write_curves};
pub use distillation::{Distillation, MadeBy, Record};
pub use export::export_comfyui;
pub use fake_score::FakeScore;
pub use flow_matching::{SHIFT, flow_matching_loss};
pub use model_card::write_model_card;
pub use pairs::{PairBatch, PairSettings, Pairs};
pub use picture_size::PictureSize;
pub use plan::{exchanged, memory_plan};
pub use processes::{Processes, own_device, seed_of_rank};
pub use prompts::{Buckets, Prompts};
pub use readings::Readings;
pub use recipe::{Decay, Preset, Recipe, embedded_optimizer};
pub use renderer::{Renderer, draw_noise};
pub use role_trainer::RoleTrainer;
pub use rollout::{Captions, Rollout};
pub use sampling::Sampling;
pub use saved_student::{
    ADAPTER, FinishedRun, REPORT, SavedRecipe, Start, open_states, save_student, states_stay,
};
pub use stream::Stream;
pub use student::StudentWeights;
pub use terms::{Networks, ScheduledTerms, Terms};
pub use training_loop::{Ending, History, Intervals, Outcome, Preview, train_student};
pub use weights::{Network, RoleWeights};
