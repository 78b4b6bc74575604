"""Critics of every kind of class: their head found, their values right, and never lost when they are saved."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CTRLConfig,
    CTRLForSequenceClassification,
    CTRLLMHeadModel,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertDecoderForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
)

import ppo_runs
import tiny
from ppo_runs import ppo_run, ppo_trainer
from trl_ext.ppo.roles.critic import ValueModel, build_critic
from trl_ext.ppo.roles.state_values import StateValues


IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CTRL = {"n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS = {
    "ctrl": lambda: CTRLConfig(num_labels=1, **CTRL, **IDS),
    "modernbert_decoder": lambda: ModernBertDecoderConfig(num_labels=1, initializer_range=0.2, **SIZES, **IDS),
}
CLASSIFIERS = {
    "ctrl": CTRLForSequenceClassification,
    "modernbert_decoder": ModernBertDecoderForSequenceClassification,
    "llama": LlamaForSequenceClassification,
}
ACTORS = {"ctrl": CTRLLMHeadModel, "modernbert_decoder": ModernBertDecoderForCausalLM}


def made(kind: type, config, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(7, 60, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_value_of_a_state_is_the_score_of_the_sequence_up_to_it(name):
    config = CONFIGS[name]() if name in CONFIGS else tiny.tiny_config(num_labels=1)
    classifier = made(CLASSIFIERS[name], config)
    ids = ids_of(8)
    with torch.no_grad():
        values = ValueModel(classifier)(input_ids=ids, attention_mask=torch.ones_like(ids))
        scores = [classifier(input_ids=ids[:, :end]).logits[0, 0] for end in range(1, 9)]
    assert torch.allclose(values[0], torch.stack(scores), atol=1e-5)
    assert values.std() > 1e-3


@pytest.mark.integration
@pytest.mark.parametrize("name", ACTORS)
def test_ppo_copies_a_trunk_whose_classifier_has_no_score_layer(tmp_path, name):
    actor = made(ACTORS[name], CONFIGS[name]())
    models = {"model": actor, "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    trainer = ppo_trainer(tmp_path, models, max_steps=2, gradient_checkpointing=name != "ctrl")
    ids = ids_of(6)
    with torch.no_grad():
        assert trainer.critic(input_ids=ids, attention_mask=torch.ones_like(ids)).abs().max() == 0
    before = ppo_runs.snapshot(trainer.critic)
    trainer.train()
    assert any("classifier" in each for each in ppo_runs.changed(trainer.critic, before))
    trainer.save_model()
    saved = CLASSIFIERS[name].from_pretrained(tmp_path / "critic").state_dict()
    for key, tensor in trainer.critic.model.state_dict().items():
        assert torch.equal(saved[key], tensor), key


def opt(width: int = 8) -> OPTForCausalLM:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return made(OPTForCausalLM, OPTConfig(word_embed_proj_dim=width, max_position_embeddings=64, **sizes, **IDS))


@pytest.mark.integration
@pytest.mark.parametrize("critic", ["head", "model"])
def test_critic_of_a_trunk_that_projects_its_states_has_their_width(tmp_path, critic):
    models = {"model": opt(), "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    trainer = ppo_run(tmp_path, models, critic=critic, max_steps=1)
    head = trainer.critic if critic == "head" else trainer.critic.model
    assert head.score.in_features == 8


BERT = BertConfig(num_labels=1, is_decoder=False, **SIZES, **IDS)
BART = BartConfig(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    num_labels=1,
    **IDS,
)


@pytest.mark.parametrize(
    "value_model, message",
    [
        (lambda: made(BertForSequenceClassification, BERT), r"BertForSequenceClassification .*reads the tokens that"),
        (lambda: made(BartForSequenceClassification, BART), r"BartForSequenceClassification .*is an encoder-decoder"),
        (lambda: nn.Linear(2, 2), r"The value model Linear has no `config`"),
    ],
)
def test_value_model_that_cannot_value_a_state_is_refused_by_name(tmp_path, value_model, message):
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, {"value_model": value_model()})


class Wrapped(nn.Module):
    """A reward model of a user: no `save_pretrained`, its head under another name, its trunk a child."""

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
def test_reward_model_of_ones_own_scores_is_copied_as_the_critic_and_survives_saving(tmp_path):
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
    """A model of a user that holds a whole classifier; its config says what an error asks for, and no more."""

    def __init__(self, seed: int = 1):
        super().__init__()
        self.inner = tiny.tiny_reward_model(seed)
        self.config = PretrainedConfig(vocab_size=64, num_labels=1, pad_token_id=0)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_trunk_of_a_classifier_within_a_class_of_ones_own_is_the_classifiers():
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
    straight = ppo_run(tmp_path, models, max_steps=3, **options)
    trained = {name for name, parameter in straight.model.named_parameters() if parameter.requires_grad}
    again = ppo_trainer(tmp_path, models | {"model": tiny.tiny_actor()}, max_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("embed" in name or "token" in name for name in trained)
    for name in trained:
        assert torch.allclose(again.model.get_parameter(name), straight.model.get_parameter(name), atol=1e-6), name


def test_critic_of_a_causal_model_without_a_classifier_says_so():
    with pytest.raises(ValueError, match="writes text and has no score head"):
        build_critic("model", tiny.tiny_actor(), tiny.tiny_actor(1), None, {})
