//! A linear model trained by one process or several, over Gloo.
//!
//! ```sh
//! ./with-libtorch cargo build --example data_parallel        # in target/debug/examples
//! ./data_parallel
//! torchrun --no-python --nproc-per-node=2 ./data_parallel
//! mpirun -n 2 ./data_parallel
//! for rank in 0 1; do
//!     RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 ./data_parallel &
//! done; wait
//! ```
//! The loss falls from about 5 to below 0.001, and all ranks end with the same checksum.

use std::error::Error;

use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_c10d::{Averaging, ProcessGroup, Reduce};

/// The batch of all processes together.
const BATCH: i64 = 64;
const UPDATES: usize = 200;

fn main() -> Result<(), Box<dyn Error>> {
    tch::set_num_threads(1);
    let group = ProcessGroup::from_env()?;
    let (rank, world_size) = (group.rank(), group.world_size());

    let store = nn::VarStore::new(Device::Cpu);
    let model = nn::linear(store.root(), 4, 1, Default::default());
    let parameters = store.trainable_variables();
    for parameter in &parameters {
        group.broadcast(&mut parameter.shallow_clone(), 0)?;
    }
    let mut optimizer = nn::AdamW::default().build(&store, 5e-2)?;
    let averaging = Averaging::default().max_norm(10.0)?;
    let slope = Tensor::from_slice(&[1.0_f32, -2.0, 0.5, 0.0]).view([4, 1]);

    tch::manual_seed(rank as i64);
    for update in 0..UPDATES {
        let x = Tensor::randn([BATCH / world_size as i64, 4], (Kind::Float, Device::Cpu));
        let loss = (model.forward(&x) - x.matmul(&slope)).square().mean(Kind::Float);
        optimizer.zero_grad();
        loss.backward();
        let averaged = group.average_gradients(&parameters, &averaging)?;
        optimizer.step();

        if update % 50 == 0 || update == UPDATES - 1 {
            let mut mean = loss.detach();
            group.all_reduce(&mut mean, Reduce::Mean)?;
            if rank == 0 {
                let (loss, exchanged) = (mean.double_value(&[]), averaged.statistics);
                println!(
                    "update {update:3}: loss {loss:.5}, gradient norm {:.4}, {} bytes in {} calls",
                    averaged.norm, exchanged.bytes, exchanged.calls
                );
            }
        }
    }
    let checksum: f64 =
        parameters.iter().map(|parameter| parameter.sum(Kind::Double).double_value(&[])).sum();
    println!("rank {rank} of {world_size}: checksum {checksum:.17}");
    Ok(())
}
