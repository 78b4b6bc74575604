"""Actor, critic, reward model and reference on one base: equal to separate models, in NF4 too; one base in memory."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import four_roles
import tiny
from plain import plain_logps
from ppo_runs import (
    changed,
    log_lines,
    ppo_run,
    ppo_trainer,
    response_lengths,
    sequences,
    sum_of_terms,
)
from trl_ext.models.precision import keep_4_bit_differentiable
from trl_ext.ppo.roles.adapters import load_reward_adapter, stand_on


pytestmark = pytest.mark.integration
EQUAL = 1e-4
EOS = tiny.VOCABULARY.index("<eos>")

STARTS = pytest.mark.parametrize("start", [False, True], ids=["new adapter", "from an adapter"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return four_roles.prepare(tmp_path_factory.mktemp("roles"))


def trained(paths, folder, start=False, quantization=four_roles.NF4, models=None, **options):
    """A run of four roles whose adapters have moved visibly, saved to its folder."""
    given = four_roles.models(paths, start, quantization, **(models or {}))
    trainer = ppo_run(folder, given, **({"critic": "adapter", "learning_rate": 1e-2} | options))
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def runs(paths, tmp_path_factory):
    """Trained and saved runs on a 4-bit base, by whether they start from an adapter."""
    return {start: trained(paths, tmp_path_factory.mktemp("run"), start) for start in (False, True)}


# --- one base


def test_one_base_is_in_memory(paths, runs):
    """Counted: all tensors of weights of all roles, 4-bit states included, are those of one loaded base."""
    alone = AutoModelForCausalLM.from_pretrained(paths["base"], quantization_config=four_roles.NF4)
    base = four_roles.tensors_of_base(alone)
    for trainer in runs.values():
        modules = [trainer.model, trainer.critic, trainer.reward_funcs[0].model]
        held = four_roles.tensors_of_base(*modules)
        assert len(held) == len(base)
        assert sum(held.values()) == sum(base.values())
        assert trainer.ref_model is None
        layers = [layer for layer in trainer.model.modules() if type(layer).__name__ == "Linear4bit"]
        packed = [layer for layer in layers if not hasattr(layer, "base_layer")]
        assert len(packed) == 3 * 2 * 7  # three roles, two blocks of seven matrices
        assert len({layer.weight.data_ptr() for layer in packed}) == 2 * 7


def test_control_whole_models_are_counted_as_more_than_one_base(paths, tmp_path):
    given = four_roles.models(paths) | {"reward_model": tiny.tiny_reward_model()}
    trainer = ppo_trainer(tmp_path, given, critic="model")
    held = four_roles.tensors_of_base(trainer.model, trainer.reward_funcs[0].model)
    assert len(held) > 1.5 * len(four_roles.tensors_of_base(trainer.model.get_base_model().model))


def test_base_that_is_replaced_after_loading_is_noticed(paths):
    """Otherwise two bases would silently take twice the memory and drift apart."""
    actor = get_peft_model(AutoModelForCausalLM.from_pretrained(paths["base"]), four_roles.lora())
    model = load_reward_adapter(AutoModelForCausalLM.from_pretrained(paths["base"]), paths["reward"])
    with pytest.raises(RuntimeError, match=r"reward_model does not share .* weights with the actor"):
        stand_on(actor, model, "reward_model")


# --- equal to separate models


def on_its_own_base(paths, kind, **options):
    model = kind.from_pretrained(paths["base"], quantization_config=four_roles.NF4, **options)
    keep_4_bit_differentiable(model)
    return model


def in_bfloat16(model):
    """With its adapter in bfloat16, in which TRL trains adapters on a 4-bit base."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16() if "lora_" in name else parameter.data
    return model


def separate_models(paths, folder, start):
    """The four models, each on a base of its own, as any other program would load them."""
    actor = on_its_own_base(paths, AutoModelForCausalLM)
    critic = on_its_own_base(paths, AutoModelForSequenceClassification, num_labels=1)
    reward = on_its_own_base(paths, AutoModelForSequenceClassification, num_labels=1)
    reference = on_its_own_base(paths, AutoModelForCausalLM)
    return {
        "actor": in_bfloat16(PeftModel.from_pretrained(actor, folder)),
        "critic": in_bfloat16(PeftModel.from_pretrained(critic, folder / "critic")),
        "reward": PeftModel.from_pretrained(reward, paths["reward"]),
        "reference": in_bfloat16(PeftModel.from_pretrained(reference, paths["start"])) if start else reference,
    }


