"""
`PPOTrainerX` beside TRL 1.12's `PPOTrainer`: the same models, answers and options, with `kl_placement="reward"`.

What is compared is equal to 1e-5, or follows from TRL's numbers by a rule that docs/migration.md gives; then the test
computes both sides by it. `make parity` runs this: TRL 1.12 gets an environment of its own at first use.
"""

import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import oracles
import parity_cases as cases
import tiny
from commands import script
from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.data.demo import cache_dir


pytestmark = pytest.mark.parity

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WORKER = Path(__file__).resolve().parents[1] / "helpers" / "trl112_worker.py"
VARIED = ["varied", "whitened rewards"]


def roles():
    return {
        "actor": tiny.tiny_actor(0),
        "reference": tiny.tiny_actor(5),
        "reward": tiny.tiny_reward_model(1),
        "value": tiny.tiny_reward_model(2),
    }


def of_prompts(rollout):
    """TRL's rows in the order of `PROMPTS`."""
    rows = [tuple(i for i in row if i != cases.PAD) for row in rollout["queries"].tolist()]
    return torch.tensor([rows.index(tuple(prompt)) for prompt in cases.PROMPTS])


def answers_of(rollout):
    """The responses up to their end tokens, in the order of `PROMPTS`."""
    rows = rollout["responses"][of_prompts(rollout)].tolist()
    return [row[: row.index(cases.END) + 1] if cases.END in row else row for row in rows]


