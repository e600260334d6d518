"""PyTorch's half of the comparison; `compare.py` drives it. Commands as in `main.rs`.

The losses are written from their formulas in the way of public trainers (DMD2, FastGen): one loss per
term, per-sample weights, NaN replaced by zero. `published` converts predictions to clean samples in
float64, as these do; `float32` stays in float32; `compiled` is that under torch.compile, which joins
operations into kernels of its own and compiles them once, before the clock runs. The transformer is
diffusers' class.
"""

import json
import sys

import torch
import torch.nn.functional as F

torch.set_num_threads(1)

SAMPLE = (16, 128, 128)
GUIDANCE = 4.0
FLOOR = 0.1
STUDENT_TIME = 0.25
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def latents(batch, kind=torch.float32):
    return torch.randn(batch, *SAMPLE, dtype=kind)


def column(t):
    return t.view(-1, 1, 1, 1)


def add_noise(x, noise, t):
    """Rectified flow with t = 1 at data."""
    return column(t) * x + (1 - column(t)) * noise


def clean(noised, velocity, t, wide):
    """The sample that a velocity eps - x0 implies."""
    return (noised.to(wide) - (1 - column(t)).to(wide) * velocity.to(wide)).float()


def descend(x, direction, weight):
    """The loss whose gradient moves x along a direction, divided by a weight for each sample."""
    with torch.no_grad():
        gradient = torch.nan_to_num(-direction / weight)
    return 0.5 * F.mse_loss(x.float(), (x.float() - gradient).detach(), reduction="mean")


def distance(x, reference):
    return (x.float() - reference).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=FLOOR)


def descending(loss, leaves, variant):
    """Loss and gradients, for a closure without arguments."""
    if variant == "compiled":
        loss = torch.compile(loss)

    def run():
        value = loss()
        return value, *torch.autograd.grad(value, leaves)

    return run


def objective(schedule, kind, batch, draws, variant):
    kind, batch = KINDS[kind], int(batch)
    wide = torch.float64 if variant == "published" else torch.float32
    torch.manual_seed(0)
    x = latents(batch, kind).requires_grad_()
    cond, null, fake = (latents(batch, kind) for _ in range(3))
    groups = 1 if schedule == "coupled-shared" else 2

    def draw(interleaved):
        if interleaved:
            return [(torch.rand(batch), torch.randn_like(x)) for _ in range(groups)]
        return [(torch.rand(batch), latents(batch, kind)) for _ in range(groups)]

    ready = draw(False)
    inputs = [torch.empty(batch, *SAMPLE) for _ in range(groups)]
    above = lambda u: STUDENT_TIME + u * (1 - STUDENT_TIME)
    full = lambda u: u
    times = {
        "coupled-shared": (full,),
        "decoupled-full": (full, full),
        "decoupled-constrained": (above, above),
        "decoupled-hybrid": (above, full),
    }[schedule]

    def loss():
        if draws == "drawn":
            torch.manual_seed(1)
        drawn = draw(True) if draws == "drawn" else ready
        looks = [(time(u), noise) for time, (u, noise) in zip(times, drawn)]
        with torch.no_grad():
            # The networks would run on these.
            noised = [add_noise(x.float(), noise.float(), tau) for tau, noise in looks]
            if variant == "compiled":
                # A compiler would never write what no network reads here.
                noised = [kept.copy_(one) for kept, one in zip(inputs, noised)]
            at_ca, at_dm = (noised[0], looks[0][0]), (noised[-1], looks[-1][0])
            real = clean(at_ca[0], cond, at_ca[1], wide)
            real_null = clean(at_ca[0], null, at_ca[1], wide)
            fake_dm = clean(at_dm[0], fake, at_dm[1], wide)
            if groups == 1:
                real_dm = real
                weight_ca = weight_dm = distance(x, real_null + GUIDANCE * (real - real_null))
            else:
                real_dm = clean(at_dm[0], cond, at_dm[1], wide)
                weight_ca, weight_dm = distance(x, real), distance(x, real_dm)
        loss = descend(x, (GUIDANCE - 1) * (real - real_null), weight_ca)
        return loss + descend(x, real_dm - fake_dm, weight_dm)

    return descending(loss, x, variant)


def mean_variance(kind, batch, variant, mean=0.075, variance=0.81):
    torch.manual_seed(0)
    x = latents(int(batch), KINDS[kind]).requires_grad_()
    latents(int(batch), KINDS[kind])

    def loss():
        wide = x.float()
        m = wide.mean(dim=(1, 2, 3))
        v = wide.var(dim=(1, 2, 3), unbiased=False)
        return 0.5 * ((v + (m - mean) ** 2) / variance - 1 - torch.log(v / variance)).mean()

    return descending(loss, x, variant)


