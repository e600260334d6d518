"""Reference values of the loss that trains the fake score, in stock PyTorch float64.

Written from the definitions, not from the table of weights: a loss `measured as` another quantity is
the square of that quantity, converted. Needs torch and safetensors; from the root of the repository:

    python3 scripts/reference/fake_score.py

writes tests/reference/fake_score.safetensors, which tests/reference/fake_score.rs compares with. Each
tensor has a row for each weighting that is finite, in the order of WEIGHTINGS: the loss, and its gradient
in the gains of the network. Beside them are the largest distances from the same in float32.
"""

import torch

from noise_paths import PATHS, PREDICTIONS, clean, target
from precision import worst_distances
from setting import (
    COND, EPS, FAKE_GAIN, MASKS, SHAPE, X, coefficients, float32, narrow, network, reaches_noise, save,
)

WEIGHTINGS = ["uniform", "min_snr", "as_sample", "edm"] + ["as_" + p for p in PREDICTIONS[1:]]
# Those that are finite at the ends of every path, but for noise and score.
MILD = WEIGHTINGS[:3]
OUT = {}


def squares(weighting, prediction, a, s, x, eps, out):
    """The weighted square of each element, of a network that predicts `prediction` and answers `out`."""
    measured = prediction if weighting == "uniform" else weighting.removeprefix("as_")
    if measured == prediction:
        return (target(prediction, a, s, x, eps) - out) ** 2
    x_t = a * x + s * eps
    x0 = clean(prediction, a, s, x_t, out)
    if weighting == "min_snr" and prediction == "noise":
        # Hang et al.'s own form, which stands at a = 0 too.
        return (5.0 * s**2 / a**2).clamp(max=1.0) * (eps - out) ** 2
    if weighting == "min_snr":
        return (a**2 / s**2).clamp(max=5.0) * (x - x0) ** 2
    if weighting == "edm":
        sigma, d = s / a, 0.5
        return (sigma**2 + d**2) / (sigma * d) ** 2 * (x - x0) ** 2
    answer = x0 if measured == "sample" else target(measured, a, s, x0, (x_t - a * x0) / s)
    return (target(measured, a, s, x, eps) - answer) ** 2


def loss(weighting, prediction, path, times, cast=None, mask=None):
    """Loss, and its gradient in the gains of each channel and column: in one gain for all elements,
    parts that cancel would magnify the rounding of float32."""
    x, eps = (X, EPS) if cast is None else (cast(X), cast(EPS))
    gain = torch.full((1, SHAPE[1], 1, SHAPE[3]), FAKE_GAIN, requires_grad=True)
    a, s = coefficients(path, times)
    out = network(path, times, a * x + s * eps, COND, gain)
    error = squares(weighting, prediction, a, s, x, eps, out)
    value = (error if mask is None else error * mask).mean()
    (gradient,) = torch.autograd.grad(value, gain)
    return torch.cat([value.detach().reshape(1), gradient.flatten()])


def weightings(prediction, path, times):
    """Those under which the loss is finite, and is not refused."""
    if times in ("middle", "bounds"):
        return WEIGHTINGS
    if prediction == "score" and (reaches_noise(path, times) or (path, times) == ("vp_linear", "ends")):
        return []
    return ["uniform", "min_snr"] if prediction == "noise" and reaches_noise(path, times) else MILD


def every_case():
    """All values, by the names that they have in the file."""
    OUT.clear()
    for kind, cast in [("exact", None), ("bf16", narrow)]:
        for path in PATHS:
            for prediction in PREDICTIONS:
                for times in ["middle", "bounds", "near", "ends"]:
                    rows = [loss(weighting, prediction, path, times, cast)
                            for weighting in weightings(prediction, path, times)]
                    if rows:
                        OUT[f"{kind}/{path}/{prediction}/{times}"] = torch.stack(rows)
    for which, mask in MASKS.items():
        value = loss("min_snr", "flow_velocity", "rectified_flow", "middle", mask=mask)
        OUT[f"mask_{which}/min_snr"] = value.reshape(1, -1)
    return dict(OUT)


def parts(cases):
    """Losses and gradients apart, under names that end in their kind. At the bounds, with the weightings
    that are left out nearer to the ends, an error is a difference of two large numbers."""
    tensors = {}
    for name, case in cases.items():
        kind = "_at_bounds" if name.endswith("/bounds") else ""
        for index, row in enumerate(case):
            tensors[f"{name}/{index}:loss{kind}"] = row[:1]
            tensors[f"{name}/{index}:gradient{kind}"] = row[1:]
    return tensors


exact = every_case()
with float32():
    found = every_case()
exact |= worst_distances(lambda name: name.rsplit(":", 1)[1], parts(found), parts(exact))
times = [f"times_{name}" for name in ("middle", "bounds", "near", "ends")]
save("fake_score", exact, ["x", "noise", "cond", *times, *(f"mask_{name}" for name in MASKS)])
