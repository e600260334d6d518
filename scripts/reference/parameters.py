"""Parameters of the small transformers that the scripts beside this one make."""

import torch


def randomise(model, generator):
    """Random parameters of a size at which every part matters."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            v = torch.randn(parameter.numel(), generator=generator)
            if name == "t_embedder.mlp.0.weight":
                # The largest by far repeats itself, so that it takes little room in git.
                v = v[:509].repeat(parameter.numel() // 509 + 1)[: parameter.numel()]
            v = v.reshape(parameter.shape)
            if name.endswith(("pad_token", "bias")):
                v = 0.3 * v
            else:
                v = 1 + 0.1 * v if v.dim() == 1 else v / v.shape[1] ** 0.5
            parameter.copy_(v)