def logps_of(model, rollout):
    """Log-probabilities of each response's tokens, one sequence at a time without padding."""
    return torch.cat([plain_logps(model, *ids) for ids in sequences(rollout)])


def values_of(model, rollout):
    """State values of each response's tokens: the score head at the state before each token."""
    values, classifier = [], model.get_base_model()
    for prompt, response in sequences(rollout):
        states = classifier.model(torch.tensor([prompt + response])).last_hidden_state
        values.append(classifier.score(states)[0, len(prompt) - 1 : -1, 0])
    return torch.cat(values)


def scores_of(model, rollout):
    """Scores of prompt and response: the score head at the end token, which one that was cut off gets too."""
    classifier, scores = model.get_base_model(), []
    for prompt, response in sequences(rollout):
        words = response[:-1] if response[-1] < len(tiny.SPECIAL_TOKENS) else response
        states = classifier.model(torch.tensor([[*prompt, *words, EOS]])).last_hidden_state
        scores.append(classifier.score(states)[0, -1, 0])
    return torch.stack(scores)


def of_each_role(paths, folder, start, rollout):
    models = separate_models(paths, folder, start)
    measure = {"actor": logps_of, "critic": values_of, "reward": scores_of, "reference": logps_of}
    with torch.no_grad():
        return {role: measure[role](model, rollout) for role, model in models.items()}


@torch.no_grad()
def by_trainer(trainer, rollout):
    outputs = trainer._forward(trainer.model, rollout, ("log_probs", "state_values"))
    with trainer._reference() as model:
        reference = trainer._forward(model, rollout, ("log_probs",))
    prompts, responses = zip(*sequences(rollout), strict=True)
    scores = trainer.reward_funcs[0](prompt_ids=list(prompts), completion_ids=list(responses))
    return {
        "actor": outputs.log_probs[rollout.mask],
        "critic": outputs.state_values[rollout.mask],
        "reward": torch.tensor(scores),
        "reference": reference.log_probs[rollout.mask],
    }


@STARTS
def test_roles_equal_four_separate_models(paths, runs, start):
    trainer = runs[start]
    rollout, folder = trainer.run_state.rollout, Path(trainer.args.output_dir)
    expected = of_each_role(paths, folder, start, rollout)
    found = by_trainer(trainer, rollout)
    for role in expected:
        torch.testing.assert_close(found[role], expected[role], rtol=0, atol=EQUAL)
    ids = rollout.prompt_ids[0][rollout.prompt_mask[0]][None]
    sampling = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    written = trainer.model.eval().generate(input_ids=ids, **sampling)
    assert torch.equal(written, separate_models(paths, folder, start)["actor"].generate(input_ids=ids, **sampling))
    # The roles do differ: an adapter in the wrong place would be seen.
    assert (expected["actor"] - expected["reference"]).abs().max() > 10 * EQUAL
    assert expected["critic"].std() > 10 * EQUAL
    assert expected["reward"].std() > 10 * EQUAL


# --- gradients


def gradients(trainer, rollout, output):
    """By name, the gradient of the sum of one output of the roles; parameters that got none are left out."""
    trainer.model.zero_grad()
    outputs = trainer._forward(trainer.model.train(), rollout, ("log_probs", "state_values"))
    getattr(outputs, output).square().sum().backward()
    return {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()
    }


def checkpointed(trainer, on):
    """Turns gradient checkpointing of actor and critic on or off, without reentrance as the Trainer does."""
    for model in (trainer.model.get_base_model(), trainer.critic.model.get_base_model()):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()


@STARTS
@pytest.mark.parametrize("on", [False, True], ids=["plain", "checkpointed"])
def test_each_output_trains_its_own_adapter_alone(runs, start, on):
    trainer = runs[start]
    checkpointed(trainer, on)
    rollout = trainer.run_state.rollout
    of_actor, of_critic = gradients(trainer, rollout, "log_probs"), gradients(trainer, rollout, "state_values")
    assert {name for name in of_actor if ".default." not in name or name.startswith("critic.")} == set()
    assert {name for name in of_critic if not name.startswith("critic.")} == set()
    assert len(of_actor) == 2 * 2 * 2  # A and B of two matrices in two blocks: none is left out
    assert len(of_critic) == 2 * 2 * 2 + 1  # and the score head
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable == of_actor.keys() | of_critic.keys()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def difference(one, other):
    assert one.keys() == other.keys()
    return max(((one[n] - g).float().norm() / g.float().norm()).item() for n, g in other.items())


