"""LoRA files between diffusers and the example, both ways.

    python3 -m pip install torch diffusers transformers peft safetensors numpy
    python3 scripts/reference/lora.py                # writes crates/zimage/tests/reference/lora
    python3 scripts/reference/lora.py --check DIR    # reads what the Rust test wrote into DIR

The first form makes a small ZImageTransformer2DModel, adds a random adapter on the seven linear layers of
every block, and saves the adapter (through diffusers' own `save_lora_weights`), inputs, outputs and their
distance from float64.

The second loads `DIR/lora.safetensors` by diffusers' own loader onto `DIR/base/transformer`, counts the
pairs that arrived, and compares the outputs, and those of `DIR/merged/transformer`, with the outputs that
Rust has stored in `DIR/case.safetensors`. It exits with 1 if a number is off.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from precision import SUFFIX, bound, distance, distances, double, error, float64
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

OUT = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference/lora"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
CONFIG = dict(
    in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    cap_feat_dim=8, axes_dims=[4, 4, 4], axes_lens=[96, 16, 16],
)  # fmt: skip


def forward(model, latents, t, captions):
    """Outputs [B, C, H, W] for latents [B, C, H, W], times [B] and captions [B, L, F]."""
    with torch.no_grad():
        out = model(list(latents.unsqueeze(2)), t, list(captions), return_dict=False)[0]
    return torch.stack(list(out)).squeeze(2)


def pairs(model):
    """Modules of `model` that hold a low-rank pair."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]


def wave_model():
    """The model of crates/zimage/tests/common/small_model.rs: every parameter a known wave."""
    model = ZImageTransformer2DModel(**CONFIG).eval()
    for k, (name, parameter) in enumerate(sorted(model.named_parameters())):
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        values = torch.sin(index * 0.7 + 0.9 * k).float().reshape(parameter.shape)
        if parameter.ndim == 2:
            values /= parameter.shape[1] ** 0.5
        else:
            values = values * 0.1 if name.endswith("bias") else values * 0.1 + 1.0
        parameter.data = values
    return model


def write():
    torch.manual_seed(5)
    model = wave_model()
    case = {
        "latents": torch.randn(2, 4, 4, 6),
        "t": torch.tensor([0.25, 0.9]),
        "captions": torch.randn(2, 5, 8),
    }
    inputs = dict(case)

    def record(name):
        case[name] = forward(model, **inputs)
        with float64():
            exact = forward(double(model), **{name: value.double() for name, value in inputs.items()})
        case.update(distances({name: case[name]}, {name: exact}))
        print(f"{name}: {case[name + SUFFIX].item():.1e} from float64")

    record("base")
    # The scale is that of the file: rank 3 and alpha 3, as files without alpha mean it.
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    record("adapted")
    ZImagePipeline.save_lora_weights(OUT, transformer_lora_layers=get_peft_model_state_dict(model))
    save_file(case, OUT / "case.safetensors")
    moved = (case["adapted"] - case["base"]).abs().max()
    print(f"{len(pairs(model))} pairs; the adapter moves the output by {moved:.3f}")
    print(sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file()), "bytes in", OUT)


def check(folder):
    case = load_file(folder / "case.safetensors")
    inputs = {name: case[name] for name in ["latents", "t", "captions"]}
    tensors = load_file(folder / "lora.safetensors")
    expected = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in tensors}
    faults = 0

    def report(what, model, name):
        """Compares `model` with the outputs `name` of Rust, by its distance from float64."""
        nonlocal faults
        found = forward(model, **inputs)
        with float64():
            exact = forward(double(model), **{key: value.double() for key, value in inputs.items()})
        off, limit = error(found, case[name]), bound(distance(found, exact))
        faults += not off <= limit
        print(f"{what}: {off:.1e} (at most {limit:.1e})")

    def load(part):
        return ZImageTransformer2DModel.from_pretrained(folder / part / "transformer").eval()

    model = load("base")
    report("base against Rust", model, "base")
    # The loader that users call; only the transformer of the pipeline is needed for it.
    pipeline = ZImagePipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model
    )
    pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
    loaded = pairs(model)
    missing = expected.symmetric_difference(loaded)
    print(f"{len(loaded)} pairs of {len(tensors) // 2} loaded")
    if missing or not loaded:
        faults += 1
        print("not loaded, or loaded without being in the file:", sorted(missing))
    report("adapter against Rust", model, "adapted")
    direct = load("base")
    direct.load_lora_adapter(tensors, prefix="transformer")
    faults += set(pairs(direct)) != expected
    report("load_lora_adapter against Rust", direct, "adapted")
    model.disable_lora()
    report("disabled adapter against base", model, "base")
    report("merged against Rust's adapter", load("merged"), "adapted")
    # An adapter that does nothing would have passed, were this within the bounds.
    moved = error(case["adapted"], case["base"])
    print(f"the adapter moves the output by {moved:.3f}")
    faults += not moved > 1e-2
    return faults


parser = argparse.ArgumentParser()
parser.add_argument("--check", type=Path, metavar="DIR")
arguments = parser.parse_args()
if arguments.check:
    sys.exit(1 if check(arguments.check) else 0)
write()
