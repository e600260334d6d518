"""Reference values of the regularizers that terms.py leaves out, in stock PyTorch float64.

Written from the formulas and differentiated by autograd, through the networks too where the paper does: SiD
(arXiv 2404.04057), SIM (2410.16794), ADM (2507.18569), the divergences of f-distill (2502.15681, each weight
from two derivatives of f), paired distances, MMD against a prior, and a reward. All inputs but the times are
exact in bfloat16, so that one reference holds for every type. Needs torch and safetensors; from the root of
the repository:

    python3 scripts/reference/more_terms.py

writes tests/reference/more_terms.safetensors: values, gradients, and the largest distance of each kind
from the same in float32.
"""

import torch
import torch.nn.functional as F

from noise_paths import PATHS, clean
from precision import worst_distances
from setting import (
    COND, EPS, FAKE_GAIN, MASKS, NULL, SHAPE, TEACHER_GAIN, TIMES, X, float32, narrow, network, rounded, save,
)

ALPHA, STEP, SEED = 3.0, 1 / 64, 11
USUAL = {"rectified_flow": "flow_velocity", "edm": "sample", "trig_flow": "velocity"}
for tensor in (X, EPS, COND, NULL):
    tensor.data = narrow(tensor)
OUT = {}


def record(case, value, scale=None, **leaves):
    gradients = torch.autograd.grad(value, list(leaves.values()))
    OUT[f"{case}/value"] = value.detach().reshape(1)
    if scale is not None:
        OUT[f"{case}/scale"] = scale.detach().reshape(1)
    OUT.update({f"{case}/grad_{name}": g for name, g in zip(leaves, gradients)})


def wave(shape, phase, rate=0.7, scale=1.0):
    values = torch.sin(rate * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + phase)
    return narrow((scale * values).reshape(shape)).to(X.dtype)


def kept(tensor, mask):
    return tensor if mask is None else torch.where(mask, tensor, torch.zeros(()))


def still(x, mask):
    """x, without a gradient where the mask leaves an element out."""
    return x if mask is None else torch.where(mask, x, x.detach())


class Look:
    """Teacher and fake score at one time, as functions of the noised samples."""

    def __init__(self, path, alpha=1.0):
        t = rounded(torch.tensor(TIMES["middle"], dtype=torch.float64)).reshape(-1, 1, 1, 1)
        self.path, self.alpha, self.t = path, alpha, t
        self.a, self.s = self.levels(t)

    def levels(self, t):
        return [value.to(X.dtype) for value in PATHS[self.path](t)]

    def noised(self, x):
        return self.a * x + self.s * EPS

    def denoise(self, x_t, c, gain):
        output = network(self.path, "middle", x_t, c, gain)
        return clean(USUAL[self.path], self.a, self.s, x_t, output)

    def cond(self, x_t):
        return self.denoise(x_t, COND, TEACHER_GAIN)

    def teacher(self, x_t):
        cond = self.cond(x_t)
        return cond if self.alpha == 1.0 else (
            null := self.denoise(x_t, NULL, TEACHER_GAIN)) + self.alpha * (cond - null)

    def fake(self, x_t):
        return self.denoise(x_t, COND, FAKE_GAIN)

    def stepped(self, x_t, x0):
        """One step of DDIM to t + STEP."""
        a, s = self.levels(self.t + STEP)
        return a * x0 + s * (x_t - self.a * x0) / self.s


def score_identity(case, path, form, alpha=1.0, normalised=False, mask=None):
    look, leaf = Look(path, alpha), X.clone().requires_grad_()
    x = still(leaf, mask)
    x_t = look.noised(x)
    real, fake = look.teacher(x_t), look.fake(x_t)
    delta = real - fake
    name, number = form
    if name == "sid":
        n = torch.ones(())
        if normalised:
            distance = kept((x - look.cond(x_t)).abs().detach(), mask).flatten(1).sum(1)
            count = (torch.ones(SHAPE) if mask is None else mask).flatten(1).sum(1)
            n = (distance / count.clamp(min=1)).reshape(-1, 1, 1, 1)
            # A sample that is left out has no distance.
            n = torch.where(n > 0, n, 1.0)
        product = kept(delta * (real - x - number * delta) / n, mask)
        value = product.mean()
    else:
        delta, rest = kept(delta, mask), kept(fake - x, mask)
        length = (delta.flatten(1).square().sum(1) + number**2).sqrt()
        value = ((delta * rest).flatten(1).sum(1) / length).sum() / x.numel()
        product = (delta * rest) / length.reshape(-1, 1, 1, 1)
    record(case, value, scale=product.abs().mean(), x=leaf)


def critic(x, t, w1, u, w2):
    return torch.tanh(0.25 * x.flatten(1) @ w1.T + t.reshape(-1, 1) * u + COND.flatten(1)[:, :7]) @ w2.T