def recompute_under_the_actors_adapter(critic, actor):
    """The mistake: when the backward pass computes a block again, another adapter is active than in the forward."""

    def checkpoint_of(layer):
        def run_twice(run, *args):
            calls = []

            def switching(*again):
                calls.append(None)
                function = getattr(run.func, "__func__", run.func)  # a method of the layer before transformers 5.23
                return run(*again) if len(calls) == 1 else partial(function, layer, **run.keywords)(*again)

            return checkpoint(switching, *args, use_reentrant=False)

        return run_twice

    for of_critic, of_actor in zip(critic.model.layers, actor.model.layers, strict=True):
        of_critic._gradient_checkpointing_func = checkpoint_of(of_actor)


@STARTS
@pytest.mark.parametrize("output", ["log_probs", "state_values"])
def test_gradient_checkpointing_changes_no_gradient(runs, start, output):
    trainer = runs[start]
    found = {}
    for on in (False, True):
        checkpointed(trainer, on)
        found[on] = gradients(trainer, trainer.run_state.rollout, output)
    assert difference(found[True], found[False]) < 1e-6


@pytest.mark.parametrize("output", ["log_probs", "state_values"])
def test_reentrant_checkpointing_changes_no_gradient(runs, output):
    """The kind that TRL chooses for adapters under ZeRO-3."""
    trainer = runs[False]
    checkpointed(trainer, False)
    plain = gradients(trainer, trainer.run_state.rollout, output)
    for model in (trainer.model.get_base_model(), trainer.critic.model.get_base_model()):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert difference(gradients(trainer, trainer.run_state.rollout, output), plain) < 1e-6


def test_control_recomputation_under_another_adapter_changes_gradients(paths, tmp_path):
    """Without a reward adapter, the critic's has the form of the actor's, and nothing but the numbers shows it."""
    given = four_roles.models(paths) | {"reward_model": None, "reward_funcs": response_lengths}
    trainer = ppo_run(tmp_path, given, critic="adapter", learning_rate=1e-2)
    checkpointed(trainer, False)
    plain = gradients(trainer, trainer.run_state.rollout, "state_values")
    checkpointed(trainer, True)
    assert difference(gradients(trainer, trainer.run_state.rollout, "state_values"), plain) < 1e-6
    recompute_under_the_actors_adapter(trainer.critic.model.get_base_model(), trainer.model.get_base_model())
    wrong = gradients(trainer, trainer.run_state.rollout, "state_values")
    assert wrong.keys() != plain.keys() or difference(wrong, plain) > 0.01


def test_checkpointed_run_checkpoints_actor_and_critic_not_the_reward_model(paths, tmp_path):
    trainer = ppo_trainer(
        tmp_path, four_roles.models(paths), critic="adapter", gradient_checkpointing=True, max_steps=1
    )
    seen = []
    for role, module in (("actor", trainer.model.get_base_model()), ("critic", trainer.critic.model.get_base_model())):
        for layer in module.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda *_, role=role: seen.append(role) if torch.is_grad_enabled() else None
            )
    trainer.train()
    # Two micro-batches, two blocks: a forward pass, and once again in the backward pass.
    assert {role: seen.count(role) for role in ("actor", "critic")} == {"actor": 8, "critic": 8}


# --- what a run starts from


def scores_of_ids(trainer, ids):
    return torch.tensor(trainer.reward_funcs[0](prompt_ids=ids[:, :4].tolist(), completion_ids=ids[:, 4:].tolist()))


def test_critic_starts_as_a_copy_of_the_reward_adapter(paths, tmp_path):
    """Its value at the last token of prompt and response is the score; then the two part."""
    trainer = ppo_trainer(tmp_path, four_roles.models(paths, quantization=None), critic="adapter")
    ids = torch.randint(7, 60, (3, 9))
    ids[:, -1] = EOS
    scores = scores_of_ids(trainer, ids)
    torch.testing.assert_close(trainer.critic.values(input_ids=ids)[:, -1], scores, rtol=0, atol=1e-6)
    assert scores.std() > 0.01
    trainer.train()
    assert torch.equal(scores_of_ids(trainer, ids), scores)
    assert (trainer.critic.values(input_ids=ids)[:, -1] - scores).abs().max() > 1e-4


