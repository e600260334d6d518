"""The crate against PyTorch eager: time, memory and the floor, work by work.

    ./with-libtorch python3 benches/pytorch/compare.py [--only PATTERN] [--rounds N] [--json FILE] [--compiled]

Needs Linux, cargo, and a Python (3.11 or later) with torch 2.13 and diffusers. Both sides are
processes with one thread on the same libtorch and the settings of .cargo/config.toml, so that
PyTorch too has the faster allocator of the crate's examples. They take turns (A B A B ..), and what
is compared is the CPU time of the processes, page faults included, so that a busy machine does
little harm. Each work runs first once on both sides with the same random numbers, and must give the
same losses and gradients: their root mean square and some of their elements. Memory is the peak over
that of loading the process and its libraries. `--compiled` adds PyTorch under torch.compile, which
needs a C++ compiler and some minutes.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
LATENTS = 16 * 128 * 128  # elements of one sample
SCHEDULES = ("coupled-shared", "decoupled-full", "decoupled-constrained", "decoupled-hybrid")
LARGE = {
    "dim": 512,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 8,
    "cap_feat_dim": 256,
    "axes_dims": [16, 24, 24],
    "axes_lens": [256, 64, 64],
}
RELATIVE = {"float32": 2e-5, "bfloat16": 2e-2}
# What is to be reached: works, how PyTorch does them, the ratio of times, and the time over the floor.
GOALS = (
    ("objective", "objective * given", "published", 0.5, 2.0),
    ("objective, float32 throughout", "objective * given", "float32", 0.5, None),
    ("objective, times and noise drawn", "objective * drawn", "published", 0.5, 2.0),
    ("the same, float32 throughout", "objective * drawn", "float32", 0.5, None),
    ("mean-variance", "mean_variance *", "eager", 0.8, None),
    ("MMD", "mmd *", "eager", 0.8, None),
    ("GAN", "gan *", "eager", 0.8, None),
    ("S3-DiT, embedded size", "transformer embedded *", "eager", 0.8, None),
    ("S3-DiT, width 512, 1024 tokens", "transformer dim512 *", "eager", 1.0, None),
    ("optimizer step, fused", "adamw *", "fused", 1.0, None),
    ("training step", "training_step *", "", 0.75, None),
    ("objective, compiled", "objective * given", "compiled", 1.0, None),
    ("GAN, compiled", "gan *", "compiled", 0.9, None),
    ("training step, compiled", "training_step *", "compiled", 0.9, None),
)
TRAINING_STEP_MEMORY = 0.8


class Work:
    """What both sides do, and how PyTorch may do it."""

    def __init__(self, name, *, variants=("eager", "compiled"), tolerance=RELATIVE["float32"], passes=None, flops=None):
        self.name, self.variants, self.tolerance = name, variants, tolerance
        self.bytes, self.flops = passes, flops
        # What PyTorch's side has to import.
        self.libraries = "diffusers" if name.startswith(("transformer", "training_step")) else ""


def works(large):
    for kind, width in (("float32", 4), ("bfloat16", 2)):
        for batch in (8, 1):
            for schedule in SCHEDULES:
                for draws in ("given", "drawn") if schedule == "decoupled-hybrid" else ("given",):
                    # Read: samples, answers of the networks, noise. Written: the gradient, and what
                    # the networks are run on, in float32.
                    looks = 1 if schedule == "coupled-shared" else 2
                    tensors = (1 + 2 + looks + looks + 1) * width + looks * 4
                    yield Work(
                        f"objective {schedule} {kind} {batch} {draws}",
                        variants=("published", "float32", *(("compiled",) if draws == "given" else ())),
                        tolerance=RELATIVE[kind],
                        passes=tensors * LATENTS * batch,
                    )
            # Read: samples. Written: gradient. For the fake score: noise and answers are read too.
            yield Work(
                f"mean_variance {kind} {batch}",
                tolerance=RELATIVE[kind],
                passes=2 * width * LATENTS * batch,
            )
            yield Work(
                f"fake {kind} {batch}",
                tolerance=RELATIVE[kind],
                passes=(4 * width + 4) * LATENTS * batch,
            )
    yield Work("mmd 64 1024")
    yield Work("mmd 1024 64", tolerance=1e-3)
    for part in ("generator", "critic"):
        yield Work(f"gan {part} 8")
    teacher = ROOT / "assets/teacher"
    config = json.loads((teacher / "transformer/config.json").read_text())
    for run_pass, factor in (("forward", 1), ("train", 3)):
        yield Work(f"transformer {teacher} 24 32 3 {run_pass}", flops=factor * flops(config, 24, 64, 32))
        yield Work(f"transformer {large} 1 64 32 {run_pass}", flops=factor * flops(LARGE, 1, 1024, 32))
    yield Work("adamw 200", variants=("fused", "foreach"))
    assets = str(ROOT / "assets")
    yield Work("training_step 24 8", variants=(assets, f"{assets} compiled"))


def flops(config, batch, image, caption):
    """Of the products of matrices in the blocks, forward."""
    dim = config["dim"]
    linear = 2 * (4 * dim * dim + 3 * dim * int(dim / 3 * 8))
    block = lambda tokens: tokens * linear + 4 * tokens * tokens * dim
    refiners = config["n_refiner_layers"] * (block(image) + block(caption))
    return batch * (config["n_layers"] * block(image + caption) + refiners)


def make_model(folder, config):
    """A random model, written by diffusers."""
    script = f"""
