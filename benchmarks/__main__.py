"""List benchmarks, or run some: ``python -m benchmarks [NAME ...|all] [--quick] [--json FILE]``."""

import argparse
import importlib
import re
import sys
import time

from benchmarks.measure import Result

NAMES = {
    "importing": "seconds of `import jaxgen` over its dependencies, in fresh processes",
    "train_step": "our training step against the bare Flax and optax loop, same network",
    "sampling": "each fixed-grid solver against the lax.scan a user would write",
    "likelihood": "64 exact likelihoods against scipy.integrate.solve_ivp on the host",
    "hash_matmul": "a layer whose weight lives in a pool against the dense layer",
    "hash_matmul_tpu": "what the compiled TPU kernels need in memory, without a TPU",
    "shared_unet": "the digits U-Net in pools against smaller dense ones, trained and judged alike",
    "solvers": "error against field evaluations for every named solver, and the time per sample",
    "against_diffusers": "the fast samplers against diffusers on torch, same knots and weights",
    "restoration": "digits blurred and noised, restored in 5 to 20 evaluations against 100",
    "resampling": "resampling against blackjax and cuthbertlib: time and wrong ancestors",
    "steering": "guided digits, with the weights that guidance needs and without",
    "filtering": "a bootstrap filter against cuthbert and particles, and against no resampling",
    "smoothing": "PaRIS against particles, and Gibbs sweeps against PaRIS at equal work",
    "sharing": "expand and its gradient against a stored index",
    "flow_matching": "training steps and samples of a flow against torchcfm, same network",
    "one_step": "a distilled generator of one evaluation against its teacher at 2 to 50",
    "inverse": "restored digits: quality, time and memory of every method, with deepinv",
    "discrete": "text by the cached sampler against one call of the network a step",
    "scaling": "memory and traffic of one chip, on 1 to 256, split by data or by parameters",
    "startup": "import, first step and first sample, cold and from the compilation cache",
    "input": "examples a second of the input pipeline against what a step takes",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, or all")
    parser.add_argument("--quick", action="store_true", help="fewer cases; still 15 pairs")
    parser.add_argument("--json", metavar="FILE", help="also write one JSON object a line")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="every N-th of them, from the I-th on"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.names) - {*NAMES, "all"})
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; they are {', '.join(NAMES)}")
    if not args.names:
        for name, about in NAMES.items():
            print(f"{name:17s} {about}")
        return 0
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.part)
    if found is None or int(found[1]) > int(found[2]):
        parser.error(f"--part is {args.part!r}; expected such as 1/2")
    names = list(NAMES) if "all" in args.names else args.names
    lines = []
    for name in names[int(found[1]) - 1 :: int(found[2])]:
        start = time.monotonic()
        for result in importlib.import_module(f"benchmarks.{name}").run(quick=args.quick):
            print(result.to_line(), flush=True)
            if isinstance(result, Result):
                lines.append(result.to_json())
        print(f"{name}: {time.monotonic() - start:.0f} s in all", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            file.write("".join(line + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
