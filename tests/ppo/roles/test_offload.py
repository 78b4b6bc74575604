"""Frozen models between the phases: where their weights are, that nothing changes by it, and what cannot be moved."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn

import four_roles
import tiny
from frozen_layouts import Poisoned
from ppo_runs import log_lines, ppo_config, ppo_run, ppo_trainer, response_lengths, snapshot
from trl_ext.ppo.roles import offload
from trl_ext.ppo.roles.offload import WaitingWeights


@pytest.fixture
def host_plays_device(monkeypatch):
    """Everything counts as being on a device. Host and device are then both host memory, in storages of their own."""
    monkeypatch.setattr(offload, "on_host", lambda tensor: False)


def whereabouts(trainer):
    """A list that fills: at each forward of a model, whose weights are on the device."""
    roles = {"actor": trainer.model, "reference": trainer.ref_model, "reward": trainer.reward_funcs[0].model}
    waiting = {
        role: [parameter.data_ptr() for parameter in roles[role].parameters()] for role in ("reference", "reward")
    }
    seen = []

    def note(role):
        there = set()
        for other, pointers in waiting.items():
            moved = [p.data_ptr() != pointer for p, pointer in zip(roles[other].parameters(), pointers, strict=True)]
            assert all(moved) or not any(moved), f"half of the {other} is on the device"
            there |= {other} if all(moved) else set()
        seen.append((role, frozenset(there), roles[role].training))

    for role, model in roles.items():
        model.register_forward_pre_hook(lambda *_, role=role: note(role))
    return seen


# --- the phases


@pytest.mark.integration
def test_a_frozen_model_is_on_the_device_while_it_scores_and_at_no_other_time(tmp_path, host_plays_device):
    trainer = ppo_trainer(tmp_path, {"eval_dataset": tiny.tiny_prompts(4, seed=3)}, offload_frozen_models=True)
    seen = whereabouts(trainer)
    trainer.train()
    trainer.evaluate()
    while_collecting = ("actor", frozenset(), False)
    while_learning = ("actor", frozenset(), True)
    of_reference = ("reference", frozenset({"reference"}), False)
    of_reward = ("reward", frozenset({"reward"}), False)
    assert set(seen) - {while_collecting} == {while_learning, of_reference, of_reward}


RUNS = {
    "KL in the loss": {},
    "KL in the reward": {"kl_placement": "reward"},
    "exact KL, value head": {"kl_estimator": "full", "critic": "head"},
    "two mini-batches": {"num_mini_batches": 2, "eval_steps": 2, "eval_strategy": "steps"},
}


def of_run(folder, **options):
    own_tokenizer = tiny.tiny_tokenizer()
    own_tokenizer.add_tokens(["zebra"])
    models = {
        "ref_model": tiny.tiny_actor(5),
        "eval_dataset": tiny.tiny_prompts(4, seed=3),
        # The reward model reads ids, the other one text.
        "reward_funcs": [tiny.tiny_reward_model(7, vocab_size=65)],
        "reward_processing_classes": [None, own_tokenizer],
    }
    trainer = ppo_run(folder, models, **options)
    trainer.evaluate()
    timeless = [
        {key: value for key, value in line.items() if not any(word in key for word in ("time", "second", "memory"))}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    return timeless, snapshot(trainer.model)


@pytest.mark.integration
@pytest.mark.parametrize("run", RUNS)
def test_run_is_the_same_to_the_bit_when_waiting_weights_are_nan(tmp_path, monkeypatch, host_plays_device, run):
    plain = of_run(tmp_path / "plain", **RUNS[run])
    monkeypatch.setattr(offload, "WaitingWeights", Poisoned)
    offloaded = of_run(tmp_path / "offloaded", offload_frozen_models=True, **RUNS[run])
    assert [line.keys() for line in plain[0]] == [line.keys() for line in offloaded[0]]
    for line, other in zip(plain[0], offloaded[0], strict=True):
        numbers = [(line[key], other[key]) for key in line if not key.endswith(("_runtime", "_per_second"))]
        assert all(mine == its or mine != mine != its for mine, its in numbers), (line, other)  # NaN is NaN
    assert all(torch.equal(tensor, offloaded[1][name]) for name, tensor in plain[1].items())


@pytest.mark.integration
def test_control_a_head_that_waits_while_the_exact_kl_reads_it_shows(tmp_path, host_plays_device):
    trainer = ppo_trainer(tmp_path, {"ref_model": tiny.tiny_actor(5)}, kl_estimator="full")
    trainer._reference_weights = Poisoned([trainer.ref_model])  # the head with the rest
    with pytest.raises(FloatingPointError):
        trainer.train()


@pytest.mark.integration
@pytest.mark.parametrize("hook", ["_reference_weights", "_reward_weights"])
def test_control_a_model_that_is_not_fetched_shows(tmp_path, host_plays_device, hook):
    trainer = ppo_trainer(tmp_path, offload_frozen_models=True)
    models = {"_reference_weights": trainer.ref_model, "_reward_weights": trainer.reward_funcs[0].model}
    Poisoned([models[hook]])
    setattr(trainer, hook, WaitingWeights([]))
    with pytest.raises((FloatingPointError, ValueError), match=r"nan|KL\(actor"):
        trainer.train()


# --- the weights


class Frozen(nn.Module):
    """A tied pair, a buffer, and one more weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.other = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids):
        return self.head(self.other(self.embedding(ids)) * self.scale)


