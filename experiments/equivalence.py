"""Do PPO and DPO end at the same policy? One bandit, trained both ways: without noise, then from a drawn sample.

The bandit is that of bandit.py: eight answers of one token, a reward for each, a reference π_ref. People prefer one of
two answers by Bradley-Terry on these rewards. Trained are

- PPO on the rewards, with β KL(π_θ ‖ π_ref) in the loss;
- RLHF: a reward model from the preferences, then PPO on what it says;
- DPO on the preferences;
- the model of preferences of S2 (docs/theory.md, sources), which knows neither π_ref nor β: it is not DPO, and ends
  elsewhere.

    python experiments/equivalence.py    # under a minute on one CPU core; needs matplotlib
"""

import argparse
from itertools import combinations
from pathlib import Path

import torch
from bandit import REF_LOGPS, REWARDS, descend, exact_kl, optimum, train_ppo
from matplotlib.figure import Figure
from torch import Tensor

from trl_ext.dpo.losses import dpo_loss, implicit_reward, preference_probability
from trl_ext.ppo.kl import k2


PAIRS = torch.tensor(list(combinations(range(len(REWARDS)), 2)))


def preferences(comparisons: int | None, seed: int = 0) -> Tensor:
    """
    How often the first answer of each pair is preferred, (pairs,): as Bradley-Terry says, or in a drawn sample.

    Args:
        comparisons: comparisons to draw of each pair; `None` for the expectation.
    """
    shares = preference_probability(*REWARDS[PAIRS].unbind(1))
    if comparisons is None:
        return shares
    generator = torch.Generator().manual_seed(seed)
    return torch.binomial(torch.full_like(shares, comparisons), shares, generator) / comparisons


def preference_loss(scores: Tensor, shares: Tensor) -> Tensor:
    """−log σ(score of the preferred − score of the other), mean over all comparisons: Bradley-Terry's likelihood."""
    first, second = scores[PAIRS].unbind(1)
    return (shares * dpo_loss(first, second) + (1 - shares) * dpo_loss(second, first)).mean()


def train(shares: Tensor, beta: float, steps: int) -> dict[str, list[Tensor]]:
    """The log-probabilities of every policy before each step and after the last; all start from π_ref."""

    def prefer(factor: float, ref_logps: Tensor) -> list[Tensor]:
        """Descends the loss of implicit rewards; the step makes up for what β takes from the gradient, twice."""

        def loss(logits: Tensor) -> Tensor:
            return preference_loss(implicit_reward(logits.log_softmax(-1), ref_logps, factor), shares)

        return [logits.log_softmax(-1) for logits in descend(loss, REF_LOGPS, steps, 12 / factor**2)]

    reward_model = descend(lambda scores: preference_loss(scores, shares), torch.zeros_like(REWARDS), steps, 12.0)[-1]
    return {
        "PPO on the reward": train_ppo(k2, beta, steps, learning_rate=3.0),
        "reward model, then PPO": train_ppo(k2, beta, steps, learning_rate=3.0, rewards=reward_model),
        "DPO": prefer(beta, REF_LOGPS),
        "S2's preference model": prefer(1.0, torch.zeros_like(REF_LOGPS)),
    }


def number(value: float) -> str:
    """Three digits; what double precision cannot tell from 0 as 0."""
    return "0" if abs(value) < 1e-9 else f"{value:.3g}"


def table(histories: dict[str, list[Tensor]], beta: float) -> str:
    """A Markdown table: how far each policy ends from π*, from where DPO ends, and from π_ref; its mean reward."""
    lines = ["| trained | KL(π_θ ‖ π*) | KL(π_θ ‖ π_DPO) | KL(π_θ ‖ π_ref) | E[r] |", "|---|---:|---:|---:|---:|"]
    for name, history in ({"(π_ref)": [REF_LOGPS], "(π*)": [optimum(beta)]} | histories).items():
        logps = history[-1]
        others = (optimum(beta), histories["DPO"][-1], REF_LOGPS)
        cells = [exact_kl(logps, other).item() for other in others] + [(logps.exp() @ REWARDS).item()]
        lines.append(f"| {name} | {' | '.join(map(number, cells))} |")
    return "\n".join(lines)


def draw(histories: dict[str, list[Tensor]], beta: float, path: Path) -> None:
    """Left: the policies at the end. Right: the distance from π* on the way."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    shown = {"π_ref": [REF_LOGPS], "π*": [optimum(beta)]} | histories
    for index, (name, history) in enumerate(shown.items()):
        style = {"label": name, "color": {"π_ref": "lightgrey", "π*": "black"}.get(name, f"C{index - 2}")}
        positions = torch.arange(len(REWARDS)) + (index - 2.5) * 0.14
        bars.bar(positions.numpy(), history[-1].exp().numpy(), width=0.13, **style)
        if name in histories:
            distances = [max(exact_kl(logps, optimum(beta)).item(), 1e-13) for logps in history]
            curves.loglog(range(1, len(distances) + 1), distances, linewidth=9 - 1.6 * index, **style)
    bars.set_xticks(range(len(REWARDS)), [f"{reward:g}" for reward in REWARDS.tolist()])
    bars.set(xlabel="reward of the answer", ylabel="probability", title=f"Where each one ends (β = {beta:g})")
    curves.set(xlabel="step", ylabel="KL(π_θ ‖ π*), nats (drawn down to 1e-13)", title="Distance from the optimum")
    bars.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, default=0.5, help="β of the leash, in units of the reward (default 0.5)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of gradient descent (default 1000)")
    parser.add_argument("--comparisons", type=int, default=100, help="of each pair, in the sample (default 100)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/equivalence.png"), help="the picture")
    args = parser.parse_args(argv)
    exact, sampled = (train(preferences(n), args.beta, args.steps) for n in (None, args.comparisons))
    print(f"Preferences in expectation\n\n{table(exact, args.beta)}\n")
    print(f"{args.comparisons} comparisons of each pair\n\n{table(sampled, args.beta)}")
    draw(exact, args.beta, args.output)


if __name__ == "__main__":
    main()
