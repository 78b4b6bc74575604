"""`CriticTrainerX`: what the critic learns, when it stops, what it leaves, and how PPO takes that."""

import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import four_roles
import layouts
import tiny
from ppo_runs import logged, ppo_config, ppo_trainer, returned_by, sequences, snapshot
from trl_ext import CriticConfigX, CriticTrainerX
from trl_ext.ppo import pretraining, saved_rollouts
from trl_ext.ppo.roles.inputs import Given, check_given, resolve


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SIZES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3}
OPTIONS = SIZES | {"num_mini_batches": 2, "learning_rate": 1e-2, "response_length": 9, "disable_tqdm": True}
OPTIONS |= {"report_to": "none", "logging_steps": 1, "use_cpu": True}


@pytest.fixture(autouse=True)
def _no_warning_of_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Actor, reward model, and another actor, with their tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    paths = tiny.save_tiny(folder)
    tiny.tiny_actor(5).save_pretrained(folder / "other")
    tiny.tiny_tokenizer().save_pretrained(folder / "other")
    return paths | {"other": str(folder / "other")}


def critic_trainer(folder, paths, models=None, **options):
    """A trainer on eight prompts and their fixed responses, with tool tokens, which are held out too."""
    given = {"model": paths["actor"], "reward_model": paths["reward_model"], "rollout_func": layouts.answer}
    given |= {"train_dataset": layouts.PROMPTS, "eval_dataset": layouts.PROMPTS} | (models or {})
    return CriticTrainerX(CriticConfigX(str(folder), **(OPTIONS | options)), **given)


@pytest.fixture(scope="module")
def pretrained(paths, tmp_path_factory):
    """A finished run of each kind of critic, and its folder; each is made once."""
    made = {}

    def of(critic="model"):
        if critic not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
                folder = tmp_path_factory.mktemp(critic)
                trainer = critic_trainer(folder, paths, adapter(critic), critic=critic, max_passes=3, patience=3)
                before = snapshot(trainer.model)
                trainer.train()
                trainer.save_model()
                made[critic] = SimpleNamespace(folder=folder, trainer=trainer, before=before)
        return made[critic]

    return of


def look_up(word: str) -> str:
    """
    Look a word up.

    Args:
        word: the word.
    """
    return word


class Room:
    """An environment."""

    def reset(self, **_):
        return None

    def get_reward(self):
        return 0.5