def test_every_tensor_moves_once_and_comes_back_to_the_same_place(host_plays_device):
    model = Frozen().requires_grad_(False)
    ids = torch.arange(6)
    expected = model(ids)
    weights = WaitingWeights([model, model])
    assert weights.gigabytes == pytest.approx((24 + 16 + 4 + 1) * 4 / 1e9)
    tensors = [*model.parameters(), *model.buffers()]
    waiting = [tensor.data_ptr() for tensor in tensors]
    for _ in range(2):
        with weights.on_device():
            assert not {tensor.data_ptr() for tensor in tensors} & set(waiting)
            assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
            assert torch.equal(model(ids), expected)
        assert [tensor.data_ptr() for tensor in tensors] == waiting


def test_weights_wait_again_after_an_error(host_plays_device):
    model = Frozen()
    weights = WaitingWeights([model])
    waiting = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="in between"), weights.on_device():
        raise RuntimeError("in between")
    assert [parameter.data_ptr() for parameter in model.parameters()] == waiting


def test_weights_that_stay_on_the_device_are_not_copied(host_plays_device):
    model = Frozen()
    there = model.head.weight.data_ptr()
    weights = WaitingWeights([model], stays=[model.head])
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr() == there
    assert weights.gigabytes == pytest.approx((16 + 4 + 1) * 4 / 1e9)


def test_models_that_share_the_actors_weights_are_left_where_they_are():
    actor, other = Frozen(), Frozen()
    shares = nn.Sequential(actor.other, nn.Linear(4, 4))
    assert offload.without_models_of(actor, [shares, other, actor]) == [other]


# --- what is said


def test_on_the_cpu_nothing_moves_and_one_line_says_so(tmp_path, capsys):
    trainer = ppo_trainer(tmp_path, offload_frozen_models=True)
    assert trainer._reference_weights.gigabytes == trainer._reward_weights.gigabytes == 0
    assert "`offload_frozen_models` moves nothing: the run is on the CPU.\n" in capsys.readouterr().out


def test_line_says_how_much_waits_or_why_nothing_does(host_plays_device):
    frozen = nn.Linear(50_000, 1_000, bias=False, dtype=torch.bfloat16)
    weights, none = WaitingWeights([frozen]), WaitingWeights([])
    device = torch.device("cuda")
    assert "0.00 GB of reward models, 0.10 GB of the reference" in offload.placement_line(weights, none, device)
    assert "0.10 GB of reward models, 0.00 GB of the reference" in offload.placement_line(none, weights, device)
    assert "moves nothing: no frozen model has weights of its own" in offload.placement_line(none, none, device)