import torch
from diffusers import ZImageTransformer2DModel
torch.manual_seed(0)
model = ZImageTransformer2DModel(**{config!r})
for parameter in (model.x_pad_token, model.cap_pad_token):
    torch.nn.init.normal_(parameter, std=0.02)
model.save_pretrained({str(folder / "transformer")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)


class Side:
    """A process that does work when told, its CPU clock and its memory."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.clock = (~self.process.pid << 3) | 2  # CPU time of that process, all threads

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{line}: the process ended, see its message above")
        return json.loads(answer)

    def seconds(self, count):
        """CPU seconds and wall seconds of one of `count` repetitions."""
        start, wall = time.clock_gettime(self.clock), time.monotonic()
        self.ask(f"run {count}")
        end = time.clock_gettime(self.clock)
        return (end - start) / count, (time.monotonic() - wall) / count

    def memory(self, what):
        """VmRSS or its high-water mark VmHWM, in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(what))
        return int(line.split()[1]) / 1024

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def same(ours, theirs, tolerance):
    """Whether two answers tell of the same tensors: of each, its root mean square and some elements."""

    def alike(one, two):
        size, elements = one[0], zip(one[1:], two[1:], strict=True)
        return abs(size - two[0]) <= tolerance * size and all(
            # An element is less sure than the mean of all.
            abs(a - b) <= 10 * tolerance * size
            for a, b in elements
        )

    pairs = zip(ours, theirs)
    return len(ours) == len(theirs) and all(alike(one, two) for one, two in pairs)


def compare(work, crate, environment, rounds, budget):
    """One row of results for each way in which PyTorch does the work."""
    eager = [sys.executable, str(ROOT / "benches/pytorch/eager.py")]
    sides = [Side([crate], environment)] + [Side(eager, environment) for _ in work.variants]
    try:
        answers, rest = [], []
        for side, variant in zip(sides, ("", *work.variants)):
            side.ask(f"setup nothing {work.libraries}".strip())
            rest.append(side.memory("VmHWM"))
            answers.append(side.ask(f"setup {work.name} {variant}".strip()))
        for variant, theirs in zip(work.variants, answers[1:]):
            if not same(answers[0], theirs, work.tolerance):
                raise SystemExit(f"{work.name}: the crate finds {answers[0]}, PyTorch {theirs}")
        slowest = max(side.seconds(1)[0] for side in sides)
        count = max(1, int(budget / max(slowest, 1e-6)))
        samples = [[side.seconds(count) for side in sides] for _ in range(rounds)]
        peaks = [side.memory("VmHWM") - before for side, before in zip(sides, rest)]
    finally:
        for side in sides:
            side.close()
    ours = [row[0][0] for row in samples]
    for index, variant in enumerate(work.variants, 1):
        theirs = [row[index][0] for row in samples]
        yield {
            "work": work.name,
            # Of a path and a word, the word.
            "pytorch": " ".join(word for word in variant.split() if "/" not in word),
            "ms": 1e3 * statistics.median(ours),
            "pytorch_ms": 1e3 * statistics.median(theirs),
            "ratio": spread([a / b for a, b in zip(ours, theirs)]),
            "wall_ratio": statistics.median(row[0][1] / row[index][1] for row in samples),
            "peak_mib": peaks[0],
            "pytorch_peak_mib": peaks[index],
            "rest_mib": rest[0],
            "pytorch_rest_mib": rest[index],
        }


def spread(values):
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def rate(name, amount, environment):
    """The best rate of five at which PyTorch does a basic operation."""
    side = Side([sys.executable, str(ROOT / "benches/pytorch/eager.py")], environment)
    side.ask(f"setup {name}")
    best = min(side.seconds(20)[0] for _ in range(5))
    side.close()
    return amount / best