def adapter(critic):
    return {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if critic == "adapter" else {}


# What it learns


def test_returns_are_the_rewards_to_go_of_a_loop(paths, tmp_path):
    """Also with tool tokens, which are no steps, a discount, a penalty and the deviation of all scores."""
    options = {"gamma": 0.9, "missing_eos_penalty": 0.5, "normalize_rewards": True, "reward_clip": 1.0}
    trainer = critic_trainer(tmp_path, paths, max_passes=1, **options)
    trainer.train()
    expected = loop(trainer.kept["train"], gamma=0.9, penalty=0.5, clip=1.0)
    assert len(expected) == 8
    assert of_rows(trainer, range(8)) == expected
    assert of_rows(trainer, [5, 2]) == [expected[5], expected[2]]
    assert of_rows(trainer, range(8)) != loop(trainer.kept["train"], gamma=1.0, penalty=0.5, clip=1.0)


def of_rows(trainer, rows):
    rollout = trainer._rollout("train", list(rows))
    pairs = zip(rollout.returns, rollout.mask, strict=True)
    return [pytest.approx(returns[mask].tolist(), abs=1e-6) for returns, mask in pairs]


def loop(rows, gamma, penalty, clip):
    scores = rows["score"]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    returns = []
    for row in rows:
        score = max(-clip, min(clip, row["score"] / deviation)) - (0 if row["ended"] else penalty)
        count = sum(row["counts"])
        returns.append([score * gamma ** (count - 1 - step) for step in range(count)])
    return returns


def test_rewards_at_tokens_are_kept_and_paid_there(paths, tmp_path):
    """Every second response is paid at its tokens, a hundredth of their ids, the others a score at the last."""

    def reward(completion_ids, **_):
        return [[i / 100 for i in ids] if len(ids) % 2 else 0.5 for ids in completion_ids]

    trainer = critic_trainer(tmp_path, paths, {"reward_model": None, "reward_funcs": reward}, max_passes=1)
    trainer.train()
    returns = []
    for row in trainer.kept["train"]:
        rewards = [i / 100 for i in row["response_ids"]] if len(row["counts"]) % 2 else [0.0] * len(row["counts"])
        rewards[-1] += 0.0 if len(row["counts"]) % 2 else 0.5
        # What a tool wrote is paid at the last token before it that counts, or at the first that does.
        to_go = [sum(rewards[t:]) for t in range(len(rewards))]
        counted = [t for t, counts in enumerate(row["counts"]) if counts]
        returns.append([sum(rewards) if t == counted[0] else to_go[t] for t in counted])
    assert of_rows(trainer, range(8)) == returns


def test_control_returns_of_another_estimator_are_not_those_of_the_loop(paths, tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining.MONTE_CARLO, "advantage_estimator", "gae")
    trainer = critic_trainer(tmp_path, paths, max_passes=1)
    trainer.train()
    assert of_rows(trainer, range(8)) != [[score] * sum(c) for score, c in scores_and_counts(trainer)]


def scores_and_counts(trainer):
    rows = trainer.kept["train"]
    return list(zip(rows["score"], rows["counts"], strict=True))


def test_step_is_the_gradient_of_half_the_squared_error_over_all_tokens(paths, tmp_path):
    """A step of plain gradient descent, in two micro-batches, against autograd on all responses at once."""
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_passes": 1, "patience": 1}
    sizes = {"per_device_train_batch_size": 4, "num_mini_batches": 1}
    trainer = critic_trainer(tmp_path, paths, lr_scheduler_type="constant", **(options | sizes))
    before = {name: p.detach().clone() for name, p in trainer.critic.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 1
    rollout = trainer._rollout("train", list(range(8)))
    critic = tiny.tiny_reward_model()  # which the run's began as
    inputs = rollout.model_inputs()
    states = critic.model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
    values = critic.score(states).squeeze(-1)[:, rollout.prompt_ids.size(1) - 1 : -1]
    loss = (0.5 * (values - rollout.returns) ** 2)[rollout.mask].mean()
    loss.backward()
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
    expected = {f"model.{name}": p for name, p in critic.named_parameters()}
    last = trainer.explained[1] if trainer.best_pass == 1 else None
    for name, parameter in trainer.critic.named_parameters():
        if last is not None:
            step = before[name] - 0.1 * expected[name].grad
            torch.testing.assert_close(parameter, step, atol=1e-6, rtol=1e-4)
    assert last is not None


def test_every_pass_reads_each_response_once_beside_those_to_its_prompt(paths, tmp_path, monkeypatch):
    read, rollout = [], CriticTrainerX._rollout
    monkeypatch.setattr(CriticTrainerX, "_rollout", lambda self, *given: read.append(given) or rollout(self, *given))
    trainer = critic_trainer(tmp_path, paths, num_generations=2, max_passes=2, patience=2, total_episodes=12)
    trainer.train()
    assert len(trainer.kept["train"]) == 12
    drawn = [rows for split, rows in read if split == "train" and len(rows) == 4][-6:]
    for pass_ in (drawn[:3], drawn[3:]):
        assert sorted(row for rows in pass_ for row in rows) == list(range(12))
    assert drawn[:3] != drawn[3:]
    assert all(rows[::2] == [row - 1 for row in rows[1::2]] and not any(r % 2 for r in rows[::2]) for rows in drawn)


@pytest.mark.parametrize("critic", ["model", "head", "adapter"])
def test_only_the_critic_learns(pretrained, critic):
    run = pretrained(critic)
    moved = {name for name, p in run.trainer.model.named_parameters() if not torch.equal(p, run.before[name])}
    assert moved
    assert all(name.split("critic.")[0] in ("", "base_model.model.") for name in moved)
    held = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.trainer.critic.parameters() if p.requires_grad}


# When it stops


def scripted(monkeypatch, *explained):
    values = iter(explained)
    monkeypatch.setattr(pretraining, "explained_variance", lambda *_: torch.tensor(next(values)))


class KeepCritic:
    """The critic's weights at every evaluation."""

    def __init__(self, trainer):
        self.kept, judge = [], trainer._judge

        def keep(explained):
            self.kept.append(snapshot(trainer.critic))
            judge(explained)

        trainer._judge = keep


def test_training_ends_when_nothing_rises_and_keeps_the_best_pass(paths, tmp_path, monkeypatch):
    scripted(monkeypatch, -1.0, 0.25, 0.5, 0.5, 0.25, 0.75)
    trainer = critic_trainer(tmp_path, paths, max_passes=9, patience=2)
    keep = KeepCritic(trainer)
    trainer.train()
    assert trainer.explained == [-1.0, 0.25, 0.5, 0.5, 0.25]
    assert trainer.best_pass == 2
    assert trainer.state.global_step == 4 * 4
    now = snapshot(trainer.critic)
    assert [all(torch.equal(now[name], kept[name]) for name in now) for kept in keep.kept] == [
        pass_ == 2 for pass_ in range(5)
    ]


def test_control_the_last_pass_is_another(paths, tmp_path, monkeypatch):
    scripted(monkeypatch, -1.0, 0.5, 0.25)
    monkeypatch.setattr(CriticTrainerX, "best_pass", property(lambda self: len(self.explained) - 1))
    trainer = critic_trainer(tmp_path, paths, max_passes=2, patience=1)
    trainer.train()
    assert trainer.state.global_step == 2 * 4  # never "no better"


def test_most_passes_are_an_option(paths, tmp_path, monkeypatch):
    scripted(monkeypatch, *[i / 10 for i in range(9)])
    trainer = critic_trainer(tmp_path, paths, max_passes=3)
    trainer.train()
    assert trainer.state.global_step == 3 * 4
    assert trainer.best_pass == 3


def test_a_critic_that_only_gets_worse_is_the_one_that_it_was(paths, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.5, 0.25, 0.1)
    trainer = critic_trainer(tmp_path, paths, max_passes=3)
    before = snapshot(trainer.critic)
    trainer.train()
    assert trainer.best_pass == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.critic.named_parameters())


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_several_processes_are_the_held_out_responses(pretrained, monkeypatch, world):
    """Eight responses on three processes: what fills up the last share counts nowhere."""
    trainer, shares = pretrained().trainer, []
    for rank in range(world):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda _, rank=rank: rank))
        shares.append(list(trainer._parts("held_out", world)))
    assert len({len(parts) for parts in shares}) == 1
    counted = [saved_rollouts.rows_of(part) for parts in shares for part in parts]
    counted = [row for rows in counted for row in rows if any(row["counts"])]
    rows = trainer.kept["held_out"].to_list()
    assert sorted(counted, key=lambda row: row["response_ids"]) == sorted(rows, key=lambda row: row["response_ids"])


