//! The cost of the terms, of the objective with networks that cost nothing, and of the networks and the
//! training around them, on the GPU if there is one, else on one thread of the CPU.
//!
//! ```sh
//! ./with-libtorch cargo bench --bench criterion [-- FILTER]
//! ```

mod works;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use decoupled_dmd::default_device;

fn names() -> Vec<String> {
    let mut names = Vec::new();
    for kind in ["float32", "bfloat16"] {
        for batch in [8, 1] {
            for schedule in
                ["coupled-shared", "decoupled-full", "decoupled-constrained", "decoupled-hybrid"]
            {
                names.push(format!("objective {schedule} {kind} {batch} drawn"));
            }
            names.push(format!("objective decoupled-hybrid {kind} {batch} observed"));
            names.push(format!("mean_variance {kind} {batch}"));
            names.push(format!("fake {kind} {batch}"));
        }
    }
    let teacher = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/teacher");
    for name in [
        "mmd 64 1024",
        "mmd 4096 64",
        "gan generator 8",
        "gan critic 8",
        "gan generator 1",
        "gan critic 1",
        // A block, as part of a model of one, and a model of 1024 image tokens.
        "s3dit 512 1 1 64 float32 forward",
        "s3dit 512 1 1 64 float32 train",
        "s3dit 512 4 1 64 float32 forward",
        "s3dit 512 4 1 64 float32 train",
        "s3dit 512 4 1 64 bfloat16 train",
        "adapter 512 64 1 64",
        "adamw 200",
        "training_step 24 8",
    ] {
        names.push(name.to_owned());
    }
    names.push(format!("transformer {teacher} 24 32 3 forward"));
    names.push(format!("transformer {teacher} 24 32 3 train"));
    names.push(format!("loading {teacher}"));
    names
}

fn all(criterion: &mut Criterion) {
    tch::set_num_threads(1);
    let device = default_device();
    for name in names() {
        let shown = name.replace(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/"), "");
        criterion.bench_function(&shown, |bencher| {
            // Made here, so that a filter makes what it lets through alone.
            let words: Vec<&str> = name.split_whitespace().collect();
            let mut work = works::find(&words, device).expect("a work");
            bencher.iter(|| {
                let answer = work().expect("an answer");
                if device.is_cuda() {
                    tch::Cuda::synchronize(0);
                }
                answer
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = all
}
criterion_main!(benches);
