"""Reference values of the student's loss, in stock PyTorch float64, written from the formulas.

Nothing here is shared with the crate: losses are the literal `0.5 mean (x - sg(x + d))^2`, their
gradients come from autograd. Needs torch and safetensors; from the root of the repository:

    python3 scripts/reference/objective.py

writes tests/reference/objective.safetensors, which tests/reference/objective.rs compares with: all values,
and the largest distance of each kind from the same in float32.
"""

import torch

from noise_paths import PATHS, PREDICTIONS, clean
from precision import worst_distances
from setting import (
    COND, EPS, EPS_DM, FAKE_GAIN, MASKS, NULL, SHAPE, TEACHER_GAIN, TIMES, X, coefficients, float32,
    narrow, network, reaches_noise, save,
)

ALPHA = 4.0
OUT = {}

NORMALISERS = ["off", "dmd2", "fastgen", "fastvideo", "simple_tuner", "rcm", "guided", "cdm",
               "conditional_floor_2", "port", "conditional_batch"]
# What networks on each path are usually trained to predict.
USUAL = {"rectified_flow": "flow_velocity", "vp_linear": "noise", "vp_sdxl": "noise",
         "edm": "sample", "trig_flow": "velocity"}
# Teacher and fake score that predict different quantities.
MIXED = list(zip(PREDICTIONS, PREDICTIONS[1:] + PREDICTIONS[:1]))


def kept_mean(values, mask):
    """Mean of each sample over the elements kept, as a column."""
    means = [v[m].mean() if m.any() else torch.zeros(()) for v, m in zip(values, mask)]
    return torch.stack(means).reshape(-1, 1, 1, 1)


def normaliser(name, x, cond, guided, mask):
    def mean(reference):
        return kept_mean((x - reference).abs(), mask)

    def over_batch(reference):
        return (x - reference).abs()[mask].mean()

    return {
        "off": lambda: torch.ones(1),
        "dmd2": lambda: mean(guided),
        "fastgen": lambda: mean(guided) + 1e-6,
        "fastvideo": lambda: over_batch(guided),
        "simple_tuner": lambda: mean(guided).clamp(min=1e-6),
        "rcm": lambda: mean(guided).clamp(min=1e-5),
        "guided": lambda: mean(guided).clamp(min=0.1),
        "cdm": lambda: mean(cond).clamp(min=0.1),
        "conditional_floor_2": lambda: mean(cond).clamp(min=2.0),
        "port": lambda: mean(cond) + 1e-8,
        "conditional_batch": lambda: over_batch(cond).clamp(min=0.1),
    }[name]()


def look(x, eps, times, path="rectified_flow", teacher="flow_velocity", fake=None):
    """The noised samples, and the clean ones that the teacher with and without condition and the
    fake score take them for."""
    a, s = coefficients(path, times)
    x_t = a * x + s * eps

    def denoise(prediction, c, gain):
        return clean(prediction, a, s, x_t, network(path, times, x_t, c, gain))

    cond, null = denoise(teacher, COND, TEACHER_GAIN), denoise(teacher, NULL, TEACHER_GAIN)
    return x_t, cond, null, denoise(fake or teacher, COND, FAKE_GAIN)


def surrogate(x, direction):
    return 0.5 * ((x - (x + direction).detach()) ** 2).mean()


# Each term is (which, times other than the case's, noise).
CA, DM = ("ca", None, EPS), ("dm", None, EPS)
TERMS = {"ca": [CA], "dm": [DM], "coupled": [CA, DM], "decoupled": [CA, ("dm", "dm", EPS_DM)]}


def student(name, terms="coupled", norm="guided", times="middle", mask=None, cast=None, **networks):
    """Loss and gradient of a sum of terms."""
    cast = cast or (lambda tensor: tensor)
    x = cast(X).clone().requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask
    loss = torch.zeros(())
    for which, at, noise in TERMS[terms]:
        with torch.no_grad():
            _, cond, null, fake = look(x, cast(noise), at or times, **networks)
            guided = null + ALPHA * (cond - null)
            n = normaliser(norm, x, cond, guided, mask)
            d = (ALPHA - 1) * (cond - null) if which == "ca" else cond - fake
            direction = torch.where(mask, d / n, torch.zeros(()))
        loss = loss + surrogate(x, direction)
    (gradient,) = torch.autograd.grad(loss, x)
    OUT[name + ":loss"], OUT[name + ":gradient"] = loss.detach(), gradient


def dmd2():
    """The fused loss of DMD2: guided teacher against fake, one normaliser."""
    x = X.clone().requires_grad_()
    with torch.no_grad():
        _, cond, null, fake = look(x, EPS, "middle")
        guided = null + ALPHA * (cond - null)
        grad = (fake - guided) / (x - guided).abs().mean(dim=(1, 2, 3), keepdim=True)
    loss = 0.5 * torch.nn.functional.mse_loss(x, (x - grad).detach())
    OUT["dmd2:gradient"] = torch.autograd.grad(loss, x)[0]