def run_ours(name, folder, answers):
    """What `PPOTrainerX` computes in a case, given the answers."""
    options = cases.COMMON | {"output_dir": str(folder / "ours")} | cases.CASES[name][1]
    models = roles()
    if name in cases.PENALTY:
        models["actor"].generation_config.repetition_penalty = cases.PENALTY[name]
    rate = options["learning_rate"]
    optimizer, steps = cases.watched_optimizer(models["actor"], models["value"], (rate, rate))
    prompts = cases.PROMPTS + cases.MORE
    of_prompt = dict(zip(map(tuple, prompts), answers + answers, strict=True))

    def give(prompts, trainer):
        given = [of_prompt[tuple(prompt.input_ids)] for prompt in prompts]
        logprobs = [[0.0] * len(answer) for answer in given]
        ids = [prompt.input_ids for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": given, "logprobs": logprobs}

    trainer = PPOTrainerX(
        PPOConfigX(**{"max_grad_norm": 0.0} | options, kl_placement="reward", ent_coef=0.0, shuffle_dataset=False),
        tiny.tiny_tokenizer(),
        models["actor"],
        models["reference"],
        models["reward"],
        Dataset.from_dict({"input_ids": prompts}),
        models["value"],
        None,
        Dataset.from_dict({"input_ids": cases.HELD_OUT}),
        (optimizer, None),
        rollout_func=give,
    )
    rollouts = []
    optimizer.register_step_pre_hook(lambda *_: rollouts.append(trainer.run_state.rollout))
    trainer.train()
    tensors = rollouts[0].tensors()
    found = [
        tuple(ids[real].tolist()) for ids, real in zip(rollouts[0].prompt_ids, rollouts[0].prompt_mask, strict=True)
    ]
    order = torch.tensor([found.index(tuple(prompt)) for prompt in cases.PROMPTS])
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {name: tensor[order] for name, tensor in tensors.items()} | {"steps": steps, "log": log}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """By case: TRL 1.12's first rollout and ours, the rows in the order of `PROMPTS`, with their steps and logs."""
    folder = tmp_path_factory.mktemp("parity")
    tokenizer = tiny.tiny_tokenizer()
    for role, model in roles().items():
        for part in (model, tokenizer):
            part.save_pretrained(folder / role)
    setup = script("bench_ppo_setup")
    subprocess.run([setup.python_of(setup.BASELINE, cache_dir()), WORKER, folder], check=True)
    found = {}
    for name, theirs in torch.load(folder / "trl112.pt").items():
        if isinstance(theirs, str):
            found[name] = theirs  # what TRL says against it
            continue
        first = theirs["rollouts"][0]
        answers = cases.CASES[name][0] or answers_of(first)
        order = of_prompts(first)
        trl = {key: tensor[order] for key, tensor in first.items()} | {"order": order.tolist()}
        trl |= {key: theirs[key] for key in ("micro_batches", "steps", "completions", "log")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = run_ours(name, folder, answers)
        found[name] = SimpleNamespace(trl=trl, ours=ours, mask=ours["mask"], answers=answers)
    return found


def same(run, theirs, ours):
    """Two tensors (B, T) are equal at the tokens that count."""
    width = run.mask.size(1)
    assert_close(run.trl[theirs][:, :width][run.mask], run.ours[ours][run.mask], **CLOSE)
    assert run.ours[ours][run.mask].std() > 1e-3


def per_row(run, theirs):
    """Of TRL's (B, T), by response: the tokens that count, and one more position where it has one."""
    return [row[: len(answer) + 1].tolist() for row, answer in zip(run.trl[theirs], run.answers, strict=True)]


def flat(rows):
    return torch.tensor([number for row in rows for number in row])


# --- what is equal


@pytest.mark.parametrize("name", [*cases.EQUAL, *VARIED])
@pytest.mark.parametrize(
    "theirs, ours", [("logprobs", "old_logps"), ("ref_logprobs", "ref_logps"), ("values", "old_values")]
)
def test_models_say_the_same_of_every_token(both, name, theirs, ours):
    same(both[name], theirs, ours)


@pytest.mark.parametrize("name", [*cases.EQUAL, "varied"])
def test_kl_and_what_it_costs_are_the_same(both, name):
    run = both[name]
    ratio = (run.ours["ref_logps"] - run.ours["old_logps"])[run.mask]
    kl = ratio.exp() - 1 - ratio if "k3" in name else -ratio
    width = run.mask.size(1)
    assert_close(run.trl["kl"][:, :width][run.mask], kl, **CLOSE)
    assert_close(run.trl["non_score_reward"][:, :width][run.mask], -0.05 * kl, **CLOSE)
    if "k3" not in name:  # what is logged here is k1
        assert_close(run.ours["log"][0]["kl/ref"], run.trl["log"][0]["objective/kl"], **CLOSE)


@pytest.mark.parametrize("name", cases.EQUAL)
@pytest.mark.parametrize("theirs, ours", [("rewards", "rewards"), ("returns", "returns")])
def test_rewards_and_returns_are_the_same_where_every_answer_has_an_end_token_in_the_last_place(
    both, name, theirs, ours
):
    same(both[name], theirs, ours)


@pytest.mark.parametrize("name", cases.EQUAL)
def test_advantages_before_whitening_are_the_same(both, name):
    run = both[name]
    ours = (run.ours["returns"] - run.ours["old_values"])[run.mask]
    assert_close(run.trl["advantages"][run.mask], ours, **CLOSE)


@pytest.mark.parametrize("name", cases.EQUAL)
@pytest.mark.parametrize("step", [0, 1])
def test_losses_and_gradients_are_the_same_but_for_the_scale_of_advantages(both, name, step):
    run, scale = both[name], cases.whitening_scale(name)
    per_step = len(run.trl["micro_batches"]) // 2
    losses = run.trl["micro_batches"][step * per_step :][:per_step]
    policy, value = (sum(each[key] for each in losses) / per_step for key in ("pg_loss", "vf_loss"))
    line = run.ours["log"][step]
    assert_close(-line["terms/clip_objective"], scale * policy, **CLOSE)
    assert_close(line["terms/value_loss"], value, **CLOSE)
    assert_close(line["loss"], scale * policy + 0.1 * value, **CLOSE)
    for role, factor in (("actor", scale), ("value", 1.0)):
        theirs, ours = (side["steps"][step][role] for side in (run.trl, run.ours))
        assert len(theirs) == len(ours) > 0
        for (weight, gradient), (own_weight, own) in zip(theirs, ours, strict=True):
            assert_close(weight, own_weight, **CLOSE)
            assert_close(factor * gradient, own, **CLOSE)
        assert max(own.abs().max() for _, own in ours) > 1e-2
    clipped = line["policy/clip_fraction"], line["value/clip_fraction"]
    assert all(share > 0 for share in clipped) == (step == 1)


# --- what is not: where the score stands, and the value after it


def test_trl112_has_the_score_one_position_after_the_last_token(both):
    run = both["varied"]
    for reward, score, cost, ours, answer in zip(
        run.trl["rewards"],
        run.trl["scores"],
        run.trl["non_score_reward"],
        run.ours["rewards"],
        run.answers,
        strict=True,
    ):
        n = len(answer)
        there = min(n, cases.LENGTH - 1)
        expected = cost.clone()
        expected[there] += score
        assert_close(reward, expected, **CLOSE)
        on_the_last = cost[:n].clone()
        on_the_last[n - 1] += ours[:n].sum() - cost[:n].sum()
        assert_close(ours[:n], on_the_last, **CLOSE)


def test_trl112_reads_an_answer_that_was_cut_off_without_an_end_token(both):
    run, reward = both["varied"], tiny.tiny_reward_model(1)
    for prompt, answer, theirs, ours in zip(
        cases.PROMPTS, run.answers, run.trl["scores"], run.ours["scores"], strict=True
    ):
        with torch.no_grad():
            plain, ended = (
                reward(torch.tensor([prompt + ids])).logits[0, 0] for ids in (answer, [*answer, cases.END])
            )
        is_cut_off = answer[-1] != cases.END
        assert_close(theirs, plain - float(is_cut_off), **CLOSE)  # with `missing_eos_penalty`
        assert_close(ours, ended if is_cut_off else plain, **CLOSE)
        assert (plain - ended).abs() > 1e-3


def test_trl112_has_the_value_after_the_last_token_in_advantages_and_returns(both):
    run = both["varied"]
    rewards, values = per_row(run, "rewards"), per_row(run, "values")
    expected = [oracles.gae(*row, 0.97, 0.95) for row in zip(rewards, values, strict=True)]
    assert_close(flat(per_row(run, "advantages")), flat(expected), **CLOSE)
    returns = [[a + v for a, v in zip(*row, strict=True)] for row in zip(expected, values, strict=True)]
    assert_close(flat(per_row(run, "returns")), flat(returns), **CLOSE)
    own = oracles.per_sequence(
        lambda *row: oracles.gae(*row, 0.97, 0.95), run.mask, run.ours["rewards"], run.ours["old_values"]
    )
    assert_close((run.ours["returns"] - run.ours["old_values"])[run.mask], own[run.mask].float(), **CLOSE)


# --- means and variances


@pytest.mark.parametrize("name", [*cases.EQUAL, *VARIED])
def test_trl112_whitens_with_bessels_correction(both, name):
    run = both[name]
    real = ~run.trl["padding_mask"]
    assert torch.equal(real[:, : run.mask.size(1)], run.mask)
    n, mean, variance = oracles.moments(run.trl["advantages"][real].tolist())
    assert_close(
        run.trl["whitened"][real], (run.trl["advantages"][real] - mean) / (variance * n / (n - 1)) ** 0.5, **CLOSE
    )
    raw = run.ours["returns"] - run.ours["old_values"]
    _, mean, variance = oracles.moments(raw[run.mask].tolist())
    assert_close(run.ours["advantages"][run.mask], (raw[run.mask] - mean) / variance**0.5, **CLOSE)


def test_trl112_counts_the_position_after_the_last_token_when_it_whitens_rewards(both):
    run, plain = both["whitened rewards"], both["varied"]
    at = run.trl["non_score_reward"].clone()
    for row, score, answer in zip(at, run.trl["scores"], run.answers, strict=True):
        row[min(len(answer), cases.LENGTH - 1)] += score
    assert "minibatch size 4 is insufficient for whitening" in both["whitened rewards of four"]
    counted = ~run.trl["padding_mask_p1"]
    assert counted.sum() > run.mask.sum()
    n, mean, variance = oracles.moments(at[counted].tolist())
    assert_close(run.trl["rewards"][counted], (at[counted] - mean) / (variance * n / (n - 1)) ** 0.5 + mean, **CLOSE)
    cut_off = torch.tensor([answer[-1] != cases.END for answer in run.answers])
    own = plain.ours["rewards"].clone()  # which has the penalty of answers that were cut off
    own[cut_off, -1] += 1.0
    _, mean, variance = oracles.moments(own[run.mask].tolist())
    assert_close(run.ours["rewards"][run.mask], (own[run.mask] - mean) / variance**0.5 + mean, **CLOSE)


def test_trl112_takes_the_mean_of_each_micro_batch(both):
    run = both["varied"]
    original = torch.empty(8, dtype=torch.long)
    original[torch.tensor(run.trl["order"])] = torch.arange(8)
    errors = []
    for batch in run.trl["micro_batches"]:
        rows = original[batch["rows"]]
        real, counted = ~run.trl["padding_mask"][rows], ~run.trl["padding_mask_p1"][rows]
        assert_close(batch["pg_loss"], -run.trl["whitened"][rows][real].mean().item(), **CLOSE)
        squares = (run.trl["advantages"][rows][counted]).square()
        assert_close(batch["vf_loss"], squares.mean().item() / 2, **CLOSE)
        errors.append(batch["pg_loss"])
    line, own = run.ours["log"][0], (run.ours["returns"] - run.ours["old_values"])[run.mask]
    assert_close(line["terms/value_loss"], own.square().mean().item() / 2, **CLOSE)
    # At the start of learning the ratio is 1, and the mean of whitened advantages is 0.
    assert abs(line["terms/clip_objective"]) < 1e-5
    assert abs(sum(errors) / len(errors)) > 1e-3


# --- steps


def test_trl112_does_not_clip_gradients(both):
    run = both["schedule"]
    for step, limited in zip(run.trl["steps"], run.ours["steps"], strict=False):
        norms = [
            torch.stack([gradient.norm() for role in ("actor", "value") for _, gradient in each[role]]).norm()
            for each in (step, limited)
        ]
        assert norms[0] > 0.1
        assert norms[1] <= 1.001e-3


def test_trl112_schedules_rates_by_rollouts_and_does_not_step_per_mini_batch(both):
    run = both["schedule"]
    theirs, ours = ([round(step["rates"][0] / 1e-3, 6) for step in side["steps"]] for side in (run.trl, run.ours))
    # A step per epoch of two mini-batches; with the last batch of the data, which accelerate knows, per micro-batch.
    assert theirs == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert ours == [1 - k / 8 for k in range(8)]  # a step per mini-batch


# --- what the policy is


def distribution(answers, temperature):
    """Log-probabilities of the answers under the actor's full distribution, (B, T), one sequence at a time."""
    actor, rows = tiny.tiny_actor(0), []
    for prompt, answer in zip(cases.PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = actor(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        rows.append((logits.double() / temperature).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["sampled", "sampled with a penalty"])
def test_trl112s_old_policy_has_the_penalties_of_the_generation_config(both, name):
    run = both[name]
    full = distribution(run.answers, 0.7).float()
    assert_close(run.ours["old_logps"][run.mask], full, **CLOSE)
    width = run.mask.size(1)
    counts = ~run.trl["padding_mask"][:, :width] & run.mask  # a pad token that is sampled ends TRL's response
    apart = (run.trl["logprobs"][:, :width] - run.ours["old_logps"])[counts].abs().max()
    assert apart > 0.1 if name in cases.PENALTY else apart < 1e-5


def test_trl112_ends_a_response_at_a_pad_token_that_the_policy_wrote(both):
    run = both["pad token"]
    assert (~run.trl["padding_mask"]).sum(1).tolist() == [2, *[cases.LENGTH] * 7]
    assert run.mask.sum(1).tolist() == [cases.LENGTH] * 8


def test_trl112_adds_to_the_temperature(both):
    run = both["cold"]
    theirs, ours = (distribution(run.answers, temperature) for temperature in (1.1e-6, 1e-6))
    assert_close(run.trl["logprobs"][run.mask].double(), theirs, rtol=1e-4, atol=1e-5)
    assert_close(run.ours["old_logps"][run.mask].double(), ours, rtol=1e-4, atol=1e-5)


def test_trl112_samples_completions_all_but_greedily_and_leaves_out_the_last_batch(both):
    assert len(cases.HELD_OUT) == 3
    assert both["whole"].trl["completions"] == [(2, pytest.approx(0.01 + 1e-7))]
