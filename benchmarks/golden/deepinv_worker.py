"""deepinv (torch) as a peer on inverse problems, in an environment of its own.

    python -m venv peer && peer/bin/pip install -r benchmarks/golden/deepinv_requirements.txt
    JAXGEN_DEEPINV=peer/bin/python python -m benchmarks inverse

The first line of input is {"modes": [[...], ...], "var": V}: a Gaussian mixture whose exact
denoiser takes the network's place. Every other is {"method": "dps" or "diffpir", "y", "mask",
"truth", "steps", "tuning", "seed"}, images being in [-1, 1]; the answer has the seconds it took,
the restored images' mean PSNR and the calls of the denoiser.
"""

import json
import sys
import time

import deepinv
import torch


class Mixture(torch.nn.Module):
    """The posterior mean under the mixture at noise of deviation sigma."""

    def __init__(self, modes, var):
        super().__init__()
        self.modes, self.var, self.calls = torch.tensor(modes), var, 0

    def forward(self, x, sigma, *args, **kwargs):
        """Like ``x``."""
        self.calls += 1
        flat = x.reshape(len(x), -1)
        spread = self.var + sigma**2
        logits = (flat @ self.modes.T - (self.modes**2).sum(1)[None] / 2) / spread
        mean = torch.softmax(logits, dim=1) @ self.modes
        return (mean + self.var / spread * (flat - mean)).reshape(x.shape)


class HalfScale(torch.nn.Module):
    """A denoiser of images in [0, 1] from one in [-1, 1]."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma, *args, **kwargs):
        """Like ``x``."""
        return (self.inner(2 * x - 1, 2 * sigma) + 1) / 2


def restore(denoiser, command):
    """The restored images and the seconds of it."""
    y, mask = (torch.tensor(command[k])[:, None] for k in ("y", "mask"))
    torch.manual_seed(command["seed"])
    shape = tuple(y.shape[1:])
    if command["method"] == "dps":
        physics = deepinv.physics.Inpainting(shape, mask=mask[0])
        sampler = deepinv.sampling.DPS(
            denoiser,
            num_steps=command["steps"],
            weight=command["tuning"],
            minus_one_one=False,
            dtype=torch.float32,
            rng=torch.Generator().manual_seed(command["seed"]),
        )
        start = time.perf_counter()
        x = sampler(y, physics, seed=command["seed"])
        return x, time.perf_counter() - start
    physics = deepinv.physics.Inpainting(shape, mask=mask[0])
    sampler = deepinv.sampling.DiffPIR(
        HalfScale(denoiser),
        deepinv.optim.L2(),
        sigma=0.01,
        max_iter=command["steps"],
        zeta=0.3,
        lambda_=command["tuning"],
    )
    start = time.perf_counter()
    x = sampler(mask * (y + 1) / 2, physics, seed=command["seed"])
    return 2 * x - 1, time.perf_counter() - start


def main() -> None:
    """Answer until the input ends."""
    torch.set_grad_enabled(False)
    prior = json.loads(sys.stdin.readline())
    denoiser = Mixture(prior["modes"], prior["var"])
    for line in sys.stdin:
        command = json.loads(line)
        denoiser.calls = 0
        x, seconds = restore(denoiser, command)
        error = x[:, 0].clamp(-1, 1) - torch.tensor(command["truth"])
        psnr = 10 * torch.log10(4 / (error**2).mean(dim=(1, 2)))
        answer = {"seconds": seconds, "psnr": float(psnr.mean()), "calls": denoiser.calls}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
