"""Critics of all kinds of classes: the head is found, values are right, and saving loses nothing."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

import ppo_runs
import tiny
from families.configs import family_config, family_model, member
from ppo_runs import ppo_run, ppo_trainer
from trl_ext.ppo.roles.critic import ValueModel
from trl_ext.ppo.roles.state_values import StateValues


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(7, 60, (1, length), generator=torch.Generator().manual_seed(0))


def classifier_of(family: str, **overrides) -> nn.Module:
    return family_model(family_config(family, num_labels=1, **overrides), of=AutoModelForSequenceClassification)


@pytest.mark.parametrize("name", ["ctrl", "modernbert-decoder", "llama"])
def test_value_of_a_state_is_the_score_of_the_sequence_up_to_it(name):
    classifier = classifier_of(name)
    ids = ids_of(8)
    with torch.no_grad():
        values = ValueModel(classifier).values(input_ids=ids, attention_mask=torch.ones_like(ids))
        scores = [classifier(input_ids=ids[:, :end]).logits[0, 0] for end in range(1, 9)]
    assert torch.allclose(values[0], torch.stack(scores), atol=1e-5)
    assert values.std() > 1e-3


@pytest.mark.integration
@pytest.mark.parametrize("name", ["ctrl", "modernbert-decoder"])
def test_ppo_copies_a_trunk_whose_classifier_has_no_score_layer(tmp_path, name):
    models = {"model": member(name, 0), "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    trainer = ppo_trainer(tmp_path, models, max_steps=2, gradient_checkpointing=name != "ctrl")
    ids = ids_of(6)
    with torch.no_grad():
        assert trainer.critic.values(input_ids=ids, attention_mask=torch.ones_like(ids)).abs().max() == 0
    before = ppo_runs.snapshot(trainer.critic)
    trainer.train()
    assert any("classifier" in each for each in ppo_runs.changed(trainer.critic, before))
    trainer.save_model()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").state_dict()
    for key, tensor in trainer.critic.model.state_dict().items():
        assert torch.equal(saved[key], tensor), key


@pytest.mark.integration
@pytest.mark.parametrize("critic", ["head", "model"])
def test_critic_of_a_trunk_that_projects_its_states_has_their_width(tmp_path, critic):
    models = {"model": member("opt", 0), "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    trainer = ppo_run(tmp_path, models, critic=critic, max_steps=1)
    head = trainer.critic if critic == "head" else trainer.critic.model
    assert head.score.in_features == 16 < trainer.model.config.hidden_size


@pytest.mark.parametrize(
    "value_model, message",
    [
        (lambda: classifier_of("bert", is_decoder=False), r"BertForSequenceClassification .*reads the tokens that"),
        (lambda: classifier_of("bart", is_decoder=False), r"BartForSequenceClassification .*is an encoder-decoder"),
        (lambda: classifier_of("roberta"), r"RobertaForSequenceClassification.*reads other tokens than the last"),
        (lambda: nn.Linear(2, 2), r"The value model Linear has no `config`"),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_value_model_that_cannot_value_a_state_is_refused_by_name(tmp_path, value_model, message, bf16):
    with pytest.raises(ValueError, match=message):
        ppo_run(tmp_path, {"value_model": value_model()}, bf16=bf16, use_cpu=True)


class Wrapped(nn.Module):
    """A user's reward model: no `save_pretrained`, a head with another name, the trunk as a child."""

    def __init__(self, seed: int = 1, tuple_output: bool = False):
        super().__init__()
        inner = tiny.tiny_reward_model(seed)
        self.config, self.trunk, self.reward_head = inner.config, inner.model, inner.score
        self.also = inner.model  # one trunk under two names

    def forward(self, input_ids, attention_mask):
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.reward_head(states[torch.arange(len(last)), last])


@pytest.mark.integration
def test_users_own_reward_model_class_scores_becomes_the_critic_and_is_saved(tmp_path):
    trainer = ppo_run(tmp_path, {"reward_model": Wrapped()}, max_steps=2, save_strategy="steps", save_steps=1)
    prompt, answer = [8, 9, 10], [11, 12, 2]
    with torch.no_grad():
        expected = tiny.tiny_reward_model(1)(input_ids=torch.tensor([prompt + answer])).logits[0, 0].item()
    (got,) = trainer.reward_funcs[0](prompt_ids=[prompt], completion_ids=[answer])
    assert got == pytest.approx(expected, abs=1e-5)
    other = ValueModel(Wrapped(seed=5))
    other.restore(tmp_path / "checkpoint-2" / "critic")
    for name, parameter in trainer.critic.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name
    again = ppo_trainer(tmp_path, {"reward_model": Wrapped()}, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


class Holding(nn.Module):
    """A user's model that holds a whole classifier; its config has only what the error messages ask for."""

    def __init__(self, seed: int = 1):
        super().__init__()
        self.inner = tiny.tiny_reward_model(seed)
        self.config = PretrainedConfig(vocab_size=64, num_labels=1, pad_token_id=0)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_critic_finds_the_trunk_of_a_classifier_inside_a_users_class():
    model = Holding()
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = model.inner.score(model.inner.model(ids).last_hidden_state)[..., 0]
        found = StateValues(model, "the critic")(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.allclose(found, expected, atol=1e-6)


class Bare(nn.Module):
    """A reward function that is a module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, completions, **kwargs):
        return [self.scale.item() * len(completion) for completion in completions]


class Nameless(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids[:, :1].float()


class PerToken(Wrapped):
    def forward(self, input_ids, attention_mask):
        return self.reward_head(self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)


def test_module_that_takes_completions_is_a_reward_function(tmp_path):
    trainer = ppo_trainer(tmp_path, {"reward_model": None, "reward_funcs": Bare()})
    assert trainer.reward_func_names == ["Bare"]
    assert trainer.reward_funcs[0](prompts=["a"], completions=["four"]) == [pytest.approx(0.4)]


def test_reward_model_without_a_config_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"reward model Nameless has no `config`.*`num_labels=1`"):
        ppo_trainer(tmp_path, {"reward_model": Nameless()})


def test_reward_model_with_a_score_for_every_token_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"\(PerToken\) returns \(1, \d+, 1\) for 1 sequences"):
        ppo_trainer(tmp_path, {"reward_model": PerToken()})


@pytest.mark.integration
@pytest.mark.parametrize(
    "adapter",
    [
        {"trainable_token_indices": [5, 9]},
        {"trainable_token_indices": {"embed_tokens": [5]}, "use_dora": True},
        {"modules_to_save": ["embed_tokens"], "use_rslora": True},
    ],
    ids=["tokens", "tokens and DoRA", "embeddings in full"],
)
def test_adapter_with_more_than_matrices_is_saved_and_restored_beside_a_critic_on_its_base(tmp_path, adapter):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **adapter)
    models = {"peft_config": lora, "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    options = {"critic": "adapter", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    straight = ppo_run(tmp_path, models, max_steps=2, **options)
    trained = {name for name, parameter in straight.model.named_parameters() if parameter.requires_grad}
    again = ppo_trainer(tmp_path, models | {"model": tiny.tiny_actor()}, max_steps=2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert any("embed" in name or "token" in name for name in trained)
    for name in trained:
        assert torch.allclose(again.model.get_parameter(name), straight.model.get_parameter(name), atol=1e-6), name
