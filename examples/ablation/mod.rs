//! Experiments on the paper's claims: arms, their training, what is measured, and the report.
#![allow(dead_code, unreachable_pub, reason = "each program that includes this folder uses a part")]

pub mod arm;
pub mod bench;
pub mod critic;
pub mod experiments;
pub mod on_data;
pub mod on_rollout;
pub mod pairs;
pub mod plots;
pub mod prior;
pub mod record;
pub mod report;
pub mod results;
pub mod run;
pub mod statistics;
pub mod training;
