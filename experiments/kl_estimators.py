"""Where does the policy end up with each KL estimator in the loss? An experiment without noise.

The bandit is that of bandit.py: one state, eight answers of one token, a reward for each. Every expectation is a sum
over the eight answers under the current policy: what is left is what the estimator's gradient does.

    python experiments/kl_estimators.py    # under a minute on one CPU core; needs matplotlib
"""

import argparse
from pathlib import Path

import torch
from bandit import REF_LOGPS, REWARDS, Estimator, exact_kl, optimum, train_ppo
from matplotlib.figure import Figure
from torch import Tensor

from trl_ext.ppo.kl import k1, k2, k3
from trl_ext.ppo.losses import policy_ratio


def weighted(estimator: Estimator) -> Estimator:
    """The estimator times the ratio π_θ / π_old, at π_old = π_θ: 1 in value, but with a gradient."""
    return lambda logps, ref_logps: policy_ratio(logps, logps.detach()) * estimator(logps, ref_logps)


KL_IN_LOSS = {"full": exact_kl, "k2": k2, "ratio · k1": weighted(k1), "ratio · k3": weighted(k3), "k3": k3, "k1": k1}


def reverse_optimum(beta: float) -> Tensor:
    """The maximum of E[r] − β KL(π_ref ‖ π_θ): π = β π_ref / (λ − r), with λ > max r such that it sums to 1."""
    low, high = REWARDS.max(), REWARDS.max() + beta
    for _ in range(100):
        middle = (low + high) / 2
        mass = (beta * REF_LOGPS.exp() / (middle - REWARDS)).sum()
        low, high = (middle, high) if mass > 1 else (low, middle)
    return (beta * REF_LOGPS.exp() / (high - REWARDS)).log()


def table(ends: dict[str, Tensor], beta: float) -> str:
    """A Markdown table: how far each policy is from both optima, its reward and its distance from the reference."""
    lines = ["| KL in the loss | KL(π_θ ‖ π*) | KL(π_θ ‖ π_rev) | E[r] | KL(π_θ ‖ π_ref) |", "|---|---|---|---|---|"]
    for name, logps in ends.items():
        others = (optimum(beta), reverse_optimum(beta), REF_LOGPS)
        star, reverse, ref = (abs(exact_kl(logps, other).item()) for other in others)
        lines.append(f"| {name} | {star:.1e} | {reverse:.1e} | {logps.exp() @ REWARDS:.3f} | {ref:.3f} |")
    return "\n".join(lines)


def draw(histories: dict[str, list[Tensor]], beta: float, path: Path) -> None:
    """Left: the policies at the end. Right: the distance from π* on the way."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    shown = {"π_ref": REF_LOGPS, "π*": optimum(beta)} | {name: steps[-1] for name, steps in histories.items()}
    for index, (name, logps) in enumerate(shown.items()):
        positions = torch.arange(len(REWARDS)) + (index - 3.5) * 0.105
        style = {"label": name, "color": {"π_ref": "lightgrey", "π*": "black"}.get(name, f"C{index - 2}")}
        bars.bar(positions.numpy(), logps.exp().numpy(), width=0.1, **style)
        if name in histories:
            distances = [max(exact_kl(step, optimum(beta)).item(), 1e-13) for step in histories[name]]
            # Thinner from line to line, because four of them coincide.
            curves.loglog(range(1, len(distances) + 1), distances, linewidth=10.5 - 1.2 * index, **style)
    bars.set_xticks(range(len(REWARDS)), [f"{reward:g}" for reward in REWARDS.tolist()])
    bars.set(xlabel="reward of the answer", ylabel="probability", title=f"Where each loss ends (β = {beta:g})")
    curves.set(xlabel="step", ylabel="KL(π_θ ‖ π*), nats (drawn down to 1e-13)", title="Distance from the optimum")
    bars.legend()
    curves.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, default=0.5, help="KL coefficient, in units of the reward (default 0.5)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of gradient descent (default 1000)")
    parser.add_argument("--learning_rate", type=float, default=3.0, help="of gradient descent on logits (default 3)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/kl_estimators.png"), help="the picture")
    args = parser.parse_args()
    histories = {name: train_ppo(kl, args.beta, args.steps, args.learning_rate) for name, kl in KL_IN_LOSS.items()}
    ends = {name: history[-1] for name, history in histories.items()}
    print(table(ends | {"(π_rev itself)": reverse_optimum(args.beta)}, args.beta))
    draw(histories, args.beta, args.output)


if __name__ == "__main__":
    main()
