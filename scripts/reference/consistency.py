"""Reference values of the terms that follow the teacher's ODE, in stock PyTorch float64.

Written from the papers: a consistency direction is the change of f along the ODE by its noise angle
(sCM, arXiv 2410.11081), an average velocity obeys MeanFlow's identity (arXiv 2505.13447) or one of its
relatives. Exact derivatives are those of torch.func.jvp, through path, conversion and network at once; on
TrigFlow they are compared with sCM's own formula here. Needs torch and safetensors; from the root of the
repository:

    python3 scripts/reference/consistency.py

writes tests/reference/consistency.safetensors: losses, their gradients in the samples (or in an offset of
the average velocity) and in the network's gain, and the largest distance of each kind from the same in
float32.
"""

import math

import torch
from torch.func import jvp

from noise_paths import PATHS, PREDICTIONS, clean
from precision import worst_distances
from setting import COND, EPS, MASKS, NULL, SHAPE, TEACHER_GAIN, X, float32, narrow, rounded, save

ALPHA, STUDENT_GAIN = 3.0, 0.7
TIMES = {"consistency": [0.2, 0.5, 0.7], "discrete": [0.2, 0.5, 0.95],
         "from": [0.2, 0.5, 0.7], "to": [0.6, 0.5, 1.0]}
FLOW_PATHS = ["rectified_flow", "edm", "trig_flow"]
USUAL = {"rectified_flow": "flow_velocity", "edm": "sample", "trig_flow": "velocity"}
OUT = {}


def times(name):
    return rounded(torch.tensor(TIMES[name], dtype=torch.float64)).to(X.dtype).reshape(-1, 1, 1, 1)


def levels(path, t):
    """a and s, computed in float64 whatever is computed with them."""
    return [value.to(X.dtype) for value in PATHS[path](t.double())]


def network(path, x, t, c, gain):
    """The network of setting.py, as a function of the time."""
    if path == "edm":
        sigma = PATHS["edm"](t.double())[1]
        x = x * (sigma**2 + 0.25).rsqrt().to(X.dtype)
    return gain * torch.sin(x + c) * (0.5 + t) + 0.1 * x


def denoise(path, prediction, x, t, c, gain):
    a, s = levels(path, t)
    return clean(prediction, a, s, x, network(path, x, t, c, gain))


def guided_teacher(path, prediction, x, t, alpha):
    cond, null = (denoise(path, prediction, x, t, c, TEACHER_GAIN) for c in (COND, NULL))
    return null + alpha * (cond - null)


def angle(path, t, std):
    """The time of TrigFlow: tan phi is the noise over the data's spread."""
    a, s = PATHS[path](t.double())
    return torch.atan2(s, std * a)


def rms(v, mask):
    """Of the elements of each sample that are kept."""
    square = [sum_ / max(count, 1) for sum_, count in zip(
        torch.where(mask, v**2, 0 * v).flatten(1).sum(1), mask.flatten(1).sum(1).tolist())]
    return torch.stack(square).sqrt().reshape(-1, 1, 1, 1)


def scm_tangent(f_output, x, phi, velocity, df, w):
    """g of sCM's algorithm 1 for data of unit deviation."""
    c, q = torch.cos(phi), torch.sin(phi)
    return -(c**2) * (f_output - velocity) - w * c * q * (x + df)


