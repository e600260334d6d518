"""Compares what `zimage_8step --export comfyui` writes with ComfyUI's own tables of names.

    python3 scripts/reference/comfyui.py COMFYUI STUDENT

needs Python alone. COMFYUI is a checkout of ComfyUI (comfy/utils.py as of commit 09708eae, comfy/lora.py as of
17358c8f), of which the functions `z_image_to_diffusers` and `model_lora_keys_unet` are taken; STUDENT is the folder of a
student with its adapter, transformer/ and comfyui/. Every parameter of transformer/ must be in the whole model at the
place and the rows that the first table names, with its bytes, and nothing else; every pair of the adapter must be one
that the second knows, be that of the adapter in the folder, and aim at the rows of its layer. Writes the table of
the model to crates/zimage/tests/reference/comfyui.tsv, which a test of Rust takes up.
"""

import ast
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

comfyui, student = map(Path, sys.argv[1:3])
TABLE = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference/comfyui.tsv"


def function(path, name, scope):
    """A function of a file that cannot be imported without all that ComfyUI needs."""
    tree = ast.parse((comfyui / path).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module(found, []), path, "exec"), scope)
    return scope[name]


def read(path):
    """Shapes and bytes of a safetensors file by name."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    place = lambda entry: slice(start + entry["data_offsets"][0], start + entry["data_offsets"][1])
    return {name: (entry["shape"], data[place(entry)]) for name, entry in header.items()}


def only(folder):
    (path,) = folder.glob("*.safetensors")
    return read(path)


config = json.loads((student / "transformer/config.json").read_text())
to_comfyui = function("comfy/utils.py", "z_image_to_diffusers", {})
table = to_comfyui(config)
diffusers = only(student / "transformer")
exported = only(student / "comfyui/diffusion_models")

reached, lines = {}, []
for name, (shape, data) in diffusers.items():
    to = table[name]
    key, start, rows = (to, 0, shape[0]) if isinstance(to, str) else (to[0], *to[1][1:])
    assert shape[0] == rows, (name, shape, to)
    row = len(data) // shape[0]
    found = exported[key][1][start * row : (start + rows) * row]
    assert found == data, f"{name} is not in {key} from row {start} on"
    reached[key] = reached.get(key, 0) + rows
    lines.append(f"{name}\t{key}\t{start}\t{rows}")
for key, (shape, _) in exported.items():
    assert reached.get(key) == shape[0], f"{key}: {reached.get(key)} of {shape[0]} rows are known"
TABLE.write_text("\n".join(sorted(lines)) + "\n")
print(f"{len(diffusers)} parameters are in {len(exported)} of ComfyUI, each where its table says")


class Lumina2:
    model_config = SimpleNamespace(unet_config=config)

    def state_dict(self):
        return {f"diffusion_model.{name}": None for name in exported}


class Bases:
    def __getattr__(self, name):
        return Lumina2 if name == "Lumina2" else type(name, (), {})


utils = SimpleNamespace(z_image_to_diffusers=to_comfyui, unet_to_diffusers=lambda config: {})
scope = {"comfy": SimpleNamespace(model_base=Bases(), utils=utils)}
known = function("comfy/lora.py", "model_lora_keys_unet", scope)(Lumina2(), {})
adapter, lora = read(student / "pytorch_lora_weights.safetensors"), only(student / "comfyui/loras")
layers = set()
for name, (shape, data) in lora.items():
    layer, half = name.rsplit(".lora_", 1)
    plain = layer.removeprefix("diffusion_model.")
    assert (shape, data) == adapter[f"transformer.{plain}.lora_{half}"], name
    to = known[layer]
    assert f"diffusion_model.{plain}.weight" == to or f"{plain}.weight" in table, name
    key = to if isinstance(to, str) else to[0]
    rows = exported[key.removeprefix("diffusion_model.")][0][0] if isinstance(to, str) else to[1][2]
    assert half != "B.weight" or shape[0] == rows, (name, shape, to)
    expected = to_comfyui(config, "diffusion_model.")[f"{plain}.weight"]
    assert to == expected, (name, to, expected)
    layers.add(layer)
assert len(lora) == len(adapter) == 2 * len(layers)
print(f"{len(layers)} pairs of the adapter are known to ComfyUI, each for the rows of its layer")