softplus = F.softplus
GAN = {
    "non_saturating": (lambda r, f: softplus(f).mean() + softplus(-r).mean(), lambda r, f: softplus(-f).mean()),
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda r, f: -f.mean()),
    "relativistic": (lambda r, f: softplus(f - r).mean(), lambda r, f: softplus(r - f).mean()),
}


def adversarial_matching(case, path, gan, alpha=1.0, detached=False):
    look = Look(path, alpha)
    weights = {"w1": wave((7, 12), 0.2, 1.7, 0.25), "u": wave((7,), 1.0), "w2": wave((2, 7), 0.5, 2.3)}
    OUT.update({f"adm/{name}": weight.clone() for name, weight in weights.items()})
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    critic_loss, generator_loss = GAN[gan]
    later = (look.t + STEP).to(X.dtype)
    logits = lambda x: critic(x, later, *weights.values())

    x = X.clone().requires_grad_()
    x_t = look.noised(x)
    fake = look.fake(x_t)
    fake = logits(look.stepped(x_t, fake.detach() if detached else fake))
    real = logits(look.stepped(x_t, look.teacher(x_t)))
    value = generator_loss(real.detach(), fake)
    record(f"{case}/generator", value, scale=fake.abs().mean() + value.abs(), x=x)
    if not detached:
        x_t = look.noised(X)
        real, fake = (logits(look.stepped(x_t, f(x_t)).detach()) for f in (look.teacher, look.fake))
        value = critic_loss(real, fake)
        one_tensor = lambda value: torch.cat([
            g.flatten() for g in torch.autograd.grad(value, list(weights.values()), retain_graph=True)])
        OUT[f"{case}/critic/value"] = OUT[f"{case}/critic/scale"] = value.detach().reshape(1)
        OUT[f"{case}/critic/grad_weights"] = one_tensor(value)
        # Both steps are nearly the same, so the gradient is the difference of two larger ones.
        sides = (one_tensor(critic_loss(*side)) for side in ((real, fake.detach()), (real.detach(), fake)))
        OUT[f"{case}/critic/scale_weights"] = max(side.abs().max() for side in sides).reshape(1)


DIVERGENCES = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * (1 + 1 / r).log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "squared_hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
}


def divergence(case, path, f, mask=None):
    """0.5 mean (x - sg(x + h d))^2 with h = f'' r^2 and d = x0 of the teacher less x0 of the fake score."""
    look, x = Look(path), X.clone().requires_grad_()
    # The last ratio is beyond its clamp.
    log_ratio = narrow(torch.tensor([0.5, -1.25, 4.0], dtype=torch.float64))
    OUT["log_ratio"] = log_ratio.float()
    r = log_ratio.exp().clamp(0.1, 20.0).requires_grad_()
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    with torch.no_grad():
        h = (bend * r**2).to(X.dtype).reshape(-1, 1, 1, 1)
        x_t = look.noised(x)
        direction = kept(h * (look.cond(x_t) - look.fake(x_t)), mask)
    value = 0.5 * ((x - (x + direction).detach()) ** 2).mean()
    record(case, value, scale=value, x=x)


def distances():
    target = wave(SHAPE, 4.0, 1.1)
    weights = [narrow(torch.tensor([0.5, 1.5])), wave((4,), 2.0).abs()]
    projection = wave((12, 4), 0.3, 1.3)
    OUT.update({"paired/target": target, "paired/projection": projection,
                "paired/weight_0": weights[0], "paired/weight_1": weights[1]})

    def perceptual(x, y):
        def layers(v):
            return [torch.tanh(v).flatten(2), torch.tanh(v.flatten(1) @ projection)[..., None]]
        total = 0.0
        for f, g, w in zip(layers(x), layers(y), weights):
            f, g = (v / (v.square().sum(1, keepdim=True) + 1e-8).sqrt() for v in (f, g))
            total = total + (w[:, None] * (f - g) ** 2).sum(1).mean()
        return total

    c = 0.25
    cases = {
        "squared": lambda d, x: (d**2).mean(),
        "absolute": lambda d, x: d.abs().mean(),
        "pseudo_huber": lambda d, x: ((d**2 + c**2).sqrt() - c).mean(),
        "pseudo_huber_of_samples": lambda d, x: ((d.flatten(1).square().sum(1) + c**2).sqrt() - c).mean(),
        "perceptual": lambda d, x: perceptual(x, (x - d).detach()),
    }
    for name, f in cases.items():
        for which, mask in {"": None, **MASKS}.items():
            leaf = X.clone().requires_grad_()
            x = still(leaf, mask)
            value = f(kept(x - target, mask), x)
            record(f"paired/{name}/{which or 'whole'}", value, scale=value, x=leaf)