@STARTS
@torch.no_grad()
def test_critic_without_a_reward_adapter_is_the_actors_trunk_with_a_head_of_0(paths, tmp_path, start):
    given = four_roles.models(paths, start, quantization=None)
    given |= {"reward_model": None, "reward_funcs": response_lengths}
    trainer = ppo_trainer(tmp_path, given, critic="adapter")
    ids = torch.randint(7, 60, (3, 9))
    assert not trainer.critic.values(input_ids=ids).any()
    trunks = [model.get_base_model().model for model in (trainer.model, trainer.critic.model)]
    of_actor, of_critic = (trunk(ids).last_hidden_state for trunk in trunks)
    assert torch.equal(of_critic, of_actor)
    base = AutoModelForCausalLM.from_pretrained(paths["base"]).model(ids).last_hidden_state
    assert torch.equal(of_critic, base) != start


@torch.no_grad()
def test_critic_that_is_a_whole_model_starts_as_the_merged_reward_adapter(paths, tmp_path):
    trainer = ppo_trainer(tmp_path, four_roles.models(paths, quantization=None), critic="model")
    ids = torch.randint(7, 60, (3, 9))
    ids[:, -1] = EOS
    scores = scores_of_ids(trainer, ids)
    torch.testing.assert_close(trainer.critic.values(input_ids=ids)[:, -1], scores, rtol=0, atol=1e-5)
    assert not any("lora" in name for name, _ in trainer.critic.named_parameters())
    assert all(p.requires_grad for p in trainer.critic.parameters())
    of_actor = {p.data_ptr() for p in trainer.model.get_base_model().model.parameters()}
    assert not of_actor & {p.data_ptr() for p in trainer.critic.parameters()}


def test_whole_critic_is_not_copied_from_a_4_bit_base(paths, tmp_path):
    with pytest.raises(ValueError, match=r"copy the reward model, which is quantized.*`critic='adapter'`"):
        ppo_trainer(tmp_path, four_roles.models(paths), critic="model")


def test_value_head_goes_with_a_reward_adapter(paths, tmp_path):
    trainer = ppo_run(tmp_path, four_roles.models(paths), critic="head")
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), rel=1e-5)
    rollout = trainer.run_state.rollout
    reward = PeftModel.from_pretrained(
        on_its_own_base(paths, AutoModelForSequenceClassification, num_labels=1), paths["reward"]
    )
    torch.testing.assert_close(by_trainer(trainer, rollout)["reward"], scores_of(reward, rollout), rtol=0, atol=EQUAL)


# --- saving


@STARTS
def test_files_of_the_actor_hold_its_adapter_alone(paths, runs, start):
    trainer = runs[start]
    folder = Path(trainer.args.output_dir)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert all("_proj.lora_" in name for name in tensors)
    trained_tensors = {n: p for n, p in trainer.model.named_parameters() if ".default." in n}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained_tensors[name.replace(".weight", ".default.weight")])
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["critic"]  # no ref/, no reward_model/
    files = {path.name for path in (folder / "critic").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}


def test_file_of_an_adapter_whose_name_begins_like_another_roles_holds_it_alone(paths, tmp_path):
    """PEFT looks for the adapter's name anywhere in a tensor's name."""
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    actor = PeftModel.from_pretrained(base, paths["start"], is_trainable=True, adapter_name="reward")
    trainer = ppo_trainer(tmp_path, {"model": actor, "reward_model": paths["reward"]}, critic="adapter")
    trainer.save_model()
    assert len(load_file(tmp_path / "reward" / "adapter_model.safetensors")) == 8
    assert (tmp_path / "reward" / "base_model.json").exists()


def test_saved_critic_continues_as_value_model(paths, runs, tmp_path):
    saved = runs[False].critic
    again = ppo_trainer(
        tmp_path,
        four_roles.models(paths, value_model=str(Path(runs[False].args.output_dir) / "critic")),
        critic="adapter",
    )
    own = {name: p for name, p in saved.named_parameters() if p.requires_grad}
    assert len(own) == 9
    for name, parameter in own.items():
        assert torch.equal(again.critic.get_parameter(name), parameter)
        assert again.critic.get_parameter(name).requires_grad
    again.train()
    assert changed(again.critic, {name: p.detach() for name, p in saved.named_parameters()}) == own.keys()


# --- 4-bit layers on a CPU


def test_no_role_repacks_the_4_bit_weights_in_an_evaluation(paths, tmp_path, monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes would, for all roles and for good, and no gradient gets through then."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    trainer = ppo_trainer(tmp_path, four_roles.models(paths), critic="adapter")
    repacks = [getattr(module, "support_avx512bf16_for_cpu", None) for module in trainer.model.modules()]
    assert repacks.count(False) == 3 * 2 * 7  # three roles, two blocks of seven matrices
    assert True not in repacks
