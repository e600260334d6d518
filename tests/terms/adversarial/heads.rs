//! Heads that pool the positions of features by attention, and heads that see an embedding.

use decoupled_dmd::{CriticHeads, Error, Result};
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

#[test]
fn an_embedding_is_read_by_its_projection_on_the_pooled_features() -> Result<()> {
    let _guard = seeded(8);
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let (width, size) = (16, 5);
    let features = [wave(&[3, 4, 5, 2], 0.2, Kind::Float), wave(&[3, 6], 1.3, Kind::Float)];
    let embedding = wave(&[3, size], 0.7, Kind::Float);
    let heads = CriticHeads::new(&root, &[4, 6], width)?;
    let before = heads.logits(&features)?;
    let missing = heads.logits_given(&features, &embedding);
    assert!(matches!(missing, Err(Error::Missing { what, setter: "CriticHeads::conditioned" })
        if what == "projection of the embedding"));
    let heads = heads.conditioned(&root, size)?;
    assert!(heads.logits_given(&features, &embedding)?.equal(&before), "it starts without it");

    let of = |name: &str| store.variables()[name].shallow_clone();
    tch::no_grad(|| {
        for level in ["0.project", "1.project"] {
            of(level).copy_(&wave(&[width, size], 2.2, Kind::Float));
        }
    });
    let found = heads.logits_given(&features, &embedding)?;
    let hidden = |level: &str, x: &Tensor| {
        let name = |name: &str| of(&format!("{level}.{name}"));
        let hidden = x.conv1d(&name("mix"), Some(&name("bias")), 1, 0, 1, 1);
        hidden.group_norm(2, Some(&name("scale")), Some(&name("offset")), 1e-5, true).silu()
    };
    for (level, x) in [("0", features[0].flatten(2, -1)), ("1", features[1].unsqueeze(-1))] {
        let pooled = hidden(level, &x).mean_dim([2i64].as_slice(), false, None);
        let read = embedding.matmul(&of(&format!("{level}.project")).tr());
        let added = (read * pooled).sum_dim_intlist([1i64].as_slice(), false, None) / 4.0;
        let column = level.parse().unwrap();
        let expected = before.select(1, column) + added;
        assert!(max_difference(&found.select(1, column), &expected) < 1e-6, "{level}");
    }
    // Each row has its own embedding, in any type; the projection learns, with attention too.
    let other = embedding.copy();
    let _ = other.get(2).fill_(3.0);
    let moved = heads.logits_given(&features, &other)?;
    assert!(moved.narrow(0, 0, 2).equal(&found.narrow(0, 0, 2)));
    assert!(max_difference(&moved.get(2), &found.get(2)) > 1e-3);
    let rough = heads.logits_given(&features, &embedding.to_kind(Kind::BFloat16))?;
    assert_eq!(rough.kind(), Kind::Float);
    let heads = heads.pooled_by_attention(&root)?;
    let pooled = heads.logits_given(&features, &embedding)?;
    assert!(max_difference(&pooled, &found) < 1e-6);
    pooled.sum(None).backward();
    assert!(value(&of("1.project").grad().abs().max()) > 0.0);

    let missing = heads.logits(&features);
    assert!(matches!(missing, Err(Error::Missing { what: "embedding of the critic", setter })
        if setter == "CriticHeads::logits_given"));
    for shape in [&[3i64, 4][..], &[2, 5], &[3]] {
        let found =
            heads.logits_given(&features, &Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        assert!(matches!(found, Err(Error::Shape { what: "embedding of the critic", .. })));
    }
    let made = CriticHeads::new(&root.sub("bad"), &[4], 8)?.conditioned(&root.sub("bad"), 0);
    assert!(matches!(made, Err(Error::OutOfRange { what: "size of the embedding", .. })));
    Ok(())
}
