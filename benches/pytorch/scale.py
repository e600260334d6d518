"""How the crate's cost grows with batch, tokens, width and steps.

    ./with-libtorch python3 benches/pytorch/scale.py [--only PATTERN] [--out FOLDER]

Needs what `compare.py` needs, and matplotlib with `--out`, which gets scale.svg and scale.json. Prints
a table for each axis: CPU time of one thread, the least of several turns, its exponent from point to
point (1: in proportion), and the peak memory of the process, less that at the start.
"""

import argparse
import fnmatch
import json
import math
import os
import pathlib
import tempfile

from compare import LARGE, ROOT, Side, build, make_model, settings

TEACHER = ROOT / "assets/teacher"
# Of heads of 64 channels, as at width 512.
WIDTHS = (256, 512, 1024)


def axes(folder):
    """Name, unit, and (size, work) of each point."""
    model = lambda width, size, batch: f"transformer {folder}/{width} {batch} {size} 32 train"
    yield "objective: samples", "samples", [
        (n, f"objective decoupled-hybrid float32 {n} drawn") for n in (1, 2, 4, 8, 16)
    ]
    yield "transformer: batch (embedded)", "samples", [
        (n, f"transformer {TEACHER} {n} 32 3 train") for n in (3, 6, 12, 24, 48)
    ]
    yield "transformer: image tokens (width 512)", "tokens", [
        (side * side // 4, model(512, side, 1)) for side in (16, 32, 64, 96)
    ]
    yield "transformer: width (256 tokens)", "width", [(width, model(width, 32, 1)) for width in WIDTHS]
    yield "training step: batch", "samples", [(n, f"training_step {n} 8") for n in (6, 12, 24, 48)]
    yield "training step: student steps", "steps", [(n, f"training_step 24 {n}") for n in (1, 2, 4, 8)]


def measure(work, crate, environment):
    side = Side([crate], environment)
    try:
        side.ask("setup nothing")
        before = side.memory("VmHWM")
        side.ask(f"setup {work}")
        first = side.seconds(1)[0]
        count = max(1, int(0.4 / first))
        return 1e3 * min(side.seconds(count)[0] for _ in range(5)), side.memory("VmHWM") - before
    finally:
        side.close()


def plot(results, path):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for panel, (name, (unit, rows)) in zip(panels.flat, results.items()):
        sizes = [row["size"] for row in rows]
        panel.loglog(sizes, [row["ms"] for row in rows], "o-", base=2, label="CPU time, ms")
        panel.loglog(sizes, [row["mib"] for row in rows], "s--", base=2, label="peak memory, MiB")
        panel.set(title=name, xlabel=unit, xticks=sizes, xticklabels=sizes)
        panel.grid(True, alpha=0.3)
        panel.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="*", help="axes whose name matches this pattern, as *tokens*")
    parser.add_argument("--out", type=pathlib.Path, help="folder for scale.svg and scale.json")
    arguments = parser.parse_args()
    environment = os.environ | settings() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    crate = build()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            config = LARGE | {"dim": width, "n_heads": width // 64, "n_kv_heads": width // 64}
            make_model(pathlib.Path(folder) / str(width), config)
        for name, unit, points in axes(folder):
            if not fnmatch.fnmatch(name, arguments.only):
                continue
            print(f"\n{name}\n\n| {unit} | ms | exponent | MiB |\n|---|---|---|---|")
            rows = []
            for size, work in points:
                ms, mib = measure(work, crate, environment)
                growth = ""
                if rows:
                    ratio = math.log(ms / rows[-1]["ms"]) / math.log(size / rows[-1]["size"])
                    growth = f"{ratio:.2f}"
                rows.append({"size": size, "ms": ms, "mib": mib})
                print(f"| {size} | {ms:.1f} | {growth} | {mib:.0f} |", flush=True)
            results[name] = unit, rows
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, arguments.out / "scale.svg")


if __name__ == "__main__":
    main()