# What PPO makes of it


@pytest.mark.parametrize("critic", ["model", "head", "adapter"])
def test_first_rollout_of_ppo_is_explained_as_the_held_out_responses_were(pretrained, paths, tmp_path, critic):
    run = pretrained(critic)
    best, start = max(run.trainer.explained), run.trainer.explained[0]
    assert math.isnan(start) or best > start
    given = {"model": paths["actor"], "reward_model": paths["reward_model"], "rollout_func": layouts.answer}
    given |= {"processing_class": None, "train_dataset": layouts.PROMPTS} | adapter(critic)
    sizes = {"gradient_accumulation_steps": 4, "total_episodes": 8, "response_length": 9, "critic": critic}
    trainer = ppo_trainer(tmp_path, given | {"value_model": str(run.folder)}, **sizes)
    trainer.train()
    assert logged(trainer, "value/explained_variance_mc") == [pytest.approx(best, abs=1e-5)]


@pytest.mark.parametrize("seeded", [True, False])
def test_ppo_of_the_same_seed_samples_other_responses_than_those_learned_from(paths, tmp_path, monkeypatch, seeded):
    """Its first rollout would be explained too well. The control: without a seed of its own they are the same."""
    if not seeded:
        set_seed = pretraining.set_seed
        monkeypatch.setattr(pretraining, "set_seed", lambda seed, **more: None if more else set_seed(seed))
    sampled = {"rollout_func": None, "train_dataset": layouts.PROMPTS}
    trainer = critic_trainer(tmp_path / "critic", paths, sampled, max_passes=1, per_device_train_batch_size=4)
    trainer.train()
    kept = [(row["prompt_ids"], row["response_ids"]) for row in trainer.kept["train"]]
    given = {"model": paths["actor"], "reward_model": paths["reward_model"], "processing_class": None}
    sizes = {"per_device_train_batch_size": 4, "total_episodes": 8, "response_length": 9, "seed": trainer.args.seed}
    ppo = ppo_trainer(tmp_path / "ppo", given | {"train_dataset": layouts.PROMPTS}, **sizes)
    rollouts = returned_by(ppo, "_collect_rollout")
    ppo.train()
    assert [prompt for prompt, _ in sequences(rollouts[0])] == [prompt for prompt, _ in kept]
    assert (sequences(rollouts[0]) != kept) == seeded