def mmd(a, b, kernel, unbiased):
    squares = lambda p, q: ((p[:, None, :] - q[None, :, :]) ** 2).sum(-1)
    points = torch.cat([a, b]).detach()
    i, j = torch.triu_indices(len(points), len(points), 1)
    width = squares(points, points)[i, j].median()

    def k(p, q):
        d2 = squares(p, q)
        if kernel == "energy":
            return -torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)
        return sum(torch.exp(-d2 / (s * width)) for s in (0.25, 0.5, 1, 2, 4)) / 5

    def own(p):
        m, pairs = len(p), k(p, p)
        return (pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1)) if unbiased else pairs.mean()

    terms = own(a), own(b), -2 * k(a, b).mean()
    return sum(terms), sum(abs(term.detach()) for term in terms)


def discrepancies():
    samples, projection = wave((6, 2, 3), 0.4, 1.9), wave((6, 4), 1.2, 2.1)
    prior = {"flat": wave((7, 6), 3.0, 1.1), "tanh": wave((7, 4), 2.0, 0.9)}
    OUT.update({"mmd/x": samples, "mmd/projection": projection})
    OUT.update({f"mmd/prior_{name}": value for name, value in prior.items()})
    features = {"flat": lambda x: x.flatten(1), "tanh": lambda x: torch.tanh(x.flatten(1) @ projection)}
    for kernel in ("gaussian", "energy"):
        for estimator in ("unbiased", "biased"):
            for name, f in features.items():
                x = samples.clone().requires_grad_()
                # The draw that the term makes: each column in an order of its own.
                torch.manual_seed(SEED)
                order = torch.rand(f(x).shape, dtype=torch.float64).argsort(0)
                shuffled = f(x).detach().gather(0, order)
                for against, y in (("prior", prior[name]), ("independence", shuffled)):
                    value, scale = mmd(f(x), y, kernel, estimator == "unbiased")
                    record(f"mmd_{against}/{kernel}_{estimator}_{name}", value, scale=scale, x=x)


def reward(mask, which):
    x = X.clone().requires_grad_()
    scores = (torch.tanh(still(x, mask)) * COND).flatten(1).sum(1).square()
    if mask is not None:
        scores = kept(scores, mask.flatten(1).any(1))
    value = -scores.mean()
    record(f"reward/{which}", value, scale=value, x=x)


def every_case():
    """Inputs and results, by the names that they have in the file."""
    OUT.clear()
    for path in USUAL:
        for name, form in {"sid": ("sid", 1.2), "sid_1": ("sid", 1.0), "sim": ("sim", 0.03)}.items():
            case = f"{name.split('_')[0]}/{path}/{name}"
            score_identity(case, path, form)
            score_identity(f"{case}_guided", path, form, alpha=ALPHA)
            for which, mask in MASKS.items():
                score_identity(f"{case}_mask_{which}", path, form, mask=mask, normalised=name == "sid")
        score_identity(f"sid/{path}/sid_normalised", path, ("sid", 1.2), normalised=True)
        for gan in GAN:
            adversarial_matching(f"adm/{path}/{gan}", path, gan)
            adversarial_matching(f"adm/{path}/{gan}_guided", path, gan, alpha=ALPHA)
            adversarial_matching(f"adm/{path}/{gan}_detached", path, gan, detached=True)
        for name, f in DIVERGENCES.items():
            divergence(f"divergence/{path}/{name}", path, f)
            divergence(f"divergence/{path}/{name}_masked", path, f, mask=MASKS["elements"])
    distances()
    discrepancies()
    reward(None, "whole")
    for which, mask in MASKS.items():
        reward(mask, which)
    return dict(OUT)


def parts(cases):
    """What is compared, under names that end in their kind. Beside the unit, the largest number, an error of
    a value is relative to it."""
    tensors = {}
    for name, value in cases.items():
        case, _, what = name.rpartition("/")
        term = case.split("/")[0]
        if what == "value":
            scale = exact[f"{case}/scale"].to(value.dtype)
            tensors[f"{name}:{term}_value"] = torch.cat([value, torch.maximum(scale, value.abs())])
        elif what == "grad_weights":
            scale = exact[f"{case}/scale_weights"].to(value.dtype)
            tensors[f"{name}:{term}_gradient"] = torch.cat([value, scale])
        elif what.startswith("grad_"):
            tensors[f"{name}:{term}_gradient"] = value
    return tensors


exact = every_case()
with float32():
    found = every_case()
exact |= worst_distances(lambda name: name.rsplit(":", 1)[1], parts(found), parts(exact))
exact["times_middle"] = rounded(torch.tensor(TIMES["middle"]))
save("more_terms", exact, ["x", "noise", "cond", "null", *(f"mask_{name}" for name in MASKS)])