def settings():
    """The environment that cargo gives to the crate's programs, but for libtorch's place."""
    config = tomllib.loads((ROOT / ".cargo/config.toml").read_text())
    return {name: value for name, value in config["env"].items() if isinstance(value, str)}


def build():
    command = ["cargo", "build", "--release", "--example", "pytorch_worker", "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = (json.loads(line) for line in lines.splitlines() if line.startswith("{"))
    return [m["executable"] for m in messages if m.get("executable")][-1]


def libtorch(environment):
    """The library that PyTorch runs on, and whether the crate's is the same file."""
    script = "import torch, os; print(os.path.join(os.path.dirname(torch.__file__), 'lib'))"
    folder = subprocess.check_output([sys.executable, "-c", script], text=True).strip()
    if environment.get("LIBTORCH_USE_PYTORCH"):
        return True
    digest = lambda folder: hashlib.md5(
        (pathlib.Path(folder) / "libtorch_cpu.so").read_bytes()
    ).hexdigest()
    home = environment.get("LIBTORCH") or ROOT / ".libtorch/torch"
    return digest(folder) == digest(pathlib.Path(home) / "lib")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="*", help="works whose name matches this pattern, as *mmd*")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a turn")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--compiled", action="store_true", help="PyTorch under torch.compile too")
    arguments = parser.parse_args()
    environment = os.environ | settings() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    crate = build()
    if not libtorch(environment):
        print("note: the two sides run on different builds of libtorch")
    bandwidth = rate("copy 8", 2 * 8 * 2**20, environment)
    products = rate("matmul 1024", 2 * 1024**3, environment)
    print(f"copy {bandwidth / 1e9:.1f} GB/s (read and written), matmul {products / 1e9:.0f} GFLOP/s, 1 thread\n")
    print("| work | PyTorch | ms | PyTorch ms | ratio (quartiles) | times floor | peak MiB | PyTorch |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        chosen = [w for w in works(folder) if fnmatch.fnmatch(short(w.name, folder), arguments.only)]
        if any(str(folder) in work.name for work in chosen):
            make_model(folder, LARGE)
        for work in chosen:
            if not arguments.compiled:
                work.variants = tuple(v for v in work.variants if not v.endswith("compiled"))
            floor = (work.bytes or 0) / bandwidth + (work.flops or 0) / products
            for row in compare(work, crate, environment, arguments.rounds, arguments.seconds):
                row["work"] = short(work.name, folder)
                row["times_floor"] = row["ms"] / 1e3 / floor if floor else None
                results.append(row)
                print(line(row), flush=True)
    print(*summary(results), sep="\n")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


def summary(results):
    """The goals with what was measured, from the least to the largest."""
    yield "\n| goal | of PyTorch, at most | measured | of the floor, at most | measured |"
    yield "|---|---|---|---|---|"

    def measured(values, goal):
        verdict = "" if max(values) <= goal else ": **missed**"
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return (low if low == high else f"{low} to {high}") + verdict

    for name, pattern, variant, ratio, floor in GOALS:
        rows = [
            row
            for row in results
            if fnmatch.fnmatch(row["work"], pattern) and row["pytorch"] == variant
        ]
        if not rows:
            continue
        ratios = measured([row["ratio"][1] for row in rows], ratio)
        floors = f"{floor} | {measured([row['times_floor'] for row in rows], floor)}" if floor else "|"
        yield f"| {name} | {ratio} | {ratios} | {floors} |"
        if variant == "":
            memory = [row["peak_mib"] / max(row["pytorch_peak_mib"], 1.0) for row in rows]
            ratios = measured(memory, TRAINING_STEP_MEMORY)
            yield f"| its peak memory | {TRAINING_STEP_MEMORY} | {ratios} | | |"


def short(name, folder):
    return name.replace(str(ROOT / "assets/teacher"), "embedded").replace(str(folder), "dim512")


def line(row):
    low, ratio, high = row["ratio"]
    floor = f"{row['times_floor']:.1f}" if row["times_floor"] else "-"
    return (
        f"| {row['work']} | {row['pytorch']} | {row['ms']:.2f} | {row['pytorch_ms']:.2f} "
        f"| **{ratio:.2f}** ({low:.2f} to {high:.2f}) | {floor} "
        f"| {row['peak_mib']:.0f} | {row['pytorch_peak_mib']:.0f} |"
    )


if __name__ == "__main__":
    main()
