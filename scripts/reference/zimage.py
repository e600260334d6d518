"""Writes crates/zimage/tests/reference/transformer/: what diffusers' Z-Image transformer answers.

    python3 -m pip install torch diffusers==0.42.1 safetensors
    python3 scripts/reference/zimage.py

Two small models run on batches of unequal sizes, caption lengths and frame counts, with the gradients of
sum(output * cotangent), and the distance of both from float64. One has parameters that the test computes too (so no weights need to be kept) and
is float32; the other is a folder in bfloat16 as `save_pretrained` writes it, in several shards.
With a folder as argument, the first is saved there as well, in a single file.
"""

import copy
import shutil
import sys
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from precision import distances, double, float64
from parameters import randomise
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference/transformer"
GENERATOR = torch.Generator().manual_seed(11)

COMPUTED = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=48, n_layers=2, n_refiner_layers=1,
    n_heads=3, n_kv_heads=3, cap_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[160, 16, 16],
)
SHARDED = dict(
    all_patch_size=(4,), all_f_patch_size=(1,), in_channels=3, dim=24, n_layers=1, n_refiner_layers=2,
    n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[2, 6, 4], axes_lens=[128, 8, 12],
    siglip_feat_dim=None,
)
# Parameters whose gradients are kept: one of each kind of place.
PARTS = [
    "x_pad_token", "cap_pad_token", "cap_embedder.0.weight", "cap_embedder.1.bias", "t_embedder.mlp.2.bias",
    "noise_refiner.0.attention.to_v.weight", "context_refiner.0.feed_forward.w1.weight",
    "layers.0.attention.norm_k.weight", "layers.0.attention.to_q.weight", "layers.0.adaLN_modulation.0.bias",
]
# Name of a case: for each item frames, height and width in patches, words, time. Tokens are padded to 32.
CASES = {
    # Every length differs; 64 tokens and 32 words need no padding.
    "unequal": [(1, 2, 3, 3, 0.25), (1, 8, 8, 32, 0.9), (1, 5, 7, 33, 0.0), (3, 4, 4, 70, 1.0)],
    # Equal in the unified stage, unequal before it.
    "crossed": [(1, 8, 4, 40, 0.4), (1, 5, 8, 20, 0.7)],
    # No mask anywhere, though the captions differ.
    "frames": [(2, 3, 4, 9, 0.1), (2, 3, 4, 31, 0.6)],
}


def residues(model):
    """Fills the parameters, sorted by name, with scattered numbers that need no generator."""
    with torch.no_grad():
        for k, (name, parameter) in enumerate(sorted(model.named_parameters())):
            i = torch.arange(parameter.numel())
            v = ((i * i + 7 * i + 13 * k) % 1009).double() / 300 - 1.68
            v = v.reshape(parameter.shape)
            if name.endswith("pad_token"):
                v = 0.5 * v
            elif name.endswith("bias"):
                v = 0.1 * v
            elif v.dim() == 1:
                v = 1 + 0.1 * v
            else:
                v = v / v.shape[1] ** 0.5
            parameter.copy_(v.float())


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR).bfloat16().float()


def answer(case, model, latents, t, captions, cotangents, call):
    """Outputs and gradients, by the names that they have in the file."""
    latents, captions = ([x.detach().requires_grad_() for x in group] for group in (latents, captions))
    outputs = model(latents, t, captions, **call)[0]
    loss = sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents))
    leaves = {f"latents/{i}": latent for i, latent in enumerate(latents)}
    leaves |= {f"captions/{i}": caption for i, caption in enumerate(captions)}
    if case == "unequal":
        leaves |= {f"parameters/{name}": dict(model.named_parameters())[name] for name in PARTS}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    tensors = {f"{case}/gradient/{name}": gradient for name, gradient in zip(leaves, gradients)}
    return tensors | {f"{case}/output/{i}": output.detach().clone() for i, output in enumerate(outputs)}


def record(model, cases):
    """Inputs, outputs and gradients of cases, in float32, with their distance from float64; outputs in
    bfloat16 beside them."""
    tensors = {}
    (patch,), channels, width = (model.config[key] for key in ["all_patch_size", "in_channels", "cap_feat_dim"])
    for case, items in cases.items():
        latents = [draw(channels, f, h * patch, w * patch) for f, h, w, _, _ in items]
        captions = [draw(words, width) for *_, words, _ in items]
        cotangents = [draw(*latent.shape) for latent in latents]
        t = torch.tensor([item[-1] for item in items])
        call = dict(patch_size=patch, f_patch_size=1, return_dict=False)
        found = answer(case, model, latents, t, captions, cotangents, call)
        with float64():
            inputs = [[x.double() for x in group] for group in (latents, captions, cotangents)]
            exact = answer(case, double(model), inputs[0], t.double(), *inputs[1:], call)
        tensors |= found | distances(found, exact)
        with torch.no_grad():
            rough = copy.deepcopy(model).bfloat16()
            rough = rough([x.bfloat16() for x in latents], t, [c.bfloat16() for c in captions], **call)[0]
        tensors[f"{case}/t"] = t
        for part, values in [
            ("latents", latents), ("captions", captions), ("cotangent", cotangents), ("bfloat16", rough),
        ]:
            tensors |= {f"{case}/{part}/{i}": value.detach().clone() for i, value in enumerate(values)}
    return tensors


shutil.rmtree(OUT, ignore_errors=True)
(OUT / "computed").mkdir(parents=True)

model = ZImageTransformer2DModel(**COMPUTED)
residues(model)
model.save_config(OUT / "computed")
if len(sys.argv) > 1:
    model.save_pretrained(Path(sys.argv[1]) / "transformer")
save_file(record(model, CASES), OUT / "computed.safetensors")

model = ZImageTransformer2DModel(**SHARDED)
randomise(model, GENERATOR)
model.bfloat16()
model.save_pretrained(OUT / "sharded" / "transformer", max_shard_size="300KB")
model.float()
save_file(record(model, {"unequal": CASES["unequal"]}), OUT / "sharded.safetensors")
for path in sorted(OUT.rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size:8} {path.relative_to(OUT)}")
