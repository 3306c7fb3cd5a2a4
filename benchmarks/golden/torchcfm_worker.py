"""The `torchcfm` package as a peer, in an environment of its own (it brings PyTorch).

    python -m venv peer && peer/bin/pip install -r benchmarks/golden/torchcfm_requirements.txt
    JAXGEN_TORCHCFM=peer/bin/python python -m benchmarks flow_matching

Reads one JSON command a line and answers with the seconds it took and what it found, so that a
benchmark can alternate with it: {"task": "load", "file": NPZ} with the network's weights and both
ends of a batch, {"task": "train", "coupling": "independent" or "exact", "steps": K} and
{"task": "sample", "steps": N}.
"""

import json
import sys
import time

import numpy as np
import torch
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
)
from torchcfm.models.models import MLP
from torchdiffeq import odeint

MATCHERS = {
    "independent": ConditionalFlowMatcher(sigma=0.0),
    "exact": ExactOptimalTransportConditionalFlowMatcher(sigma=0.0),
}


class Session:
    """A network, its optimiser and a batch."""

    def __init__(self, file):
        stored = np.load(file)
        self.x0, self.x1 = (torch.from_numpy(stored[name]) for name in ("x0", "x1"))
        width = stored["kernel0"].shape[1]
        self.model = MLP(dim=self.x0.shape[1], w=width, time_varying=True)
        layers = [layer for layer in self.model.net if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.weight.copy_(torch.from_numpy(stored[f"kernel{i}"].T))
                layer.bias.copy_(torch.from_numpy(stored[f"bias{i}"]))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def train(self, coupling, steps):
        """The training loop of the package's examples."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            t, x_t, u_t = MATCHERS[coupling].sample_location_and_conditional_flow(self.x0, self.x1)
            v_t = self.model(torch.cat([x_t, t[:, None]], dim=-1))
            loss = torch.mean((v_t - u_t) ** 2)
            loss.backward()
            self.optimizer.step()
        return {"loss": float(loss.detach())}

    def sample(self, steps):
        """Euler's method over equal steps."""
        times = torch.linspace(0, 1, steps + 1)

        def field(t, x):
            return self.model(torch.cat([x, t.expand(x.shape[0], 1)], dim=-1))

        with torch.no_grad():
            x = odeint(field, self.x0, times, method="euler")[-1]
        return {"head": x[:4].tolist()}


def main() -> None:
    """Answer until the input ends."""
    session = None
    for line in sys.stdin:
        command = json.loads(line)
        task = command.pop("task")
        start = time.perf_counter()
        if task == "load":
            session, answer = Session(command["file"]), {}
        else:
            answer = getattr(session, task)(**command)
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
