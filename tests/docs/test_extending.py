"""The worked examples of docs/architecture.md: applied as written, trained with, compared with slow computations."""

import math
from pathlib import Path

import pytest

import layout_worker
import oracles
import tiny
import two_processes
import zero_runs
from accelerate_files import launch
from extending import apply, edits, extended_copy, run_in, worked_examples
from ppo_runs import log_lines, ppo_run, sum_of_terms
from trl_ext.planner import hardware, layout_from_options, plan


pytestmark = pytest.mark.integration
# Of a log line; the rest is time and memory.
NUMBERS = ("loss", "terms/", "coef/", "policy/", "value/", "advantage/", "reward/", "kl/", "grad_norm")

RUN = """
import tiny
from ppo_runs import changed, log_lines, ppo_trainer, snapshot

kept = ("old_logps", "ref_logps", "old_values", "advantages", "returns", "scores", "mask")
result = []
for options in runs:
    trainer = ppo_trainer(folder, {"ref_model": tiny.tiny_actor(5)}, **options)
    before = snapshot(trainer.model)
    trainer.train()
    rollout = {name: getattr(trainer.run_state.rollout, name).tolist() for name in kept}
    result.append((log_lines(trainer), rollout, changed(trainer.model, before)))
"""


def numbers(lines):
    return [{key: value for key, value in line.items() if key.startswith(NUMBERS)} for line in lines]


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """Log lines of a run of the package as it is."""
    models = {"ref_model": tiny.tiny_actor(5)}
    return numbers(log_lines(ppo_run(tmp_path_factory.mktemp("default"), models)))


@pytest.fixture
def extended(tmp_path):
    """Trains with each of several options in the package extended as under a heading; `code` goes on from there."""

    def extend(heading, *runs, code=""):
        copy, folder = extended_copy(heading, tmp_path), str(tmp_path / "run")
        results = run_in(copy, RUN + code, folder=folder, runs=runs)
        of_runs = [(numbers(lines), rollout, moved) for lines, rollout, moved in results[: len(runs)]]
        return of_runs + results[len(runs) :]

    return extend


def per_token(rollout, *names):
    """The values of the tokens that count, sequence by sequence, token by token."""
    rows = zip(rollout["mask"], *(rollout[name] for name in names), strict=True)
    for mask, *columns in rows:
        yield [values for counts, *values in zip(mask, *columns, strict=True) if counts]


# --- the page


def test_every_worked_example_touches_at_most_three_files():
    examples = worked_examples()
    assert examples.keys() == {"A loss term", "An advantage estimator", "A KL estimator", "A callback", "A layout"}
    for heading, parts in examples.items():
        assert 1 <= len({edit.path for edit in parts}) <= 3, heading


def test_control_an_edit_that_does_not_fit_its_file_is_noticed(tmp_path):
    (tmp_path / "file.py").write_text("import math\none = 1\ntwo = 2\ntwo = 2\n")

    def edit(*lines):
        return edits("\n".join(["```diff", "+++ file.py", *lines, "```", ""]))[0]

    apply(edit("@@", " one = 1", "-two = 2", "+two = 3"), tmp_path)
    assert (tmp_path / "file.py").read_text() == "import math\none = 1\ntwo = 3\ntwo = 2\n"
    with pytest.raises(AssertionError, match="holds 0 times"):
        apply(edit("@@", "-two = 4", "+two = 5"), tmp_path)
    with pytest.raises(AssertionError, match="begins with a space"):
        edit("@@", "two = 4")


# --- a loss term