def rms(v):
    return v.flatten(1).square().mean(1).sqrt()


def cos(v, w):
    return torch.nn.functional.cosine_similarity(v.flatten(1), w.flatten(1))


def scores(times, eps, path="rectified_flow", **predictions):
    """rel_gap, cos and mag_ratio of the flow velocities eps - x0 of teacher and fake score."""
    a, s = coefficients(path, times)
    x_t, cond, _, fake = look(X, eps, times, path, **predictions)
    real_u, fake_u = ((x_t - a * x0) / s - x0 for x0 in (cond, fake))
    return torch.stack([rms(real_u - fake_u) / rms(real_u), cos(real_u, fake_u),
                        rms(fake_u) / rms(real_u)])


def diagnostics():
    _, cond, null, _ = look(X, EPS, "middle")
    n_ca = (X - cond).abs().flatten(1).mean(1).clamp(min=0.1)
    ca = (ALPHA - 1) * (cond - null) / n_ca.reshape(-1, 1, 1, 1)
    _, cond, _, fake = look(X, EPS_DM, "dm")
    n_dm = (X - cond).abs().flatten(1).mean(1).clamp(min=0.1)
    dm = (cond - fake) / n_dm.reshape(-1, 1, 1, 1)
    rel_gap, score_cos, mag_ratio = scores("dm", EPS_DM)
    values = {
        "x_mean": X.flatten(1).mean(1),
        "x_std": X.flatten(1).var(1, unbiased=False).sqrt(),
        "x_rms": rms(X),
        "ca_n": n_ca,
        "dm_n": n_dm,
        "ca_update_rms": rms(ca),
        "dm_update_rms": rms(dm),
        "dm_rel_gap": rel_gap,
        "dm_cos": score_cos,
        "dm_mag_ratio": mag_ratio,
        "ca_dm_cos": cos(ca, dm),
        "dm_to_ca": (rms(dm).mean() / rms(ca).mean()).reshape(1),
        "variance_drift": (X.flatten(1).var(1, unbiased=False).mean() / 0.4).log().reshape(1),
    }
    OUT.update({"diagnostics/" + name: value for name, value in values.items()})


def every_case():
    """All values, by the names that they have in the file."""
    OUT.clear()
    for norm in NORMALISERS:
        for terms in ["ca", "dm", "coupled"]:
            student(f"{terms}/{norm}", terms, norm)
        for terms in ["ca", "dm"]:
            student(f"bf16/{terms}/{norm}", terms, norm, cast=narrow)
    for norm in ["off", "cdm", "port"]:
        student(f"decoupled/{norm}", "decoupled", norm)
    dmd2()
    for which, mask in MASKS.items():
        for norm in ["cdm", "fastvideo"]:
            student(f"mask_{which}/{norm}", norm=norm, mask=mask)
    diagnostics()
    for path in PATHS:
        for prediction in PREDICTIONS:
            networks = dict(path=path, teacher=prediction)
            for terms in ["coupled", "decoupled"]:
                for norm in ["guided", "cdm"]:
                    student(f"{path}/{prediction}/{terms}/{norm}", terms, norm, **networks)
            for times in ["bounds", "near", "ends"]:
                if not (reaches_noise(path, times) and prediction in ("noise", "score")):
                    student(f"{path}/{prediction}/{times}", times=times, **networks)
            for times in ["middle", "bounds"]:
                OUT[f"{path}/{prediction}/scores_{times}"] = scores(times, EPS, **networks)
        for teacher, fake in MIXED:
            networks = dict(path=path, teacher=teacher, fake=fake)
            student(f"{path}/{teacher}_{fake}/coupled", **networks)
            OUT[f"{path}/{teacher}_{fake}/scores_middle"] = scores("middle", EPS, **networks)
        for times in ["middle", "bounds", "near", "ends"]:
            for norm in ["guided", "cdm"]:
                networks = dict(path=path, teacher=USUAL[path], cast=narrow)
                student(f"bf16/{path}/{times}/{norm}", norm=norm, times=times, **networks)
    return dict(OUT)


def parts(cases):
    """The numbers of each case that are compared by themselves, under names that end in their kind."""
    tensors = {}
    for name, value in cases.items():
        if "/scores_" in name:
            kind = name.rsplit("/", 1)[1]
            tensors |= {f"{name}/{row}:{kind}": value[row] for row in range(3)}
        else:
            tensors[name if ":" in name else name + ":diagnostics"] = value
    return tensors


exact = every_case()
with float32():
    found = every_case()
exact |= worst_distances(lambda name: name.rsplit(":", 1)[1], parts(found), parts(exact))
times = [f"times_{name}" for name in TIMES]
masks = [f"mask_{name}" for name in MASKS]
save("objective", exact, ["x", "noise", "noise_dm", "cond", "null", *times, *masks])