@pytest.fixture(scope="module")
def policies(paths, tmp_path_factory):
    """Folders of adapters on the actor, beside `paths`."""
    folder = tmp_path_factory.mktemp("policies")
    adapter = four_roles.save_adapter(paths["actor"], folder / "adapter", "CAUSAL_LM", 2)
    moved, scaled = (shutil.copytree(adapter, folder / name) for name in ("moved", "scaled"))
    options = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(options | {"lora_alpha": 99}))
    trained = four_roles.save_adapter(paths["actor"], folder / "trained", "CAUSAL_LM", 3)
    return paths | {"adapter": adapter, "moved": str(moved), "scaled": str(scaled), "trained": trained}


def policy(policies, name):
    """A folder, or a model in memory: new on every call, as it may be changed."""
    if name in policies:
        return policies[name]
    if not name.startswith("PeftModel"):
        return tiny.tiny_actor(5 if name == "another object" else 0)
    base = AutoModelForCausalLM.from_pretrained(policies["actor"])
    return PeftModel.from_pretrained(base, policies[name.removeprefix("PeftModel of ")], is_trainable=True)


@pytest.fixture(scope="module")
def critics_of(policies, tmp_path_factory):
    """The folder of a critic of a policy, saved before it has learned; each is made once."""
    made = {}

    def of(name, critic):
        if (name, critic) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
                made[name, critic] = str(tmp_path_factory.mktemp("critic"))
                models = {"model": policy(policies, name), "processing_class": tiny.tiny_tokenizer()}
                critic_trainer(made[name, critic], policies, models, critic=critic).save_model()
        return made[name, critic]

    return of


# The policy of the critic, that of PPO's run, and whether they are the same; None: it cannot be known.
PAIRS = [
    ("actor", "actor", True),
    ("actor", "other", False),
    ("actor", "adapter", False),
    ("adapter", "actor", False),
    ("adapter", "moved", True),
    ("adapter", "trained", False),
    ("adapter", "scaled", False),
    ("adapter", "PeftModel of adapter", None),
    ("object", "object", True),
    ("object", "another object", False),
    ("object", "actor", None),
    ("PeftModel of adapter", "PeftModel of moved", True),
    ("PeftModel of adapter", "PeftModel of trained", False),
    ("PeftModel of adapter", "object", None),
]


def check_critic(policies, actor, folder, tmp_path, critic="head", **models):
    """PPO's checks of models, before any is loaded."""
    given = {"model": policy(policies, actor), "value_model": folder, "reward_model": policies["reward_model"]}
    check_given(*resolve(ppo_config(tmp_path, critic=critic, use_cpu=True), reward_funcs=None, **given, **models))


@pytest.mark.parametrize("pretrained_on, actor, same", PAIRS)
def test_a_head_of_another_policy_is_refused_before_loading(
    policies, critics_of, tmp_path, caplog, pretrained_on, actor, same
):
    """Each trunk is of the same width."""
    folder = critics_of(pretrained_on, "head")
    said = r"`value_model`\) was pretrained on .* whose weights are not those of the actor .* of another trunk says"
    with nullcontext() if same is not False else pytest.raises(ValueError, match=said):
        check_critic(policies, actor, folder, tmp_path)
    assert ("was pretrained on this run's actor is unknown: " in caplog.text) == (same is None)


