"""The whole Z-Image pipeline of diffusers on a small random folder, and students that Rust has trained on it.

    python3 -m pip install torch diffusers==0.42.1 transformers peft safetensors
    python3 scripts/reference/pipeline.py                  # writes crates/zimage/tests/reference/pipeline
    python3 scripts/reference/pipeline.py make DIR         # the same as one whole folder
    python3 scripts/reference/pipeline.py check DIR RUN    # compares what the example has made of DIR

Text encoder, tokenizer and autoencoder are those that text_encoder.py and autoencoder.py have made, the
transformer is made here. `make` also stores, in DIR/expected.safetensors, prompts, initial latents and the
images of the real ZImagePipeline in 8 steps, without guidance and with, in float32 with their distance from
float64.

`check` takes a RUN of `zimage_8step --checkpoint DIR --merge --out RUN` and a
`--sample PROMPT --tensors --out RUN` after it. It loads the student by `load_lora_weights`, counts the
pairs that arrived, draws from the noise that Rust drew from, and compares the images; then the same with
the merged transformer. It exits with 1 if a number is off.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from precision import SUFFIX, bound, distance, distances, error, float64
from parameters import randomise
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Model

REFERENCE = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference"
# What other scripts have made, and where it goes in the folder.
PARTS = {
    "text_encoder": REFERENCE / "text_encoder" / "text_encoder",
    "tokenizer": REFERENCE / "text_encoder" / "tokenizer",
    "vae": REFERENCE / "autoencoder" / "two_levels" / "vae",
}
CONFIG = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=24, n_layers=2, n_refiner_layers=1,
    n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 4, 4], axes_lens=[1024, 64, 64],
)  # fmt: skip
# The first two are of one padded length, so that they can be a batch without a mask.
PROMPTS = ["A red fox", "A cat", "An old man reads a newspaper on a bench; two children play with a ball."]
# Pixels of a side: 12 latents, 6 patches, so that image tokens need padding.
SIDE = 24
STEPS = 8
# As the pipeline counts it: pos + g (pos - neg).
GUIDANCE = {"unguided": 0.0, "guided": 3.0}


def transformer():
    """A random model, to the precision that is stored."""
    model = ZImageTransformer2DModel(**CONFIG)
    randomise(model, torch.Generator().manual_seed(23))
    return model.bfloat16()


def load(folder, dtype=torch.float32):
    """The pipeline of a folder."""
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, latents, guidance, steps):
    """Images [N, 3, H, W] in [0, 1], and how often the transformer was called."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = pipeline.transformer.register_forward_pre_hook(count)
    side = latents.shape[-1] * pipeline.vae_scale_factor
    images = pipeline(
        list(prompts), height=side, width=side, latents=latents, guidance_scale=guidance,
        num_inference_steps=steps, output_type="pt",
    ).images  # fmt: skip
    handle.remove()
    return images, calls


def expected(folder):
    pipeline = load(folder)
    side = SIDE // pipeline.vae_scale_factor
    latents = torch.randn(len(PROMPTS), CONFIG["in_channels"], side, side, generator=torch.Generator().manual_seed(5))
    tensors = {"latents": latents}
    for i, prompt in enumerate(PROMPTS):
        tensors[f"prompts/{i}"] = torch.tensor(list(prompt.encode()), dtype=torch.uint8)
        length = len(pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0])
        print(f"{length:4} tokens  {prompt!r}")
    for name, guidance in GUIDANCE.items():
        images, calls = draw(pipeline, PROMPTS, latents, guidance, STEPS)
        assert calls == STEPS, f"{STEPS} steps are {calls} evaluations in this version of diffusers"
        single = [draw(pipeline, [p], z[None], guidance, STEPS)[0][0] for p, z in zip(PROMPTS, latents)]
        print(f"{name}: sigmas {[round(s, 4) for s in pipeline.scheduler.sigmas.tolist()]}")
        cut = ((images == 0) | (images == 1)).float().mean()
        print(f"{name}: mean {images.mean():.3f}, deviation {images.std():.3f}, {100 * cut:.1f} % cut off")
        print(f"{name}: one by one differs from the batch by {(torch.stack(single) - images).abs().max():.1e}")
        tensors[name] = images.contiguous()
        with float64():
            exact, _ = draw(load(folder, torch.float64), PROMPTS, latents.double(), guidance, STEPS)
        tensors |= distances(tensors, {name: exact})
        print(f"{name}: {tensors[name + SUFFIX].item():.1e} from float64")
    other, _ = draw(pipeline, PROMPTS[::-1], latents, 0.0, STEPS)
    for name, images in [("guidance", tensors["guided"]), ("another prompt", other)]:
        print(f"{name} moves the images by {(images - tensors['unguided']).abs().max():.3f}")
    return tensors


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for part, source in PARTS.items():
        shutil.copytree(source, folder / part, dirs_exist_ok=True)
    # `save_pretrained` of the whole pipeline writes model_index.json as released folders have it.
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.bfloat16),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=transformer(),
    ).save_pretrained(folder)
    save_file(expected(folder), folder / "expected.safetensors")


