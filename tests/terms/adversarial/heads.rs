//! Heads that pool the positions of features by attention.

use decoupled_dmd::{CriticHeads, Result};
use tch::{Device, Kind, Tensor, nn};

use super::super::common::{max_difference, seeded, value, wave};

#[test]
fn attention_starts_as_the_plain_mean_and_then_looks_where_it_likes() -> Result<()> {
    let _guard = seeded(7);
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let (channels, width) = (4, 16);
    let plain = CriticHeads::new(&root, &[channels, channels], width)?;
    let features = [wave(&[3, 4, 5, 2], 0.2, Kind::Float), wave(&[3, 4, 7], 1.3, Kind::Float)];
    let before = plain.logits(&features)?;
    let pooled = plain.pooled_by_attention(&root)?;
    assert!(max_difference(&pooled.logits(&features)?, &before) < 1e-6);

    // A query along the keys of one position of sample 0 moves its weight there.
    let of = |name: &str| store.variables()[name].shallow_clone();
    let (query, keys) = (of("0.query"), of("0.keys"));
    let flat = features[0].flatten(2, -1);
    let key = flat.get(0).select(1, 3).unsqueeze(0).matmul(&keys.squeeze_dim(2).tr());
    tch::no_grad(|| query.shallow_clone().copy_(&(key * 1e4).view([1, width, 1])));
    let logits = pooled.logits(&features)?;
    let at_position = {
        let hidden = flat.conv1d(&of("0.mix"), Some(&of("0.bias")), 1, 0, 1, 1);
        let hidden =
            hidden.group_norm(2, Some(&of("0.scale")), Some(&of("0.offset")), 1e-5, true).silu();
        hidden.conv1d(&of("0.read"), Some(&of("0.constant")), 1, 0, 1, 1)
    };
    let scores = flat.conv1d(&keys, None::<&Tensor>, 1, 0, 1, 1) * &query;
    let scores = scores.sum_dim_intlist([1i64].as_slice(), false, None) / 4.0;
    let chosen = scores.argmax(1, false);
    for sample in 0..3 {
        let expected = at_position.double_value(&[sample, 0, chosen.int64_value(&[sample])]);
        let found = logits.double_value(&[sample, 0]);
        assert!((found - expected).abs() < 1e-4, "{sample}: {found} {expected}");
    }
    // The other level keeps its mean, and the query learns.
    assert!(max_difference(&logits.select(1, 1), &before.select(1, 1)) < 1e-6);
    let _ = tch::no_grad(|| query.shallow_clone().zero_());
    pooled.logits(&features)?.sum(None).backward();
    assert!(value(&query.grad().abs().max()) > 0.0);
    Ok(())
}