@pytest.mark.parametrize("critic, actor", [("model", "other"), ("model", "adapter"), ("adapter", "adapter")])
def test_a_critic_of_another_policy_is_refused_unless_its_policy_is_forgotten(
    policies, critics_of, pretrained, tmp_path, critic, actor
):
    folder = shutil.copytree(pretrained(critic).folder, tmp_path / "critic")
    said = rf"another policy's responses have other values. .* remove {folder / 'policy.json'}"
    with pytest.raises(ValueError, match=said):
        check_critic(policies, actor, str(folder), tmp_path, critic)
    (folder / "policy.json").unlink()
    check_critic(policies, actor, str(folder), tmp_path, critic)


def test_a_larger_critic_of_the_same_policy_is_taken(policies, tmp_path):
    """As is one that `trl-ext critic` has not pretrained."""
    larger = str(tmp_path / "larger")
    tiny.tiny_reward_model(hidden_size=32).save_pretrained(larger)
    tiny.tiny_tokenizer().save_pretrained(larger)
    folder = tmp_path / "critic"
    critic_trainer(folder, policies, {"value_model": larger}).save_model()
    for value_model in (str(folder), larger):
        check_critic(policies, "actor", value_model, tmp_path, "model")


@pytest.mark.parametrize("critic", ["model", "head", "adapter"])
def test_a_critic_of_another_tokenizer_is_refused(pretrained, paths, tmp_path, critic):
    folder = tmp_path / "renamed"
    shutil.copytree(pretrained(critic).folder, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = dict(
        zip(words, [*list(words.values())[:7], *reversed(list(words.values())[7:])], strict=True)
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    given = {"model": paths["actor"], "value_model": str(folder), "processing_class": None} | adapter(critic)
    with pytest.raises(ValueError, match="`value_model` was trained with another tokenizer"):
        ppo_trainer(tmp_path / "out", given, critic=critic)


def test_kind_of_critic_must_be_that_of_the_folder(pretrained, paths, tmp_path):
    for kind, folder, said in (
        ("model", "head", "holds a value head: choose `critic='head'`"),
        ("head", "model", "give the folder of such a head"),
        ("model", "adapter", "Set `critic='adapter'`"),
    ):
        with pytest.raises(ValueError, match=said):
            ppo_trainer(tmp_path, {"value_model": str(pretrained(folder).folder)}, critic=kind)


def test_value_head_of_another_width_is_refused(pretrained, tmp_path):
    wide = {"model": tiny.tiny_actor(hidden_size=32), "value_model": str(pretrained("head").folder)}
    with pytest.raises(ValueError, match="reads states of width 16, and the actor's trunk has 32"):
        ppo_trainer(tmp_path, wide, critic="head")


# The responses are read again


def test_responses_that_are_read_again_give_the_same_critic_to_the_last_bit(pretrained, paths, tmp_path, monkeypatch):
    run = pretrained()
    monkeypatch.setattr(CriticTrainerX, "_sample", lambda *_: pytest.fail("sampled again"))
    again = critic_trainer(
        tmp_path, paths, {"train_dataset": None, "eval_dataset": None},
        rollouts=str(run.folder / "rollouts"), max_passes=3, patience=3,
    )  # fmt: skip
    again.train()
    again.save_model()
    first, second = (load_file(folder / "model.safetensors") for folder in (run.folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.explained == run.trainer.explained
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    "models, options, said",
    [
        ({"model": "other"}, {}, "of the policy .*actor, whose weights are not those of this run's"),
        ({"reward_model": "other"}, {}, "scored by .*reward_model, and this run has .*other"),
        ({}, {"response_length": 8}, "sampled with response_length=9, and this run has response_length=8"),
        ({}, {"temperature": 0.5}, "sampled with temperature=1.0, and this run has temperature=0.5"),
        ({}, {"reward_model_quantization": "8bit"}, "reward_model_quantization=None, and this run has .*=8bit"),
        ({}, {"max_tool_calling_iterations": 2}, "max_tool_calling_iterations=None, and this run has .*=2"),
        ({"tools": [look_up]}, {}, "sampled with the tools none, and this run has look_up"),
        ({"environment_factory": Room}, {}, "sampled in the environments none, and this run has Room"),
        ({"rollout_func": None}, {}, "sampled by `rollout_func` answer, and this run has none"),
        ({"reward_processing_classes": tiny.tiny_tokenizer()}, {}, "with `reward_processing_classes` none, and this"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, {}, "quantization_config=None, and this run"),
    ],
)
def test_responses_of_another_run_are_refused_by_name(pretrained, paths, tmp_path, models, options, said):
    named = {role: paths.get(name, name) if isinstance(name, str) else name for role, name in models.items()}
    with pytest.raises(ValueError, match=said):
        critic_trainer(tmp_path, paths, named, rollouts=str(pretrained().folder / "rollouts"), **options)


def one_judge():
    def judge(completions, **_):
        return [0.5] * len(completions)

    return judge


def the_same_judge():
    def judge(completions, **_):
        # That of `one_judge`, with a comment

        return [0.5] * len(completions)

    return judge


def another_judge():
    def judge(completions, **_):
        return [1.5] * len(completions)

    return judge


@pytest.mark.parametrize("role", ["reward_funcs", "tools", "environment_factory", "rollout_func"])
def test_responses_of_other_code_of_the_same_name_are_refused(pretrained, paths, tmp_path, role, caplog):
    run, tokenizer = pretrained(), tiny.tiny_tokenizer()

    def facts(function):
        given = {role: [function] if role in ("reward_funcs", "tools") else function}
        rollout_func = given.pop("rollout_func", None)
        return saved_rollouts.facts_of(run.trainer.args, Given(paths["actor"], **given), tokenizer, rollout_func)

    saved_rollouts.write(tmp_path, run.trainer.kept, facts(one_judge()))
    saved_rollouts.require_same(tmp_path, facts(the_same_judge()))
    assert not caplog.text
    with pytest.raises(ValueError, match="judge, and this run has judge, or other weights or code of that name"):
        saved_rollouts.require_same(tmp_path, facts(another_judge()))
    saved_rollouts.write(tmp_path, run.trainer.kept, facts(sum))
    saved_rollouts.require_same(tmp_path, facts(sum))
    assert "those that this run would sample is unknown: what sum is cannot be read from its code" in caplog.text


@pytest.mark.parametrize("pretrained_on, actor, same", [pair for pair in PAIRS if "adapter" in pair[0]])
def test_responses_of_another_adapter_are_refused(policies, pretrained, tmp_path, caplog, pretrained_on, actor, same):
    run, tokenizer = pretrained(), tiny.tiny_tokenizer()

    def facts(name):
        args, given = resolve(run.trainer.args, model=policy(policies, name), reward_funcs=None)
        return saved_rollouts.facts_of(args, given, tokenizer)

    then, now = facts(pretrained_on), facts(actor)
    now["policy"]["name"] = then["policy"]["name"]  # an adapter that was trained further, in the same folder
    saved_rollouts.write(tmp_path, run.trainer.kept, then)
    with nullcontext() if same is not False else pytest.raises(ValueError, match="weights are not those of this"):
        saved_rollouts.require_same(tmp_path, now)
    assert ("would sample is unknown: " in caplog.text) == (same is None)


def test_a_saved_adapter_samples_and_its_responses_are_read_again(policies, tmp_path):
    models = {"model": policies["adapter"], "processing_class": None}
    trainer = critic_trainer(tmp_path / "1", policies, models, max_passes=1)
    trainer.train()
    rollouts = str(tmp_path / "1" / "rollouts")
    again = critic_trainer(tmp_path / "2", policies, models | {"model": policies["moved"]}, rollouts=rollouts)
    assert len(again.prompts) == 8
    with pytest.raises(ValueError, match=r"of the policy .*adapter, whose weights are not those of this run's"):
        critic_trainer(tmp_path / "3", policies, models | {"model": policies["trained"]}, rollouts=rollouts)


def test_responses_of_another_tokenizer_are_refused(pretrained, paths, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="of another tokenizer, or another chat template"):
        critic_trainer(
            tmp_path, paths, {"processing_class": tokenizer}, rollouts=str(pretrained().folder / "rollouts")
        )


def test_folder_without_responses_is_refused(pretrained, paths, tmp_path):
    with pytest.raises(ValueError, match=r"which has no facts.json and no train.parquet and no held_out.parquet"):
        critic_trainer(tmp_path, paths, rollouts=str(tmp_path))
    shutil.copytree(pretrained().folder / "rollouts", tmp_path / "rollouts")
    (tmp_path / "rollouts/held_out.parquet").unlink()
    with pytest.raises(ValueError, match=r"which has no held_out.parquet"):
        critic_trainer(tmp_path, paths, rollouts=str(tmp_path / "rollouts"))


@pytest.mark.parametrize(
    "column, value, said",
    [
        ("score", math.nan, "has the score nan; a score must be finite"),
        ("score", -math.inf, "has the score -inf; a score must be finite"),
        ("paid", [0.5, math.nan], "is paid nan at token 1; a reward must be finite"),
        ("paid", [math.inf, 0.5], "is paid inf at token 0; a reward must be finite"),
        ("paid", [0.5], "has 1 values in `paid` for 2 tokens of the response"),
        ("counts", [True, True, True], "has 3 values in `counts` for 2 tokens of the response"),
    ],
)
def test_kept_row_that_was_not_written_so_is_refused(pretrained, paths, tmp_path, column, value, said):
    """Row 3 has two tokens; the row before it is paid at them, and the first has no score."""
    rollouts = tmp_path / "rollouts"
    shutil.copytree(pretrained().folder / "rollouts", rollouts)
    rows = Dataset.from_parquet(str(rollouts / "train.parquet")).to_list()
    rows[0]["score"] = None
    rows[2]["paid"] = [0.25] * len(rows[2]["response_ids"])
    rows[3] |= {"response_ids": [8, 9], "counts": [True, True]}
    Dataset.from_list(rows).to_parquet(str(rollouts / "train.parquet"))
    critic_trainer(tmp_path / "out", paths, rollouts=str(rollouts))
    rows[3][column] = value
    Dataset.from_list(rows).to_parquet(str(rollouts / "train.parquet"))
    with pytest.raises(ValueError, match=rf"Row 3 of .*train.parquet {said}"):
        critic_trainer(tmp_path, paths, rollouts=str(rollouts))


# What is wrong


@pytest.mark.parametrize(
    "models, said",
    [
        ({"reward_model": None}, "There is no reward at all"),
        ({"model": None}, "There is no model to train"),
        ({"eval_dataset": None}, "There are no held-out prompts"),
        ({"eval_dataset": layouts.PROMPTS.select([])}, "There are no held-out prompts"),
    ],
)
def test_what_is_missing_is_said(paths, tmp_path, models, said):
    with pytest.raises(ValueError, match=said):
        critic_trainer(tmp_path, paths, models)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"whiten_rewards": True}, "`whiten_rewards` divides rewards by the deviation of their own rollout"),
        ({"resume_from_checkpoint": "x"}, "writes no checkpoints to resume from"),
        ({"patience": 0}, "`patience` is 0; it must be an integer of at least 1"),
        ({"max_passes": 0}, "`max_passes` is 0; it must be an integer of at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        CriticConfigX(str(tmp_path), **(OPTIONS | options))


def test_overlap_of_a_recipe_is_not_read(tmp_path):
    """With the mask and no correction, which the critic has no use for either."""
    overlap = {"use_vllm": True, "vllm_mode": "server", "rollout_lag": 1}
    mask = {"policy_objective": "mask", "vllm_importance_sampling_correction": False}
    read = pretraining._of_critic(CriticConfigX(str(tmp_path), **(OPTIONS | overlap | mask)))
    assert (read.rollout_lag, read.policy_objective) == (0, "clip")


def test_a_config_of_ppo_is_refused(tmp_path):
    with pytest.raises(TypeError, match="CriticTrainerX needs a `CriticConfigX`"):
        CriticTrainerX(ppo_config(tmp_path))


def test_partitioned_weights_are_refused_by_name(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "is_stage3", lambda _: True)
    with pytest.raises(ValueError, match="not pretrained under ZeRO-3 or FSDP"):
        critic_trainer(tmp_path, paths)


def test_options_of_the_critic_are_those_of_the_run_and_those_of_the_actor_are_not_read(paths, tmp_path):
    own = {"critic_learning_rate": 0.5, "critic_weight_decay": 0.25, "critic_max_grad_norm": 3.0}
    own |= {"critic_lr_scheduler_type": "cosine", "critic_steps": 2, "policy_objective": "mask", "lam_alpha": 0.5}
    trainer = critic_trainer(tmp_path, paths, kl_controller="band", **own)
    args = trainer.args
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm, args.lr_scheduler_type) == (
        0.5,
        0.25,
        3,
        "cosine",
    )
    assert (args.critic_steps, args.policy_objective, args.lam_alpha, args.kl_coef) == (1, "clip", None, 0)


def test_returns_that_are_all_equal_are_an_error(paths, tmp_path):
    def constant(completions, **_):
        return [0.5] * len(completions)

    def nothing(completions, **_):
        return [None] * len(completions)

    for reward, said in ((constant, "responses are all 0.5: a constant explains them"), (nothing, "have no score")):
        trainer = critic_trainer(tmp_path, paths, {"reward_model": None, "reward_funcs": reward})
        with pytest.raises(ValueError, match=said):
            trainer.train()


def test_critic_that_is_not_finite_is_named(paths, tmp_path):
    broken = tiny.tiny_reward_model()
    torch.nn.init.constant_(broken.score.weight, math.nan)
    trainer = critic_trainer(tmp_path, paths, {"value_model": broken})
    with pytest.raises(FloatingPointError, match="The critic gives values that are not finite at step 0"):
        trainer.train()


def test_step_that_leaves_no_number_is_an_error(paths, tmp_path):
    trainer = critic_trainer(tmp_path, paths, learning_rate=1e25, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match=r"not finite|The value loss is"):
        trainer.train()


def test_fewer_responses_than_a_batch_are_an_error(pretrained, paths, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has 8 prompts, and a rollout takes 16"):
        critic_trainer(tmp_path, paths, rollouts=str(pretrained().folder / "rollouts"), per_device_train_batch_size=8)


# Kept responses, without a trainer


def test_kept_responses_are_what_was_sampled(pretrained, paths):
    run = pretrained()
    rows = run.trainer.kept["train"].to_list()
    by_prompt = {tuple(row["prompt_ids"]): row for row in rows}
    assert len(by_prompt) == 8
    given = layouts.answer(layouts.PROMPTS["prompt"], SimpleNamespace(processing_class=tiny.tiny_tokenizer()))
    for prompt, response, mask in zip(given["prompt_ids"], given["completion_ids"], given["env_mask"], strict=True):
        row = by_prompt[tuple(prompt)]
        assert row["response_ids"] == response
        assert row["counts"] == [bool(counts) for counts in mask]
    rollout = saved_rollouts.rollout_of(run.trainer.kept["train"][[0, 1, 2]], 0, torch.device("cpu"))
    assert saved_rollouts.rows_of(rollout) == rows[:3]


def test_row_without_a_score_counts_nowhere():
    row = {"prompt_ids": [9], "response_ids": [8, 7], "counts": [False, False], "score": None}
    scored = {"prompt_ids": [9, 9], "response_ids": [8], "counts": [True], "score": -0.25}
    row |= {"paid": None, "ended": False}
    scored |= {"paid": None, "ended": True}
    rows = {name: [row[name], scored[name]] for name in row}
    rollout = saved_rollouts.rollout_of(rows, 0, torch.device("cpu"))
    assert rollout.scored.tolist() == [False, True]
    assert rollout.mask.tolist() == [[False, False], [True, False]]
    assert rollout.attended.tolist() == [[True, True], [True, False]]
    assert rollout.prompt_mask.tolist() == [[False, True], [True, True]]
    assert rollout.paid is None
    assert saved_rollouts.rows_of(rollout) == [row, scored]
    by_token = scored | {"response_ids": [8, 7, 6], "counts": [True, False, True], "paid": [0.5, 0.0, -0.75]}
    rows = {name: [scored[name], by_token[name]] for name in row}
    paid = saved_rollouts.rollout_of(rows, 0, torch.device("cpu")).paid
    assert paid.tolist() == [[-0.25, 0.0, 0.0], [0.5, 0.0, -0.75]]