def mmd(points, width, variant):
    """As in DAN's code: the pooled differences in one tensor, where that fits; else `cdist`."""
    points, width = int(points), int(width)
    torch.manual_seed(0)
    x = torch.randn(points, width).requires_grad_()
    real = torch.randn(points, width) + 0.5
    pooled = 2 * points

    def loss():
        total = torch.cat([x, real])
        if pooled * pooled * width * 4 < 1e9:
            rows, columns = total.unsqueeze(0), total.unsqueeze(1)
            shape = (pooled, pooled, width)
            squared = ((rows.expand(shape) - columns.expand(shape)) ** 2).sum(2)
        else:
            squared = torch.cdist(total, total) ** 2
        unit = squared.detach().sum() / (pooled * pooled - pooled)
        kernels = sum(torch.exp(-squared / (unit * scale)) for scale in (0.25, 0.5, 1, 2, 4)) / 5
        own, cross = kernels[:points, :points], kernels[:points, points:]
        theirs, back = kernels[points:, points:], kernels[points:, :points]
        return (own + theirs - cross - back).mean()

    return descending(loss, x, variant)


def gan(part, batch, variant):
    batch = int(batch)
    torch.manual_seed(0)
    x = latents(batch).requires_grad_()
    real, noise = latents(batch), latents(batch)
    first = (torch.randn(32, 16, 4, 4) * 0.06).requires_grad_()
    second = (torch.randn(1, 32, 1, 1) * 0.2).requires_grad_()
    time = torch.full((batch,), 0.5)

    def critic(noised):
        return F.conv2d(F.silu(F.conv2d(noised, first, stride=4)), second)

    def generator_loss():
        return F.softplus(-critic(add_noise(x, noise, time))).mean()

    def critic_loss():
        fake_logits = critic(add_noise(x.detach(), noise, time))
        real_logits = critic(add_noise(real, noise, time))
        return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()

    if part == "critic":
        return descending(critic_loss, (first, second), variant)
    # DMD2 switches the critic's gradients off in this step.
    for weight in (first, second):
        weight.requires_grad_(False)
    return descending(generator_loss, x, variant)


def fake(kind, batch, variant):
    kind, batch = KINDS[kind], int(batch)
    torch.manual_seed(0)
    x, noise = latents(batch, kind), latents(batch, kind)
    answer = latents(batch, kind).requires_grad_()
    time = torch.full((batch,), 0.5)
    kept = torch.empty_like(x, dtype=torch.float32)

    def loss():
        with torch.no_grad():
            # The fake score would run on this.
            noised = add_noise(x.float(), noise.float(), time)
            if variant == "compiled":
                kept.copy_(noised)
            target = noise.float() - x.float()
        return torch.mean((answer.float() - target) ** 2)

    return descending(loss, answer, variant)


def load(folder):
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")


def call(model, images, time, captions):
    """Raw output for images `[B, C, H, W]`, the estimate of x0 - eps."""
    output = model(
        list(images.unsqueeze(2)),
        time,
        captions,
        patch_size=model.config.all_patch_size[0],
        return_dict=False,
    )[0]
    return torch.stack(output).squeeze(2)


def transformer(folder, batch, size, caption, run_pass, variant):
    model = load(folder).requires_grad_(run_pass == "train")
    if variant == "compiled":
        model.compile()
    batch, size = int(batch), int(size)
    torch.manual_seed(0)
    images = torch.randn(batch, model.config.in_channels, size, size)
    time = torch.rand(batch)
    captions = [torch.randn(int(caption), model.config.cap_feat_dim) for _ in range(batch)]

    def run():
        if run_pass != "train":
            with torch.no_grad():
                return (call(model, images, time, captions),)
        model.zero_grad()
        output = call(model, images, time, captions)
        output.square().mean().backward()
        return output.detach(), model.layers[0].attention.to_q.weight.grad

    return run


