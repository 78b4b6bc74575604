"""What the tests compare with: slow loops over plain lists, written from the formulas. Never imports trl_ext.

A sequence is a list of its counted tokens only: `per_sequence` takes them out of a batch, and puts the results back.
"""

import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch


# The one tolerance policy: identities in float64 hold to rounding, results in float32 to a few of its last digits.
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

# Every kind of mask: full, short, with a hole, with holes from the first token on, one token, none.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 1, 0, 1, 0, 1, 1],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
GARBAGE = (1e30, -1e30)


def batch(seed=0):
    """Random (B, T) tensors in float64 under `MASK`; ratios and value changes lie on both sides of a clip range."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    logps = normal(1.0) - 3
    values = normal(1.0)
    return SimpleNamespace(
        mask=MASK.clone(),
        rewards=normal(1.0),
        logps=logps,
        old_logps=logps + normal(0.4),
        ref_logps=logps + normal(0.5),
        advantages=normal(1.0),
        values=values,
        old_values=values + normal(0.4),
        returns=normal(1.0),
        entropy=normal(1.0).abs(),
    )


def with_garbage(tensor, mask, garbage):
    """The same tensor with numbers from 0 to `garbage` at the positions that do not count, as a new leaf."""
    return torch.where(mask, tensor, garbage * torch.rand_like(tensor)).detach().requires_grad_()


def counted(tensor, mask):
    """The counted numbers of a batch in one flat list."""
    return [
        x
        for row, keep in zip(tensor.tolist(), mask.tolist(), strict=True)
        for x, k in zip(row, keep, strict=True)
        if k
    ]


def per_sequence(function, mask, *tensors):
    """Apply `function` to the counted tokens of each sequence; (B, T) with 0 elsewhere."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask.tolist()):
        positions = [t for t, counts in enumerate(row) if counts]
        outputs = function(*([tensor[b].tolist()[t] for t in positions] for tensor in tensors))
        for t, output in zip(positions, outputs, strict=True):
            result[b, t] = output
    return result


# Advantages: one sequence of counted tokens in, one list out.


