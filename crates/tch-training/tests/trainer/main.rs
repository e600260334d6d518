//! What a trainer is made of: optimizer, adapters, checkpointing, files, and states of a run.

mod checkpointing;
mod common;
mod lora;
mod lora_files;
mod optimizer;
mod run;
mod safetensors;