def consistency(name, path, prediction, form, alpha=1.0, w=1.0, kappa=0.1, std=1.0, step=1e-3,
                mask=None, own=None):
    """Loss and gradients of 0.5 mean (x - sg(x + D))^2, where x is the student's own prediction."""
    t = times("discrete" if form == "discrete" else "consistency")
    a, s = levels(path, t)
    x_t = (a * X + s * EPS).detach()
    mask = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask
    gain = torch.tensor(STUDENT_GAIN, requires_grad=True)
    f = denoise(path, prediction, x_t, t, COND, gain)
    leaf = (f.detach() if own is None else own).clone().requires_grad_()
    with torch.no_grad():
        teacher = guided_teacher(path, prediction, x_t, t, alpha)
        noise = (x_t - a * teacher) / s

        def student_at(at):
            a_l, s_l = levels(path, at)
            return denoise(path, prediction, a_l * teacher + s_l * noise, at, COND, gain.detach())

        if form == "discrete":
            later = (t + step).clamp(max=1.0)
            # f(x, 1) = x, which is the teacher's clean sample.
            direction = torch.where(later >= 1.0, teacher, student_at(later)) - leaf
            if kappa is not None:
                direction = direction / (rms(direction, mask) + kappa)
        else:
            phi = angle(path, t, std)
            if form == "exact":
                one = torch.ones_like(t)
                _, df = jvp(student_at, (t,), (one,))
                _, dphi = jvp(lambda at: angle(path, at, std), (t,), (one,))
                slope = df / dphi.to(X.dtype)
            else:
                ahead = t + step
                behind, before = (t - step, student_at(t - step)) if form == "central" else (t, leaf)
                change = (angle(path, ahead, std) - angle(path, behind, std)).to(X.dtype)
                slope = (student_at(ahead) - before) / change
            c, q = torch.cos(phi).to(X.dtype), torch.sin(phi).to(X.dtype)
            # sCM's warm-up: its g is -(c / q) times this in f = c x - q F.
            tangent = -w * c * slope + (1 - w) * (c**2 / q) * (teacher - leaf)
            is_scm = form == "exact" and (path, prediction, std) == ("trig_flow", "velocity", 1.0)
            if is_scm and own is None:
                check_scm(x_t, t, phi, teacher, noise, tangent, w)
            norm = 1.0 if kappa is None else rms(tangent, mask) + kappa
            direction = tangent / norm / (q * std)
        direction = torch.where(mask, direction, torch.zeros(()))
    loss = 0.5 * ((leaf - (leaf + direction).detach()) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    kind = "discrete" if form == "discrete" else "pull" if w == 0 else form
    OUT[f"{name}:loss_{kind}"], OUT[f"{name}:gradient_{kind}"] = loss.detach(), gradient
    if own is None:
        OUT[f"{name}:gain_{kind}"] = torch.autograd.grad((f * gradient).sum(), gain)[0]


def check_scm(x_t, t, phi, teacher, noise, tangent, w):
    """sCM's g, from dF/dphi with the tangents (dx/dphi, 1), is minus the tangent at any w."""
    if X.dtype != torch.float64:
        return
    velocity = torch.cos(phi) * noise - torch.sin(phi) * teacher
    by_time = torch.full_like(t, -2 / math.pi)
    run = lambda x, at: network("trig_flow", x, at, COND, STUDENT_GAIN)
    f_output, df = jvp(run, (x_t, t), (velocity, by_time))
    # g = cos phi df/dphi: the direction of F. With f = c x - q F the tangent is -g.
    g = scm_tangent(f_output, x_t, phi, velocity, df, w)
    assert (g + tangent).abs().max() < 1e-12 * max(tangent.abs().max(), 1.0), w


CONSISTENCY = {
    "discrete": dict(form="discrete", step=0.1, kappa=None),
    "discrete_guided": dict(form="discrete", step=0.1, kappa=None, alpha=ALPHA),
    "discrete_normalized": dict(form="discrete", step=0.02, kappa=0.1),
    "central": dict(form="central"),
    "central_warm_guided": dict(form="central", w=0.5, std=0.5, alpha=ALPHA),
    "central_plain": dict(form="central", step=1e-2, kappa=None),
    "ahead": dict(form="ahead", step=1 / 64),
    "ahead_warm_guided": dict(form="ahead", step=1 / 64, w=0.5, kappa=None, std=0.5, alpha=ALPHA),
    "exact": dict(form="exact"),
    "exact_guided": dict(form="exact", alpha=ALPHA),
    "exact_warm": dict(form="exact", w=0.5),
    "exact_warm_guided": dict(form="exact", w=0.5, std=0.5, alpha=ALPHA),
    "exact_plain": dict(form="exact", kappa=None, std=0.5),
    "exact_kappa": dict(form="exact", kappa=2.0),
    "pull": dict(form="exact", w=0.0, alpha=ALPHA),
    "pull_plain": dict(form="exact", w=0.0, kappa=None, std=0.5),
}
MASKED = ["discrete_normalized", "central", "ahead", "exact_warm_guided"]
NARROW = ["discrete", "ahead", "exact_warm_guided", "pull"]


# Average velocities, in the sign of the flow velocity eps - x0.


def average(x, t, r, c, gain, offset):
    return gain * torch.sin(x + c) * (0.5 + t) * (1 + 0.5 * r) + 0.1 * r * x + offset


def teachers_velocity(prediction, x, t, alpha):
    """(x_t - x0) / s is eps - x0 where a + s = 1; the network's own, for one that answers it."""
    if prediction == "flow_velocity":
        cond, null = (network("rectified_flow", x, t, c, TEACHER_GAIN) for c in (COND, NULL))
        return null + alpha * (cond - null)
    return (x - guided_teacher("rectified_flow", prediction, x, t, alpha)) / (1 - t)


def mean_flow(name, prediction, rule, alpha=1.0, p=0.0, constant=1e-3, mask=None, step=1e-3, cast=None):
    t, r = times("from"), times("to")
    samples = X if cast is None else cast(X)
    noise = EPS if cast is None else cast(EPS)
    x = t * samples + (1 - t) * noise
    mask = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask
    gain = torch.tensor(STUDENT_GAIN, requires_grad=True)
    offset = torch.zeros(SHAPE, requires_grad=True)
    u = average(x, t, r, COND, gain, offset)
    with torch.no_grad():
        run = lambda x, t, r: average(x, t, r, COND, gain.detach(), offset.detach())
        v = teachers_velocity(prediction, x, t, alpha)
        if rule.startswith("fraction"):
            share = float(rule.split("_")[1])
            middle = t + share * (r - t)
            target = share * v + (1 - share) * run(x - share * (r - t) * v, middle, r)
        elif rule == "lagrangian":
            end = x - (r - t) * u
            later, earlier = (r + step).clamp(max=1.0), torch.maximum(r - step, t)
            slope = (run(x, t, later) - run(x, t, earlier)) / (later - earlier)
            target = teachers_velocity(prediction, end, r, alpha) - (r - t) * slope
        else:
            if rule == "exact":
                # x moves by -v in a unit of time, t by 1, r stays.
                one = torch.ones_like(t)
                _, slope = jvp(run, (x, t, r), (-v, one, torch.zeros_like(r)))
            else:
                later = torch.minimum(t + step, r)
                earlier = t - step if rule == "central" else t
                length = later - earlier
                at = lambda when: run(x - (when - t) * v, when, r)
                slope = (at(later) - at(earlier)) / torch.where(length > 0, length, 1.0)
            target = v + (r - t) * slope
    squares = torch.where(mask, (u - target) ** 2, torch.zeros(())).flatten(1).mean(1)
    loss = ((squares.detach() + constant) ** -p * squares).mean()
    gradient, by_gain = torch.autograd.grad(loss, [offset, gain])
    OUT[f"{name}:loss_{rule}"], OUT[f"{name}:squares_{rule}"] = loss.detach(), squares.detach()
    OUT[f"{name}:gradient_{rule}"], OUT[f"{name}:gain_{rule}"] = gradient, by_gain


RULES = ["fraction_0.25", "fraction_1.0", "exact", "central", "ahead", "lagrangian"]
POWERS = {"half": 0.5, "one": 1.0}


def every_case():
    """All values, by the names that they have in the file."""
    OUT.clear()
    for path in FLOW_PATHS:
        for prediction in PREDICTIONS:
            for case, options in CONSISTENCY.items():
                consistency(f"{path}/{prediction}/{case}", path, prediction, **options)
        usual = USUAL[path]
        for case in MASKED:
            for which, mask in MASKS.items():
                consistency(f"{path}/{usual}/{case}/mask_{which}", path, usual, mask=mask,
                            **CONSISTENCY[case])
        for case in NARROW:
            consistency(f"{path}/{usual}/{case}/bf16", path, usual, own=narrow(X), **CONSISTENCY[case])
    for rule in RULES:
        for prediction in PREDICTIONS:
            # At r = 1 a clean sample has no velocity.
            if rule != "lagrangian" or prediction == "flow_velocity":
                mean_flow(f"mean_flow/{prediction}/{rule}", prediction, rule)
        case = f"mean_flow/flow_velocity/{rule}"
        mean_flow(f"{case}/guided", "flow_velocity", rule, alpha=ALPHA)
        for power, p in POWERS.items():
            mean_flow(f"{case}/guided_{power}", "flow_velocity", rule, alpha=ALPHA, p=p)
        for which, mask in MASKS.items():
            mean_flow(f"{case}/mask_{which}", "flow_velocity", rule, mask=mask)
        mean_flow(f"{case}/bf16", "flow_velocity", rule, p=0.5, cast=narrow)
    return dict(OUT)


def kind(name):
    term = "mean_flow" if name.startswith("mean_flow/") else "consistency"
    return f"{term}_{name.rsplit(':', 1)[1]}"


exact = every_case()
with float32():
    found = every_case()
exact |= worst_distances(kind, found, exact)
exact |= {f"times_{name}": rounded(torch.tensor(values)) for name, values in TIMES.items()}
save("consistency", exact, ["x", "noise", "cond", "null", *(f"mask_{name}" for name in MASKS)])