@pytest.mark.integration
def test_adapter_as_reference_and_a_function_as_reward_leave_nothing_to_move(tmp_path, host_plays_device):
    models = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    models |= {"reward_model": None, "reward_funcs": response_lengths}
    trainer = ppo_run(tmp_path, models, offload_frozen_models=True, max_steps=1)
    assert trainer._reference_weights.gigabytes == trainer._reward_weights.gigabytes == 0
    assert log_lines(trainer)


@pytest.mark.integration
@pytest.mark.parametrize("quantization", [None, four_roles.NF4], ids=["full", "4 bits"])
def test_roles_on_the_actors_base_stay_where_it_is(tmp_path, host_plays_device, quantization):
    models = four_roles.models(four_roles.prepare(tmp_path), False, quantization)
    trainer = ppo_run(tmp_path / "run", models, critic="adapter", offload_frozen_models=True, max_steps=1)
    assert trainer._reference_weights.gigabytes == trainer._reward_weights.gigabytes == 0
    assert log_lines(trainer)


def test_without_the_option_nothing_moves(tmp_path, host_plays_device):
    reward_model = tiny.tiny_reward_model()
    before = [parameter.data_ptr() for parameter in reward_model.parameters()]
    ppo_trainer(tmp_path, {"reward_model": reward_model})
    assert [parameter.data_ptr() for parameter in reward_model.parameters()] == before


# --- what is refused


@pytest.mark.parametrize("option, value", [("offload_frozen_models", True), ("reward_model_quantization", "4bit")])
@pytest.mark.parametrize("engine", ["DeepSpeed ZeRO-3", "FSDP"])
def test_partitioned_models_are_neither_moved_nor_quantised(tmp_path, monkeypatch, engine, option, value):
    args = ppo_config(tmp_path, **{option: value})
    if engine == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match=f"does not go together with {engine}"):
        offload.check_placement(args, "actor", None, "reward", [], has_adapter=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_models_that_deepspeed_does_not_partition_may_be_moved(tmp_path, stage):
    args = ppo_config(tmp_path, offload_frozen_models=True)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    offload.check_placement(args, "actor", None, "reward", [], has_adapter=False)


@pytest.mark.parametrize("option", ["reward_model_quantization", "ref_model_quantization"])
def test_8_bit_models_are_not_moved(tmp_path, option):
    with pytest.raises(ValueError, match=f"`offload_frozen_models` cannot move what `{option}='8bit'` makes"):
        ppo_config(tmp_path, offload_frozen_models=True, **{option: "8bit"})


def test_given_8_bit_model_is_not_moved(tmp_path):
    reward_model = tiny.tiny_reward_model()
    reward_model.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="`offload_frozen_models` cannot move `reward_model`: an 8-bit layer"):
        ppo_trainer(tmp_path, {"reward_model": reward_model}, offload_frozen_models=True)


# --- on a GPU


@pytest.mark.gpu
def test_device_memory_between_the_phases_holds_no_frozen_model(tmp_path):
    """Bytes on the GPU while the actor runs: those of a run without frozen models' weights."""
    memory = {}
    for offloaded in (False, True):
        torch.cuda.empty_cache()
        sizes = {"hidden_size": 512, "intermediate_size": 1024}
        models = {"model": tiny.tiny_actor(**sizes), "reward_model": tiny.tiny_reward_model(**sizes)}
        before = torch.cuda.memory_allocated()
        trainer = ppo_trainer(
            tmp_path, models | {"ref_model": tiny.tiny_actor(5, **sizes)}, offload_frozen_models=offloaded
        )
        memory[offloaded] = torch.cuda.memory_allocated() - before
        frozen = sum(
            tensor.numel() * tensor.element_size()
            for model in (trainer.ref_model, trainer.reward_funcs[0].model)
            for tensor in [*model.parameters(), *model.buffers()]
        )
        trainer.train()
        devices = {parameter.device.type for parameter in trainer.ref_model.parameters()}
        assert devices == {"cpu" if offloaded else "cuda"}
        del trainer
    assert memory[False] - memory[True] == pytest.approx(frozen, rel=0.01)