def rewards_to_go(rewards, gamma):
    """Σ_{k >= t} gamma^(k − t) r_k, the sum written out."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def n_step(rewards, values, gamma, n):
    """Up to n rewards, then the value of where they lead (0 past the end), minus the value here."""
    advantages = []
    for t in range(len(rewards)):
        end = min(t + n, len(rewards))
        collected = sum(gamma ** (k - t) * rewards[k] for k in range(t, end))
        beyond = gamma**n * values[t + n] if t + n < len(values) else 0.0
        advantages.append(collected + beyond - values[t])
    return advantages


def td_error(rewards, values, gamma):
    """r_t + gamma V_{t+1} − V_t."""
    following = [*values[1:], 0.0]
    return [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=False)]


def gae(rewards, values, gamma, lam):
    """Schulman 2015, eq. 16, not the recursion: (1 − lam) Σ_n lam^(n−1) Â^(n), where equal ones share the rest."""
    length = len(rewards)
    by_n = {n: n_step(rewards, values, gamma, n) for n in range(1, length + 1)}
    advantages = []
    for t in range(length):
        left = length - t
        inner = sum((1 - lam) * lam ** (n - 1) * by_n[n][t] for n in range(1, left))
        advantages.append(inner + lam ** (left - 1) * by_n[left][t])
    return advantages


# Moments over a flat list.


def moments(numbers):
    """Count, mean, population variance, from the standard library."""
    return len(numbers), statistics.fmean(numbers), statistics.pvariance(numbers)


def explained_variance(values, returns):
    """1 − Var(R − V) / Var(R)."""
    residuals = [r - v for r, v in zip(returns, values, strict=True)]
    return 1 - statistics.pvariance(residuals) / statistics.pvariance(returns)


# Losses: one token in, one number out.


def clip_objective(ratio, advantage, cliprange, high=None, dual=math.inf):
    """By the sign of A instead of a minimum: a good token earns no more than 1 + ε, a bad one no less than 1 − ε."""
    if advantage >= 0:
        return min(ratio, 1 + (cliprange if high is None else high)) * advantage
    return min(max(ratio, 1 - cliprange), dual) * advantage


def is_clipped(ratio, advantage, *ranges):
    """Whether a small change of the ratio leaves the objective as it is."""
    step = 1e-6
    below, above = (clip_objective(ratio + s, advantage, *ranges) for s in (-step, step))
    return below == above


def clipped_value_loss(value, old_value, target, cliprange_value):
    """½ of the worse of two squared errors: of V, and of V held within the range around V_old."""
    moved = min(max(value - old_value, -cliprange_value), cliprange_value)
    return max((value - target) ** 2, (old_value + moved - target) ** 2) / 2


def ppo_terms(b, num_tokens, cliprange, cliprange_value, kl):
    """The reduced terms of a batch, token by token. `kl` is a (B, T) tensor."""
    names = (
        "clip_objective",
        "kl",
        "value_loss",
        "entropy",
        "old_kl",
        "ratio_mean",
        "clip_fraction",
        "value_clip_fraction",
    )
    sums = dict.fromkeys(names, 0.0)
    ratio_max = -math.inf
    columns = (b.logps, b.old_logps, b.advantages, b.values, b.old_values, b.returns, b.entropy, kl)
    for logp, old, advantage, value, old_value, target, entropy, leash in zip(
        *(counted(column, b.mask) for column in columns), strict=True
    ):
        ratio = math.exp(logp) / math.exp(old)
        plain, clipped = (value - target) ** 2 / 2, clipped_value_loss(value, old_value, target, cliprange_value)
        sums["clip_objective"] += clip_objective(ratio, advantage, cliprange)
        sums["kl"] += leash
        sums["value_loss"] += clipped
        sums["entropy"] += entropy
        sums["old_kl"] += ratio - 1 - math.log(ratio)
        sums["ratio_mean"] += ratio
        sums["clip_fraction"] += is_clipped(ratio, advantage, cliprange)
        sums["value_clip_fraction"] += clipped > plain
        ratio_max = max(ratio_max, ratio)
    return {name: total / num_tokens for name, total in sums.items()} | {"ratio_max": ratio_max}


# Rewards.


def token_rewards(score, kl, kl_coef):
    """One sequence: the penalty at each token, the score at the last."""
    rewards = [-kl_coef * x for x in kl]
    if rewards:
        rewards[-1] += score
    return rewards


# Pairs of sequences that begin alike. A sequence is a list of token ids.


def common_beginning(*sequences):
    """How many tokens all of them begin with."""
    count = 0
    while all(count < len(sequence) and sequence[count] == sequences[0][count] for sequence in sequences):
        count += 1
    return count


def segment_tokens(segments):
    """The tokens of a row of segments (size, parent), each as (its segment, its position, the segments above it)."""
    tokens, above = [], []
    for i, (size, parent) in enumerate(segments):
        above.append([] if parent is None else [*above[parent], parent])
        start = sum(segments[j][0] for j in above[i])
        tokens += [(i, start + t, above[i]) for t in range(size)]
    return tokens


def sees(one, other, window=None):
    """Whether a token of a row sees another, which is no further before it than a window reaches."""
    near = window is None or one[1] - other[1] < window
    return near and (other[0] in one[2] or (other[0] == one[0] and other[1] <= one[1]))


# Preferences: lists of numbers, one for each pair.


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def preference_metrics(rows):
    """Rows: rewards, log-ratios, log-probabilities and tokens, each of the chosen and the rejected completion."""
    chosen, rejected, of_chosen, of_rejected, chosen_logps, rejected_logps, chosen_tokens, rejected_tokens = (
        list(column) for column in zip(*rows, strict=True)
    )
    margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    count, right = len(rows), sum(m > 0 for m in margins)
    # Wilson's interval: the p for which (right/count − p)² = z² p (1 − p) / count.
    z2 = 1.96**2
    a, b, c = 1 + z2 / count, -(2 * right / count + z2 / count), (right / count) ** 2
    root = math.sqrt(b * b - 4 * a * c)
    metrics = {
        "preference/accuracy": right / count,
        "preference/accuracy_low": (-b - root) / (2 * a),
        "preference/accuracy_high": (-b + root) / (2 * a),
        "preference/pairs": count,
        "preference/ranking_accuracy": sum(a > b for a, b in zip(chosen_logps, rejected_logps, strict=True)) / count,
        "preference/gradient_weight": statistics.fmean(sigmoid(-m) for m in margins),
        "preference/calibration_error": calibration_error([sigmoid(m) for m in margins]),
        "kl/ref": statistics.fmean(x * x / 2 for x in of_chosen + of_rejected),
        "logps/chosen_drift": statistics.fmean(of_chosen),
        "logps/rejected_drift": statistics.fmean(of_rejected),
    }
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        metrics[f"rewards/{side}_std"] = statistics.pstdev(rewards)
        metrics[f"rewards/{side}_below_zero"] = sum(r < 0 for r in rewards) / count
    for name, level in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        metrics[f"rewards/margins_{name}"] = quantile(margins, level)
    gaps = [good - bad for good, bad in zip(chosen_tokens, rejected_tokens, strict=True)]
    if len(set(gaps)) > 1 and len(set(margins)) > 1:
        metrics["preference/length_correlation"] = statistics.correlation(margins, gaps)
    return metrics


def quantile(numbers, level):
    """Between the two neighbours, in proportion to the distance."""
    place = level * (len(numbers) - 1)
    below, ordered = math.floor(place), sorted(numbers)
    above = min(below + 1, len(numbers) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def calibration_error(probabilities):
    """Ten bins of the confidence from 0.5 to 1: Σ_bins share of pairs · |mean confidence − share that was right|."""
    bins = [[] for _ in range(10)]
    for p in probabilities:
        confidence = max(p, 1 - p)
        bins[min(int((confidence - 0.5) / 0.05), 9)].append((confidence, p > 0.5))
    total = 0.0
    for members in bins:
        if members:
            confidence, right = (statistics.fmean(column) for column in zip(*members, strict=True))
            total += len(members) / len(probabilities) * abs(confidence - right)
    return total


# Ranks.


def on_ranks(function, *shards):
    """Run `function(*shard, all_reduce)` per shard, in threads that meet in `all_reduce`; results in rank order."""
    barrier = threading.Barrier(len(shards), timeout=20)
    slots = [None] * len(shards)

    def run(rank):
        def all_reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return function(*shards[rank], all_reduce)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(run, range(len(shards))))
