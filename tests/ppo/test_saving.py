"""What a run saves: the actor, the critic in `critic/`, a model card, and the best checkpoint."""

import functools
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from ppo_runs import best_after_two_steps, changed, log_lines, ppo_run, ppo_trainer, run_to_best_checkpoint, snapshot
from trl_ext.ppo.roles.critic import ValueHead


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def of_actor(model):
    """The parameters of a trained model without the critic's."""
    return {name: tensor for name, tensor in snapshot(model).items() if not name.startswith("critic.")}


KINDS = {
    "full": ({}, {"save_strategy": "steps", "save_steps": 2}),
    "adapter": ({"peft_config": lora()}, {"learning_rate": 1e-2}),
    "head": ({}, {"critic": "head", "learning_rate": 1e-2}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By kind, a run that has been saved, and its folder."""

    @functools.cache
    def of(kind):
        folder, (models, options) = tmp_path_factory.mktemp(kind), KINDS[kind]
        trainer = ppo_run(folder, models, **options)
        trainer.save_model(str(folder))
        return trainer, folder

    return of


# --- the actor


@pytest.mark.parametrize("subfolder", ["", "checkpoint-4"])
def test_output_loads_as_a_causal_lm_with_no_unexpected_key(saved, subfolder):
    trainer, folder = saved("full")
    model, loading = AutoModelForCausalLM.from_pretrained(folder / subfolder, output_loading_info=True)
    assert not any(loading.values())
    assert type(model) is type(tiny.tiny_actor())
    assert changed(model, of_actor(trainer.model)) == set()
    assert changed(model, snapshot(tiny.tiny_actor())) == set(snapshot(model))
    assert AutoTokenizer.from_pretrained(folder / subfolder).get_vocab() == tiny.tiny_tokenizer().get_vocab()


def test_tied_embeddings_are_saved_once(tmp_path):
    trainer = ppo_run(tmp_path, {"model": tiny.tiny_actor(tie_word_embeddings=True)}, max_steps=1)
    trainer.save_model()
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert changed(model, of_actor(trainer.model)) == set()


def test_adapter_loads_on_the_base_model(saved):
    trainer, folder = saved("adapter")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    model = PeftModel.from_pretrained(tiny.tiny_actor(), folder).eval()
    ids = torch.randint(7, 60, (2, 9))
    with torch.no_grad():
        trained, base = trainer.model.eval()(ids).logits, tiny.tiny_actor()(ids).logits
        assert torch.equal(model(ids).logits, trained)
    assert (trained - base).abs().max() > 1e-3


# --- the critic


@pytest.mark.parametrize("kind, subfolder", [("full", ""), ("full", "checkpoint-4"), ("adapter", "")])
def test_critic_model_loads_on_its_own(saved, kind, subfolder):
    trainer, folder = saved(kind)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder / subfolder / "critic", output_loading_info=True
    )
    assert not any(loading.values())
    assert model.config.num_labels == 1
    assert changed(model, snapshot(trainer.critic.model)) == set()
    assert changed(model, snapshot(tiny.tiny_reward_model()))


def test_value_head_loads_on_its_own(saved):
    trainer, folder = saved("head")
    loaded = ValueHead.from_pretrained(folder / "critic")
    assert changed(loaded, snapshot(trainer.critic)) == set()
    assert loaded.score.weight.any()  # it starts at 0
    states = torch.randn(5, 16)
    torch.testing.assert_close(loaded(states), states @ loaded.score.weight[0] + loaded.score.bias)
    assert json.loads((folder / "critic" / "config.json").read_text()) == {"hidden_size": 16}


def test_saved_critic_continues_as_value_model(saved, tmp_path):
    """The new run's first value loss is that of the saved critic, not of a copy of the reward model."""
    trainer, folder = saved("full")
    again = ppo_trainer(tmp_path, {"model": str(folder), "value_model": str(folder / "critic")})
    assert changed(again.critic, snapshot(trainer.critic)) == set()
    assert changed(again.critic.model, snapshot(tiny.tiny_reward_model()))


def test_saving_elsewhere_leaves_the_output_folder_alone(tmp_path):
    trainer = ppo_run(tmp_path / "run", max_steps=1)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "run" / "README.md").exists()
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere", output_loading_info=True)
    assert not any(loading.values())
    assert (tmp_path / "elsewhere" / "critic" / "model.safetensors").is_file()


# --- the best checkpoint


@pytest.mark.parametrize("kind", ["full", "adapter", "head", "two adapters"])
def test_best_checkpoint_by_held_out_score_is_loaded_at_the_end(tmp_path, kind):
    models = {"reward_model": None, "reward_funcs": best_after_two_steps}
    if "adapter" in kind:
        models["peft_config"] = lora()
    critic = {"head": "head", "two adapters": "adapter"}.get(kind, "model")
    trainer, kept = run_to_best_checkpoint(tmp_path, models, critic=critic)
    assert trainer.state.best_metric == 0.0
    assert changed(trainer.model, kept[2]) == set()  # actor and critic
    of_critic = {name for name in kept[2] if "critic." in name}
    trained = [name for name in of_critic if re.search("score(?!.*original)", name)]
    assert trained
    assert not any(torch.equal(kept[2][name], kept[6][name]) for name in trained)


# --- the log


def test_checkpoint_holds_a_state_that_json_can_read(saved):
    trainer, folder = saved("full")
    state = json.loads(
        (folder / "checkpoint-4" / "trainer_state.json").read_text(),
        parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"),
    )
    assert [line for line in state["log_history"] if "loss" in line] == log_lines(trainer)