def write_reference():
    """The parts of the folder that no other script has made."""
    out = REFERENCE / "pipeline"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for part in ["transformer", "scheduler"]:
            shutil.copytree(folder / part, out / part)
        for file in ["model_index.json", "expected.safetensors"]:
            shutil.copy(folder / file, out)
    print(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()), "bytes in", out)


def pairs(model):
    """Modules of `model` that hold a low-rank pair."""
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}


def check(folder, run):
    sample = load_file(run / "sample.safetensors")
    prompt = bytes(sample["prompt"].tolist()).decode()
    # [-1, 1] and a little beyond to what pipelines return.
    found = (sample["images"] / 2 + 0.5).clamp(0, 1)
    steps = json.loads((run / "student" / "recipe.json").read_text())["steps"]
    faults = 0

    def images(pipeline, latents):
        return draw(pipeline, [prompt] * len(latents), latents, 0.0, steps)[0]

    def report(name, pipeline, pipeline64):
        """Compares the pictures of a pipeline with those of Rust, by their distance from float64; the bound."""
        nonlocal faults
        pictures = images(pipeline, sample["noise"])
        with float64():
            exact = images(pipeline64, sample["noise"].double())
        off, limit = error(found, pictures), bound(distance(pictures, exact))
        faults += not off <= limit
        print(f"{name}: {off:.1e} (at most {limit:.1e})")
        return limit

    pipeline, pipeline64 = load(folder), load(folder, torch.float64)
    base = images(pipeline, sample["noise"])
    file = run / "student" / "pytorch_lora_weights.safetensors"
    keys = load_file(file)
    in_file = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in keys}
    # As users load it: the folder, and the file by its default name.
    for each in [pipeline, pipeline64]:
        each.load_lora_weights(run / "student")
    loaded = pairs(pipeline.transformer)
    print(f"{len(loaded)} pairs of {len(in_file)} loaded")
    if loaded != in_file or len(keys) != 2 * len(in_file) or not loaded:
        faults += 1
        print("not loaded, or loaded without being in the file:", sorted(loaded ^ in_file))
    pipeline64.transformer.double()
    limit = report("adapter, images of diffusers against Rust", pipeline, pipeline64)

    pipeline, pipeline64 = load(folder), load(folder, torch.float64)
    for each, dtype in [(pipeline, torch.float32), (pipeline64, torch.float64)]:
        merged = ZImageTransformer2DModel.from_pretrained(run / "student" / "transformer", torch_dtype=dtype)
        each.transformer = merged
    report("merged transformer, images of diffusers against Rust", pipeline, pipeline64)
    moved = error(found, base)
    print(f"the student moves the images by {moved:.2e}")
    # Or else an adapter that does nothing would pass.
    faults += not moved > 10 * limit
    return faults


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("make").add_argument("folder", type=Path)
    checking = commands.add_parser("check")
    checking.add_argument("folder", type=Path)
    checking.add_argument("run", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "check":
        sys.exit(1 if check(arguments.folder, arguments.run) else 0)
    if arguments.command == "make":
        make(arguments.folder)
    else:
        write_reference()


if __name__ == "__main__":
    main()
