"""`ImplicitReward` is β (log π_θ(y|x) − log π_ref(y|x)): against the slow oracle, and against DPO's own rewards."""

import math

import pytest
import torch
from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, PreTrainedTokenizerFast, TrOCRConfig

import dpo_runs
import tiny
from trl_ext import ImplicitReward
from trl_ext.cli.commands import score as score_command
from trl_ext.dpo.implicit_reward import pair_logps


BETA = 0.3
PAIR = ("prompt", "chosen", "rejected")


def slow_reward(policy, reference, prompt, completion, tokenizer, beta=BETA):
    """One sequence at a time, from the ids as DPO's training cuts them."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + completion + ("" if completion.endswith("<eos>") else "<eos>"))["input_ids"]
    else:
        prompt_ids = tokenizer(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))[
            "input_ids"
        ]
        ids = tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False))["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    answer = ids[len(prompt_ids) :]
    return beta * (
        dpo_runs.slow_logps(policy, prompt_ids, answer) - dpo_runs.slow_logps(reference, prompt_ids, answer)
    )


def texts():
    data = dpo_runs.tiny_pairs(6)
    return data["prompt"], data["chosen"]


def conversations():
    data = dpo_runs.tiny_chats().select(range(6))
    prompts = data["prompt"][:]
    prompts[1] = [*dpo_runs.said("system", "the cat"), *prompts[1]]
    return prompts, data["chosen"]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("rows", ["text", "conversations"])
def test_reward_equals_the_slow_oracle(rows, batch_size):
    policy, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    tokenizer = tiny.tiny_tokenizer()
    prompts, completions = texts() if rows == "text" else conversations()
    got = ImplicitReward(policy, reference, tokenizer, BETA, batch_size)(prompts, completions)
    expected = [slow_reward(policy, reference, p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_reward_needs_no_pad_token():
    policy, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    expected = ImplicitReward(policy, reference, tiny.tiny_tokenizer(), BETA)(*texts())
    without = tiny.tiny_tokenizer()
    without.pad_token = None
    assert ImplicitReward(policy, reference, without, BETA)(*texts()) == pytest.approx(expected, rel=1e-6)


def test_reward_is_computed_before_there_is_a_trainer(monkeypatch):
    """TRL warns of a completion whose beginning is one token with the prompt's end, by accelerate's logger."""
    MultiProcessAdapter.warning_once.cache_clear()
    monkeypatch.setattr(PartialState, "_shared_state", {})
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tiny.tiny_tokenizer())
    assert math.isfinite(*score(["the ca"], ["t is happy"]))


class Narrow(nn.Module):
    """A causal LM whose forward takes no more than it must."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def trocr(seed=0):
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    config = TrOCRConfig(vocab_size=64, max_position_embeddings=128, init_std=0.3, dropout=0.0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


ALL_LOGITS = {  # whatever is asked for
    "a family that does not read `logits_to_keep`": trocr,
    "a forward that cannot be asked": lambda seed=0: Narrow(dpo_runs.tiny_model(seed=seed)),
    "one that can, under an adapter": lambda seed=0: dpo_runs.with_adapter(dpo_runs.tiny_model(seed=seed)),
}


@pytest.mark.parametrize("kind", ALL_LOGITS)
def test_logits_are_those_of_the_completion_in_every_family(kind):
    policy, reference = ALL_LOGITS[kind](), ALL_LOGITS[kind](seed=1)
    tokenizer = tiny.tiny_tokenizer()
    prompts, completions = texts()
    expected = [slow_reward(policy, reference, p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    got = ImplicitReward(policy, reference, tokenizer, BETA, batch_size=4)(prompts, completions)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(map(abs, expected)) > 0.1
    pairs = [{"prompt": p, "chosen": c, "rejected": "the dog"} for p, c in zip(prompts, completions, strict=True)]
    policy_logps, reference_logps = (pair_logps(model, tokenizer, pairs)[0] for model in (policy, reference))
    assert (BETA * (policy_logps - reference_logps)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("adapter", ["off", "ref"])
def test_reward_of_an_adapter_takes_its_start_as_the_reference(adapter):
    """Without its adapter, or with the adapter "ref" that `DPOTrainerX` left."""
    policy = dpo_runs.with_adapter(dpo_runs.tiny_model())
    reference = dpo_runs.tiny_model()
    if adapter == "ref":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            policy.add_adapter("ref", LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        reference = dpo_runs.tiny_model()
        reference = get_peft_model(reference, LoraConfig(r=2, task_type="CAUSAL_LM"))
        own = dict(policy.named_parameters())
        for name, parameter in reference.named_parameters():
            if ".default." in name:
                parameter.data.copy_(own[name.replace(".default.", ".ref.")])
    tokenizer = tiny.tiny_tokenizer()
    prompts, completions = texts()
    score = ImplicitReward(policy, None, tokenizer, BETA)
    expected = [slow_reward(policy, reference, p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    assert score(prompts, completions) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert policy.active_adapter == "default"


def test_ranking_is_by_reward_the_best_first():
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tiny.tiny_tokenizer())
    answers = ["good", "bad dog", "the cat is happy", "why ?"]
    rewards = score(["the film "] * 4, answers)
    ranking = score.rank("the film ", answers)
    assert sorted(ranking) == [0, 1, 2, 3]
    assert [rewards[i] for i in ranking] == sorted(rewards, reverse=True)


@pytest.mark.parametrize(
    "reference, beta, message",
    [
        *((dpo_runs.tiny_model, beta, r"`beta` is .*; give the β > 0") for beta in (0.0, -1.0, float("nan"))),
        (lambda: None, 0.1, r"no adapter to switch off: give the model that DPO started from"),
        (lambda: dpo_runs.tiny_model(vocab_size=70), 0.1, "vocabulary of 64 tokens and `reference` one of 70"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(reference, beta, message):
    with pytest.raises(ValueError, match=message):
        ImplicitReward(dpo_runs.tiny_model(), reference(), tiny.tiny_tokenizer(), beta)


@pytest.mark.parametrize("place", [0, 1])
def test_model_that_reads_what_follows_is_refused(place):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = [dpo_runs.tiny_model(), dpo_runs.tiny_model()]
    models[place] = BertLMHeadModel(BertConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    with pytest.raises(
        ValueError, match=r"BertLMHeadModel reads the tokens that follow: .* score answers.*is_decoder"
    ):
        ImplicitReward(*models, tiny.tiny_tokenizer())


# --- as the training reads a pair

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<system> ' + tools[0]['name'] + ' <eos> ' }}{% endif %}"
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% if loud %}{{ 'great ' }}{% endif %}{% endif %}"
)


def bos_tokenizer(template=TEMPLATE, pieces=False):
    """One that begins every text with BOS. With `pieces`, words are made of letters, and tokens merge at seams."""
    if pieces:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        corpus = ["the cat is happy and the dog is sad"] * 9
        options = {"special_tokens": tiny.SPECIAL_TOKENS, "show_progress": False}
        backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=64, **options))
    else:
        backend = tiny.tiny_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def test_prompt_that_a_template_has_written_is_refused_as_in_training():
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), bos_tokenizer())
    written = score.tokenizer.apply_chat_template(
        dpo_runs.said("user", "who ?"), tokenize=False, add_generation_prompt=True
    )
    pair = {"prompt": written, "chosen": "a cat", "rejected": "a dog"}
    for ask in (
        lambda: score([written], ["a cat"]),
        lambda: score.of_pairs([written], ["a cat"], ["a dog"]),
        lambda: score.rank(written, ["a cat", "a dog"]),
        lambda: pair_logps(score.policy, score.tokenizer, [pair]),
    ):
        with pytest.raises(ValueError, match="begins with '<bos>', and the tokenizer puts another before it"):
            ask()


CHATS = [("what is it ?", "a cat", "a dog or a bird"), ("who ?", "the dog", "we")]
TRAINED = {  # what a pair is read with -> the tokenizer, the pairs
    "a template that writes BOS": (bos_tokenizer(), [dpo_runs.chat(*texts) for texts in CHATS]),
    "tools": (
        bos_tokenizer(),
        [dpo_runs.chat(*CHATS[0], tools=[{"name": "cat"}]), dpo_runs.chat(*CHATS[1], tools=[{"name": "dog"}])],
    ),
    "tools as JSON": (bos_tokenizer(), [dpo_runs.chat(*texts, tools='[{"name": "book"}]') for texts in CHATS]),
    "keywords of the template": (
        bos_tokenizer(),
        [
            dpo_runs.chat(*texts, chat_template_kwargs={"loud": loud})
            for texts, loud in zip(CHATS, (True, False), strict=False)
        ],
    ),
    "text with BOS": (bos_tokenizer(), [dict(zip(PAIR, texts, strict=False)) for texts in CHATS]),
    "tokens over the seam": (
        bos_tokenizer(pieces=True),
        [
            {"prompt": "the cat is ha", "chosen": "ppy", "rejected": "d"},
            {"prompt": "the dog is", "chosen": " sad", "rejected": "n't"},
            {"prompt": "and the ", "chosen": "cat", "rejected": "dog"},
        ],
    ),
}


def margins_of_training(folder, tokenizer, pairs):
    """(chosen, rejected) rewards of TRL's own trainer, pair by pair."""
    rewards = []
    for pair in pairs:
        models = {"train_dataset": Dataset.from_list([pair]), "processing_class": tokenizer}
        trainer = dpo_runs.dpo_trainer(folder, models, dpo_runs.TRLS, beta=BETA)
        trainer.model.eval()
        with torch.no_grad():
            trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        metrics = trainer._metrics["eval"]
        rewards.append((metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]))
    return [list(side) for side in zip(*rewards, strict=True)]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The tokenized prompt")
@pytest.mark.parametrize("case", TRAINED)
def test_rewards_of_a_pair_are_those_of_trls_trainer(tmp_path, case):
    tokenizer, pairs = TRAINED[case]
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tokenizer, BETA)
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
    prompts, chosen, rejected = (columns.pop(name) for name in PAIR)
    expected = margins_of_training(tmp_path, tokenizer, pairs)
    found = score.of_pairs(prompts, chosen, rejected, **columns)
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    # The command, the callback and PPO's reward function ask the same.
    rows = Dataset.from_list(pairs)
    scored = score_command.score(rows, score)
    assert [row["margin"] for row in scored] == pytest.approx(
        [a - b for a, b in zip(*expected, strict=True)], abs=1e-4
    )
    policy, reference = (pair_logps(model, tokenizer, pairs) for model in (score.policy, score.reference))
    torch.testing.assert_close(BETA * (policy - reference), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    if case != "tokens over the seam":  # where it depends on the other completion
        assert score(prompts, chosen, **columns) == pytest.approx(expected[0], rel=1e-4, abs=1e-5)


def test_ranking_of_a_pair_is_that_of_its_margin():
    """Also where a token of one of the two reaches over the end of the prompt."""
    tokenizer, pairs = TRAINED["tokens over the seam"]
    for seed in range(3):
        score = ImplicitReward(dpo_runs.tiny_model(seed=seed), dpo_runs.tiny_model(seed=9), tokenizer)
        for pair in pairs:
            (good,), (bad,) = score.of_pairs(*([pair[name]] for name in PAIR))
            assert score.rank(pair["prompt"], [pair["chosen"], pair["rejected"]]) == ([0, 1] if good > bad else [1, 0])


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_model_that_gives_nan_is_named(role):
    broken = dpo_runs.tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[8] = float("nan")
    models = {"policy": dpo_runs.tiny_model(), "reference": dpo_runs.tiny_model()} | {role: broken}
    reward = ImplicitReward(**models, tokenizer=tiny.tiny_tokenizer())
    with pytest.raises(ValueError, match=rf"The {role} gives 2 of 2 answers .* being nan of 'good film <eos>'"):
        reward(["good", "good"], [" film", " cat"])


def test_reward_model_read_as_a_language_model_is_refused(tmp_path):
    tiny.tiny_reward_model().save_pretrained(tmp_path)
    head = dpo_runs.AutoModelForCausalLM.from_pretrained(tmp_path)  # its head is a random one
    for policy, reference in ((head, dpo_runs.tiny_model()), (dpo_runs.tiny_model(), head)):
        with pytest.raises(ValueError, match="holds a LlamaForSequenceClassification, which scores text"):
            ImplicitReward(policy, reference, tiny.tiny_tokenizer())