def optimizer(parameters, settings, variant):
    """Decay on matrices alone, as the crate does."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **settings, **{variant: True})


def adamw(tensors, variant):
    torch.manual_seed(0)
    parameters = []
    for index in range(int(tensors)):
        shape = (384, 256) if index % 2 == 0 else (256,)
        parameter = torch.randn(shape).requires_grad_()
        parameter.grad = torch.randn(shape)
        parameters.append(parameter)
    adamw = optimizer(parameters, {"lr": 1e-3, "weight_decay": 0.01}, variant)
    before = parameters[0].detach().clone()

    def run():
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        return norm, parameters[0].detach() - before

    return run


def training_step(batch, steps, assets, variant="eager"):
    """An update as the default run's: a rollout, student, five times the fake score, moving average.

    Guidance and the shift of tau_DM are other numbers there, which cost the same. Diffusers' model takes
    raw captions, so its caption side runs with every call; the crate's example encodes them once. Compiled are the
    networks and the losses; the rest stays as it is.
    """
    batch, steps, shift, guidance = int(batch), int(steps), 3.0, 3.0
    teacher, student, fake_score, average = (load(f"{assets}/teacher") for _ in range(4))
    for frozen in (teacher, average):
        frozen.requires_grad_(False)
    compiled = lambda function: function
    if variant == "compiled":
        compiled = torch.compile
        for model in (teacher, student, fake_score):
            model.compile()
    settings = {"betas": (0.0, 0.99), "weight_decay": 0.01}
    optimizers = {}
    for model, rate in ((student, 5e-5), (fake_score, 2e-4)):
        for name, parameter in model.named_parameters():
            if name.startswith(("cap_embedder.", "context_refiner.", "cap_pad_token")):
                parameter.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[model] = trained, optimizer(trained, settings | {"lr": rate}, "fused")
    torch.manual_seed(0)
    width = teacher.config.cap_feat_dim
    captions = [torch.randn(3, width) for _ in range(batch)]
    null = [torch.randn(1, width) for _ in range(batch)]
    shifted = lambda t: t / (t + shift * (1 - t))
    plain = torch.arange(steps) / steps
    grid = torch.cat([shifted(plain), torch.ones(1)])

    def velocity(model, images, time, captions):
        return -call(model, images, time, captions)

    def predict(model, images, time, captions):
        return clean(images, velocity(model, images, time, captions), time, torch.float64)

    def update(model, loss):
        trained, adamw = optimizers[model]
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        return loss.item()

    @compiled
    def student_loss(x, v_ca, v_dm, fake_v, noised_ca, noised_dm, tau_ca, tau_dm):
        with torch.no_grad():
            real, real_null = (clean(noised_ca, v, tau_ca, torch.float64) for v in v_ca.chunk(2))
            real_dm, fake_dm = (clean(noised_dm, v, tau_dm, torch.float64) for v in (v_dm, fake_v))
        loss = descend(x, (guidance - 1) * (real - real_null), distance(x, real))
        return loss + descend(x, real_dm - fake_dm, distance(x, real_dm))

    @compiled
    def fake_loss(output, noise, x):
        return torch.mean((output.float() - (noise - x).float()) ** 2)

    def run():
        with torch.no_grad():
            images = torch.randn(batch, 3, 32, 32)
            inputs, samples = [], []
            for now, then in zip(grid[:-1], grid[1:]):
                time = now.expand(batch)
                v = velocity(student, images, time, captions)
                inputs.append(images)
                samples.append(clean(images, v, time, torch.float64))
                images = images - (then - now) * v
            inputs, samples = torch.stack(inputs), torch.stack(samples)
        rows = torch.arange(batch)
        picks = (torch.randperm(batch) + torch.randint(steps, (1,))) % steps
        x = predict(student, inputs[picks, rows], grid[picks], captions)
        with torch.no_grad():
            low = plain[picks]
            tau_ca = shifted(low + torch.rand(batch) * (1 - low))
            tau_dm = torch.rand(batch)
            noised_ca = add_noise(x, torch.randn_like(x), tau_ca)
            noised_dm = add_noise(x, torch.randn_like(x), tau_dm)
            twice = lambda t: torch.cat([t, t])
            v_ca = velocity(teacher, twice(noised_ca), twice(tau_ca), captions + null)
            v_dm = velocity(teacher, noised_dm, tau_dm, captions)
            fake_v = velocity(fake_score, noised_dm, tau_dm, captions)
        update(student, student_loss(x, v_ca, v_dm, fake_v, noised_ca, noised_dm, tau_ca, tau_dm))
        for _ in range(5):
            picks = (torch.randperm(batch) + torch.randint(steps, (1,))) % steps
            x, noise = samples[picks, rows], torch.randn(batch, 3, 32, 32)
            time = shifted(torch.rand(batch))
            output = velocity(fake_score, add_noise(x, noise, time), time, captions)
            update(fake_score, fake_loss(output, noise, x))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 0.05)
        return ()

    return run


def nothing(*libraries):
    if "diffusers" in libraries:
        from diffusers import ZImageTransformer2DModel  # noqa: F401, what takes memory is to have it

    return tuple


def copy(mebibytes):
    source = torch.ones(int(float(mebibytes) * 2**18))
    target = torch.zeros_like(source)

    def run():
        target.copy_(source)
        return ()

    return run


def matmul(size):
    one, two = torch.randn(int(size), int(size)), torch.randn(int(size), int(size))
    out = torch.empty_like(one)

    def run():
        torch.mm(one, two, out=out)
        return ()

    return run


WORK = {
    f.__name__: f
    for f in (
        objective,
        mean_variance,
        mmd,
        gan,
        fake,
        transformer,
        adamw,
        training_step,
        nothing,
        copy,
        matmul,
    )
}


def tell(tensor):
    """The root mean square and five elements, evenly spaced; benches/pytorch/worker.rs tells the same."""
    flat = tensor.double().flatten()
    places = [(2 * k + 1) * flat.numel() // 10 for k in range(5)]
    return [flat.square().mean().sqrt().item(), *(flat[place].item() for place in places)]


def main():
    work = None
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "setup":
            work = WORK[rest[0]](*rest[1:])
            answer = [tell(tensor) for tensor in work()]
        else:
            for _ in range(int(rest[0])):
                work()
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
