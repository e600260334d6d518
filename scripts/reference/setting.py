"""The samples and networks of which objective.py and fake_score.py compute losses, in float64 and, to see
how far that is off, in float32."""

import contextlib
import math
import pathlib

import torch
from safetensors.torch import save_file

from noise_paths import PATHS

torch.set_default_dtype(torch.float64)
SHAPE = (3, 2, 2, 3)
TEACHER_GAIN, FAKE_GAIN = 0.8, 0.6

TIMES = {
    "middle": [0.2, 0.5, 0.7],
    "dm": [0.6, 0.35, 0.15],
    "bounds": [0.02, 0.98, 0.5],
    "near": [1e-6, 1.0 - 1e-6, 0.5],
    "ends": [0.0, 1.0, 0.5],
}


def rounded(tensor):
    """Inputs are float32 numbers, so that a run in float32 starts from the very same ones: 1 - t
    near the clean end would otherwise carry their rounding, magnified."""
    return tensor.float().double()


def wave(phase, rate):
    index = torch.arange(math.prod(SHAPE), dtype=torch.float64)
    values = torch.sin(rate * index + phase) + 0.3 * torch.cos(1.9 * index * rate)
    return rounded(values).reshape(SHAPE)


def column(values):
    return rounded(torch.tensor(values)).reshape(-1, 1, 1, 1)


def coefficients(path, times):
    """Computed in float64, whatever is computed with them: near an end they are small differences."""
    return [value.to(torch.get_default_dtype()) for value in PATHS[path](column(TIMES[times]))]


def network(path, times, x, c, gain):
    """A network of anything: no part of it is special. As EDM's do, that on its path scales its
    input, which is of size sigma up to 80; in float32 the sine of such a number has lost two digits."""
    if path == "edm":
        x = x / (coefficients(path, times)[1] ** 2 + 0.25).sqrt()
    return gain * torch.sin(x + c) * (0.5 + column(TIMES[times]).to(x.dtype)) + 0.1 * x


def narrow(tensor):
    """As bfloat16 has it."""
    return tensor.bfloat16().to(tensor.dtype)


def reaches_noise(path, times):
    """Whether a = 0 so nearly that a clean sample from the noise or the score is refused."""
    return times in ("near", "ends") and path in ("rectified_flow", "trig_flow")


X, EPS, EPS_DM = wave(0.3, 0.7), wave(5.0, 1.3), wave(9.0, 1.1)
COND, NULL = wave(1.1, 0.5), wave(2.9, 0.9)
MASKS = {
    "samples": torch.tensor([True, False, True]).reshape(-1, 1, 1, 1).expand(SHAPE).contiguous(),
    "elements": wave(0.0, 2.1) > -0.2,
}


@contextlib.contextmanager
def float32():
    """Everything is computed in float32 here."""
    inputs = [X, EPS, EPS_DM, COND, NULL]
    torch.set_default_dtype(torch.float32)
    for tensor in inputs:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float64)
        for tensor in inputs:
            tensor.data = tensor.data.double()


def save(name, tensors, inputs):
    """Writes tests/reference/NAME.safetensors with the `inputs` of this setting."""
    every = {"x": X, "noise": EPS, "noise_dm": EPS_DM, "cond": COND, "null": NULL}
    every |= {f"times_{name}": rounded(torch.tensor(values)) for name, values in TIMES.items()}
    every |= {f"mask_{name}": mask for name, mask in MASKS.items()}
    tensors = tensors | {key: every[key] for key in inputs}
    for key, value in tensors.items():
        assert torch.isfinite(value.double()).all(), key
    path = pathlib.Path(__file__).resolve().parents[2] / f"tests/reference/{name}.safetensors"
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")