def test_loss_term_changes_nothing_by_default_and_is_logged_summed_and_learned_from(default, extended):
    code = """
from transformers import HfArgumentParser
from trl_ext import PPOConfigX
from trl_ext.ppo.terms import TERMS

(args,) = HfArgumentParser(PPOConfigX).parse_args_into_dataclasses(["--imitation_coef", "0.5", "--report_to", "none"])
try:
    PPOConfigX(imitation_coef=-1.0)
except ValueError as error:
    result.append((args.imitation_coef, str(error), [term.contribution for term in TERMS]))
"""
    asked = {"imitation_coef": 0.25, "vf_coef": 0.0, "max_steps": 1}
    (lines, _, _), ((line,), rollout, moved), of_option = extended("A loss term", {}, asked, code=code)
    for unasked, plain in zip(lines, default, strict=True):
        assert unasked.keys() - plain.keys() == {"terms/imitation", "coef/imitation"}
        assert {key: unasked[key] for key in plain} == plain
        assert unasked["coef/imitation"] == 0
    tokens = [token for row in per_token(rollout, "old_logps", "returns", "old_values") for token in row]
    expected = [-logp * max(target - value, 0.0) for logp, target, value in tokens]
    assert line["terms/imitation"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert line["terms/imitation"] > 0
    assert line["coef/imitation"] == 0.25
    assert line["loss"] == pytest.approx(sum_of_terms(line) + 0.25 * line["terms/imitation"], abs=1e-7)
    assert line["grad_norm"] != default[0]["grad_norm"]
    assert moved
    assert not [name for name in moved if "critic" in name]  # without a value loss, nothing trains it
    value, error, contributions = of_option
    assert value == 0.5
    assert error == "`imitation_coef` is -1.0; it must be 0 or above, and finite."
    assert "imitation_coef · imitation" in contributions


# --- an advantage estimator


def test_advantage_estimator_gives_the_actor_gae_and_the_critic_rewards_to_go(default, extended):
    options = {"gamma": 0.9, "lam": 0.7, "whiten_advantages": False, "max_steps": 1}
    options |= {"advantage_estimator": "decoupled_gae"}
    (plain, _, _), (_, rollout, _) = extended("An advantage estimator", {}, options)
    assert plain == default
    # With the KL in the loss, the score at the last token is the only reward.
    for score, row in zip(rollout["scores"], per_token(rollout, "old_values", "advantages", "returns"), strict=True):
        values, advantages, returns = map(list, zip(*row, strict=True))
        rewards = [0.0] * (len(row) - 1) + [score]
        assert returns == pytest.approx([score * 0.9**t for t in reversed(range(len(row)))], rel=1e-5)
        assert advantages == pytest.approx(oracles.gae(rewards, values, gamma=0.9, lam=0.7), rel=1e-4, abs=1e-6)


# --- a KL estimator


def test_kl_estimator_has_the_value_of_k3_and_the_gradient_of_k2(default, extended):
    (plain, _, _), (lines, rollout, _) = extended("A KL estimator", {}, {"kl_estimator": "k3+", "max_steps": 1})
    assert plain == default
    tokens = [token for row in per_token(rollout, "ref_logps", "old_logps") for token in row]
    expected = [math.expm1(ref - logp) - (ref - logp) for ref, logp in tokens]
    assert lines[0]["terms/kl"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    # k2 is the default: the same gradient, another value.
    assert lines[0]["grad_norm"] == default[0]["grad_norm"]
    assert lines[0]["terms/kl"] != pytest.approx(default[0]["terms/kl"], rel=1e-3)
    assert lines[0]["loss"] == pytest.approx(sum_of_terms(lines[0]), abs=1e-7)


# --- a callback


def test_callback_ends_a_run_at_the_first_line_with_its_tokens(tmp_path):
    code = """
import dpo_runs, ppo_runs
from trl_ext.callbacks import TokenBudgetCallback

def tokens_by_step(build, *callbacks):
    trainer = build(folder, {"callbacks": list(callbacks)}, max_steps=5)
    trainer.train()
    lines = trainer.state.log_history
    return {line["step"]: line["num_tokens"] for line in lines if "num_tokens" in line}, trainer.state.global_step

result = []
for build in (ppo_runs.ppo_trainer, dpo_runs.dpo_trainer):
    whole, last = tokens_by_step(build)
    budget = list(whole.values())[1]
    result.append((whole, last, tokens_by_step(build, TokenBudgetCallback(budget)),
                   tokens_by_step(build, TokenBudgetCallback(budget + 1))))
try:
    TokenBudgetCallback(0)
except ValueError as error:
    result.append(str(error))
"""
    *runs, error = run_in(extended_copy("A callback", tmp_path), code, folder=str(tmp_path / "run"))
    for whole, last, (exact, exact_last), (more, more_last) in runs:
        steps = list(whole)
        assert last == 5
        assert (exact_last, more_last) == (steps[1], steps[2])  # PPO logs tokens with a rollout, DPO with every step
        assert exact == {step: whole[step] for step in steps[:2]}
        assert more == {step: whole[step] for step in steps[:3]}
    assert error == "`tokens` is 0; give at least 1, in tokens of prompts and responses."


# --- a layout

# accelerate and DeepSpeed import half of their optional dependencies.
quiet = pytest.mark.filterwarnings("ignore")


@quiet
def test_layout_is_launched_and_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(extended_copy("A layout", tmp_path))
    file = "configs/deepspeed/zero2_offload.json"
    started = launch(Path("configs/accelerate/zero2_offload.yaml"))
    assert started.processes == 8
    assert started.environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == file
    machine = hardware("a100-80gb", gpus=8)
    planned = plan("qwen2.5-0.5b", layout_from_options("ppo", {"deepspeed": file, "critic": "head"}, machine), machine)
    learning = planned.phases[-1].roles["actor"]
    assert learning.weights == 2 * planned.models.actor.parameters
    assert learning.optimizer == 0
    assert planned.host > 16 * planned.models.actor.parameters


@quiet
@pytest.mark.proof
@pytest.mark.distributed
def test_layout_trains_as_without_offloading(tmp_path):
    """Two processes, launched by the file: the optimizer is the host's, and the losses are those of ZeRO-2."""
    copy = extended_copy("A layout", tmp_path)
    zero_runs.save(tmp_path)
    layouts = {}
    for name, root in (("zero2_offload", copy), ("zero2", two_processes.ROOT)):
        started = launch(root / "configs" / "accelerate" / f"{name}.yaml", "--num_processes", "2").environment
        file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(root / "configs" / "deepspeed" / f"{name}.json")}
        layouts[name] = {"environment": started | file, "options": {"max_steps": 3}}
    measured = two_processes.measured(layout_worker.measure, tmp_path, layouts, timeout=900)
    for algorithm in ("ppo", "dpo"):
        run, plain = measured[f"zero2_offload, {algorithm}"], measured[f"zero2, {algorithm}"]
        assert (run["stage"], run["optimizer"]) == (2, "DeepSpeedCPUAdam")
        assert run["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-4)
        assert plain["optimizer"] != run["optimizer"]
        assert run["still"] == []
