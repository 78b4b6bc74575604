"""A reward model reads what `trl.RewardTrainer` would train it on, and scores the same token."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import RewardTrainer

import four_roles
import tiny
from families.configs import family_config, family_model
from ppo_runs import ppo_trainer
from trl_ext import ImplicitReward
from trl_ext.ppo.data import TokenisedPrompt
from trl_ext.ppo.roles.reward_forms import RewardForm
from trl_ext.ppo.roles.reward_models import TokenScorer


PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN
LINES = PLAIN.replace("<eos>", "<eos>\n")  # as ChatML: what a model is trained to end with is the line's end
OTHER = PLAIN.replace("<|{{ m.role }}|>", "[{{ m.role }}]").replace("<|assistant|>", "[assistant]")
THINKS = (  # as DeepSeek-R1: thoughts are opened by the generation prompt, and taken out of what was answered
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
CORPUS = ["what is the answer, hello world, a small corpus for a tiny tokenizer and some more words"] * 5
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


def bytes_tokenizer(
    template=PLAIN, bos=True, pad="<pad>", corpus=CORPUS, behind=(), first=("<pad>", "<bos>", "<eos>"), size=320
):
    """A byte-level BPE tokenizer; `behind`: special tokens that it puts behind every text itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*first, *ROLES]
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    added = [*(["<bos>"] if bos else []), "$A", *behind]
    ids = [(token, backend.token_to_id(token)) for token in {"<bos>", *behind}]
    backend.post_processor = processors.TemplateProcessing(single=" ".join(added), special_tokens=ids)
    names = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {}) | ({"pad_token": pad} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)
    tokenizer.chat_template = template
    return tokenizer


def another_vocabulary(template=PLAIN, **options):
    return bytes_tokenizer(template, corpus=["other words for the judge, zebra fox"] * 5, size=300, **options)


def save_judge(folder, tokenizer, kind=LlamaForSequenceClassification, config=None, **overrides):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if config is None:
        config = tiny.tiny_config(vocab_size=len(tokenizer), num_labels=1, **(ids | overrides))
    torch.manual_seed(1)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained_on(tokenizer, prompt, answer):
    """The ids of TRL's own trainer for this prompt and this answer."""
    preparer = object.__new__(RewardTrainer)
    rows = Dataset.from_list([{"prompt": prompt, "chosen": answer, "rejected": answer}])
    args = SimpleNamespace(max_length=None, dataset_num_proc=None)
    return RewardTrainer._prepare_dataset(preparer, rows, tokenizer, args, "train")[0]["chosen_ids"]


PROMPTS = {
    "text": ("what is 1 plus 1", " two words"),
    "chat": (
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is it"}],
        [{"role": "assistant", "content": "the answer"}],
    ),
}


def judged(trainer, prompt, answer, ended=True):
    """(ids that the reward model read, its score): of an answer that the actor ended, or that was cut off."""
    tokenizer, seen = trainer.processing_class, []
    is_chat = isinstance(prompt, list)
    if is_chat:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
    words = answer[0]["content"] if is_chat else answer
    ids = tokenizer(words, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
    source = trainer.reward_funcs[0]
    model = source if isinstance(source, PreTrainedModel) else source.model
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"][kwargs["attention_mask"].bool()].tolist()),
        with_kwargs=True,
    )
    score = trainer._calculate_rewards([{"prompt_ids": prompt_ids}], [prompt], [answer], [ids])[0, 0].item()
    hook.remove()
    return seen, score


PAIRS = {  # the actor's tokenizer and the reward model's
    "the same": (bytes_tokenizer(), bytes_tokenizer()),
    "the same, without BOS": (bytes_tokenizer(bos=False), bytes_tokenizer(bos=False)),
    "the same, the template writes BOS": (bytes_tokenizer(WITH_BOS), bytes_tokenizer(WITH_BOS)),
    "the same, lines": (bytes_tokenizer(LINES), bytes_tokenizer(LINES)),
    "the same, thinks": (bytes_tokenizer(THINKS), bytes_tokenizer(THINKS)),
    "another template": (bytes_tokenizer(), bytes_tokenizer(OTHER)),
    "no pad for the actor": (bytes_tokenizer(pad=None), bytes_tokenizer()),
    "pad is eos": (bytes_tokenizer(pad="<eos>"), bytes_tokenizer(pad="<eos>")),
    "pad is eos for the actor": (bytes_tokenizer(pad="<eos>"), bytes_tokenizer()),
    "an end behind every text": (bytes_tokenizer(), bytes_tokenizer(behind=["<eos>"])),
    "another vocabulary": (bytes_tokenizer(), another_vocabulary()),
    "another vocabulary without BOS": (bytes_tokenizer(), another_vocabulary(bos=False)),
    "another vocabulary, template writes BOS": (bytes_tokenizer(), another_vocabulary(WITH_BOS)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_reward_model_reads_what_it_was_trained_on(tmp_path, pair):
    actors, own = PAIRS[pair]
    path = save_judge(tmp_path / "judge", own)
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors)), "reward_model": path}
    trainer = ppo_trainer(tmp_path, models, packing=False)  # the ids are seen in rows of their own
    judge = LlamaForSequenceClassification.from_pretrained(path).eval()
    assert judge.config.pad_token_id == own.pad_token_id
    for kind, ended in product(PROMPTS, (True, False)):
        prompt, answer = PROMPTS[kind]
        expected = trained_on(own, prompt, answer)
        plain = judge(torch.tensor([expected])).logits.item()
        ids, score = judged(trainer, prompt, answer, ended)
        assert own.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(expected)
        assert score == pytest.approx(plain, rel=1e-4, abs=1e-6)


def encoder_tokenizer():
    return another_vocabulary(first=("[PAD]", "<bos>", "<eos>", "[CLS]", "[SEP]"), bos=False, pad="[PAD]")


def test_encoder_reads_its_cls_and_sep_tokens(tmp_path):
    own = encoder_tokenizer()
    own.eos_token = None
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, own.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")]
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(own), num_labels=1, initializer_range=0.5, **sizes)
    path = save_judge(tmp_path / "judge", own, BertForSequenceClassification, config)
    actors = bytes_tokenizer()
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors)), "reward_model": path}
    ids, score = judged(ppo_trainer(tmp_path, models), *PROMPTS["text"])
    expected = own("what is 1 plus 1 two words")["input_ids"]  # RewardTrainer cannot add an end that there is not
    assert own.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    assert ids == expected
    judge = BertForSequenceClassification.from_pretrained(path).eval()
    assert score == pytest.approx(judge(torch.tensor([expected])).logits.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pad", [None, 0, 2])
def test_scores_of_a_padded_batch_are_those_of_each_answer_alone(tmp_path, pad):
    """The score is read where the model's own pad token says: at the last id if it has none."""
    tokenizer = bytes_tokenizer(pad=None)  # the actor's, for which an end token pads
    torch.manual_seed(1)
    config = tiny.tiny_config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=pad)
    judge = LlamaForSequenceClassification(config).eval()
    models = {"processing_class": tokenizer, "model": tiny.tiny_actor(vocab_size=len(tokenizer))}
    trainer = ppo_trainer(tmp_path, models | {"reward_model": judge}, local_rollout_forward_batch_size=4)
    answers = [[40, 41, 42, 2], [50, 2], [60, 61, 62], [70, 0, 71, 0, 2]]
    prompts = [[1, 30, 31], [1, 32], [1, 33, 34, 35, 36], [1, 37]]
    scores = trainer.reward_funcs[0](prompt_ids=prompts, completion_ids=answers)
    with torch.no_grad():
        alone = [
            judge(torch.tensor([p + (a if a[-1] == 2 else [*a, 2])])).logits.item()
            for p, a in zip(prompts, answers, strict=True)
        ]
    assert scores == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert judge.config.pad_token_id == pad  # as it was


KINDS = {"xlnet": True, "bert": False, "gpt2": False}  # classifiers; whether they read padding behind a sequence


def classifier(name, vocab_size):
    both_ways = {"bert": {"is_decoder": False}, "xlnet": {"attn_type": "bi"}}.get(name, {})
    config = family_config(name, vocab_size=vocab_size, num_labels=1, initializer_range=0.3, **both_ways)
    return family_model(config, seed=1, of=AutoModelForSequenceClassification)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_score_does_not_depend_on_a_longer_neighbour(name, precision):
    tokenizer = bytes_tokenizer()
    model = classifier(name, len(tokenizer)).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    if precision == "autocast":  # as accelerate prepares a model
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    scorer = TokenScorer(model, "judge", RewardForm(tokenizer, tokenizer, shares_ids=True), 4)
    scorer.try_padding()
    ids = [[1, 30, 31], [1, 32, 33, 34, 35, 36, 37], [1, 40]]
    answers = [[50, 2], [60, 61, 62, 63, 64, 65, 2], [70, 2]]
    scores = scorer(prompt_ids=ids, completion_ids=answers)
    with torch.no_grad():
        alone = [
            model(torch.tensor([prompt + answer])).logits.item() for prompt, answer in zip(ids, answers, strict=True)
        ]
    close = {"rel": 1e-4, "abs": 1e-5} if precision == "float32" else {"rel": 0.1, "abs": 0.05}
    assert scores == pytest.approx(alone, **close)
    assert scorer.reads_padding is KINDS[name]


@pytest.mark.parametrize("vocabulary", ["the same", "another"])
def test_reward_model_of_a_run_is_asked_whether_it_reads_padding(tmp_path, vocabulary):
    actors = bytes_tokenizer()
    own = bytes_tokenizer() if vocabulary == "the same" else another_vocabulary()
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors))}
    judge = classifier("xlnet", len(own))
    judge.save_pretrained(tmp_path / "judge")
    own.save_pretrained(tmp_path / "judge")
    models["reward_model"] = str(tmp_path / "judge")
    trainer = ppo_trainer(tmp_path, models, critic="head", bf16=False)
    scorer = next(iter(trainer._text_scorers.values()), trainer.reward_funcs[0])
    texts, answers = ["what is it", "hello"], [" two", " a much longer answer of words"]
    alone = [judge(torch.tensor([trained_on(own, *pair)])).logits.item() for pair in zip(texts, answers, strict=True)]
    assert scorer(texts, answers) == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_special_tokens_that_were_sampled_are_read(tmp_path):
    """GRPO's text of an answer lacks them, but a model that shares the vocabulary must see them."""
    tokenizer = bytes_tokenizer(LINES)
    models = {"processing_class": tokenizer, "model": tiny.tiny_actor(vocab_size=len(tokenizer))}
    trainer = ppo_trainer(tmp_path, models | {"reward_model": save_judge(tmp_path / "judge", tokenizer)})
    prompt, _ = PROMPTS["chat"]
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    hello, world = (tokenizer(word)["input_ids"][1:] for word in ("hello", " world"))
    user, end = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id
    answer = [{"role": "assistant", "content": "hello world"}]
    ids = trainer.reward_funcs[0].form(prompt, answer, prompt_ids, [*hello, user, *world, end])
    assert ids == [*prompt_ids, *hello, user, *world, end, *tokenizer("\n", add_special_tokens=False)["input_ids"]]


def test_text_goes_on_from_the_prompt_with_the_space_that_was_sampled(tmp_path):
    """A word-level tokenizer writes no space before the first word of an answer that it decodes alone."""
    own = another_vocabulary()
    trainer = ppo_trainer(tmp_path, {"reward_model": save_judge(tmp_path / "judge", own)})
    words = trainer.processing_class
    prompt_ids, answer_ids = words("the cat is")["input_ids"], words("happy <eos>")["input_ids"]
    answer = words.decode(answer_ids, skip_special_tokens=True)
    assert answer == "happy"
    form = next(iter(trainer._text_scorers.values())).form
    assert form("the cat is", answer, prompt_ids, answer_ids) == trained_on(own, "the cat is", " happy")


def test_token_that_the_reward_model_has_no_embedding_of_is_named():
    """Added to the tokenizer alone: an embedding answers it with an error without a name, on a GPU with an assert."""
    model, tokenizer = tiny.tiny_reward_model(1), tiny.tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    scorer = TokenScorer(model, "judge", RewardForm(tokenizer, tokenizer, shares_ids=False), 4)
    assert len(scorer(["who is it ?"], ["a cat"])) == 1
    with pytest.raises(ValueError, match=rf"'judge' knows {model.config.vocab_size} tokens, .* \('zebra'\)\. Give"):
        scorer(["who is it ?", "who is it ?"], ["a cat", "a zebra"])


def test_reward_model_that_knows_no_template_is_refused_for_conversations(tmp_path):
    own = another_vocabulary(template=None)
    models = {"reward_model": save_judge(tmp_path / "judge", own)}
    ppo_trainer(tmp_path, models)
    with pytest.raises(ValueError, match=r"'judge' has no chat template.*`reward_processing_classes`"):
        ppo_trainer(tmp_path, models | {"train_dataset": tiny.tiny_prompts(8, conversational=True)})


def test_prompts_beyond_the_reward_models_positions_are_refused_before_training(tmp_path):
    own = another_vocabulary()
    config = GPT2Config(vocab_size=len(own), n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1)
    config.pad_token_id = 0
    models = {"reward_model": save_judge(tmp_path / "judge", own, GPT2ForSequenceClassification, config)}
    with pytest.raises(ValueError, match=r"response_length=60` .* the reward model 'judge''s context of 31"):
        ppo_trainer(tmp_path, models, response_length=60)
    trainer = ppo_trainer(tmp_path, models | {"train_dataset": Dataset.from_dict({"prompt": ["a b"] * 8})})
    with pytest.raises(ValueError, match="'judge' reads 32 tokens, and a prompt with its answer has"):
        trainer._calculate_rewards([{}], ["what"], [" is " * 20], [[1]])


def test_reward_adapter_is_read_at_the_pad_token_of_its_training(tmp_path):
    """Its config is the base's, for which the end token pads; its tokenizer is that of its training."""
    base = tmp_path / "base"
    tiny.tiny_actor(pad_token_id=2).save_pretrained(base)
    tiny.tiny_tokenizer().save_pretrained(base)
    adapter = four_roles.save_adapter(str(base), tmp_path / "reward", "SEQ_CLS", 1)
    models = {"model": str(base), "peft_config": four_roles.lora(), "reward_model": adapter}
    trainer = ppo_trainer(tmp_path, models)
    ids = [20, 30, 40, 2]
    judge = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    judge = PeftModel.from_pretrained(judge, adapter).eval()
    judge.config.pad_token_id = tiny.tiny_tokenizer().pad_token_id
    with torch.no_grad():
        at_the_end = judge(torch.tensor([ids])).logits.item()
    assert trainer.reward_funcs[0](prompt_ids=[ids[:2]], completion_ids=[ids[2:]]) == pytest.approx(
        [at_the_end], rel=1e-4
    )


@pytest.mark.parametrize("kind", ["another template", "another vocabulary, another template"])
def test_chats_in_token_ids_are_refused_by_a_reward_model_of_another_template(tmp_path, kind):
    """They would be read as text that the reward model was not trained on."""
    actors = bytes_tokenizer()
    own = bytes_tokenizer(OTHER) if kind == "another template" else another_vocabulary(OTHER)
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors))}
    models["reward_model"] = save_judge(tmp_path / "judge", own)
    chat = actors.apply_chat_template(PROMPTS["chat"][0], add_generation_prompt=True, return_dict=True)["input_ids"]
    text = actors(PROMPTS["text"][0])["input_ids"]

    def made(ids, **more):
        padded = Dataset.from_dict({"input_ids": [ids + [actors.pad_token_id] * 3] * 4})
        return ppo_trainer(tmp_path, models | {"train_dataset": padded} | more)

    with pytest.raises(ValueError, match=r"conversations in `input_ids`.*'judge' has another one.*`prompt`"):
        made(chat)
    made(text)
    own.chat_template = actors.chat_template  # what the error says
    made(chat, reward_processing_classes=own)


def chat_in_ids(actors, prompt, **options):
    ids = actors.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
    return TokenisedPrompt(actors.decode(ids, skip_special_tokens=True), ids)


CLOSES = PLAIN.replace("<eos>", "<|system|>\n")  # as ChatML with an end token of its own: another mark ends a turn


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("vocabulary", ["the same", "another"])
@pytest.mark.parametrize("template", [PLAIN, WITH_BOS, LINES, CLOSES], ids=["plain", "BOS", "lines", "closes"])
def test_chat_in_token_ids_is_read_as_its_messages(template, vocabulary, ended):
    actors = bytes_tokenizer(template)
    own = bytes_tokenizer(template) if vocabulary == "the same" else another_vocabulary(template)
    form = RewardForm(own, actors, shares_ids=vocabulary == "the same")
    messages, answer = PROMPTS["chat"]
    prompt = chat_in_ids(actors, messages)
    end = actors.convert_tokens_to_ids("<|system|>" if template == CLOSES else "<eos>")
    answer_ids = actors(answer[0]["content"], add_special_tokens=False)["input_ids"] + [end] * ended
    assert form.why_unreadable(prompt.input_ids) is None
    ids = form(prompt, answer[0]["content"], prompt.input_ids, answer_ids)
    assert own.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(trained_on(own, messages, answer))


def test_chat_in_token_ids_whose_answer_has_begun_is_a_chat():
    """Such prompts come from an option of the template, or already hold the first words of the answer."""
    actors = bytes_tokenizer(LINES)
    form = RewardForm(another_vocabulary(LINES), actors, shares_ids=False)
    messages, opening = PROMPTS["chat"][0], actors("So: ", add_special_tokens=False)["input_ids"]
    begun = chat_in_ids(actors, messages).input_ids + opening
    answer = [{"role": "assistant", "content": "So: the answer"}]
    ids = form(
        TokenisedPrompt("", begun), "the answer", begun, actors("the answer", add_special_tokens=False).input_ids
    )
    assert ids == trained_on(form.tokenizer, messages, answer)
    assert not form.is_chat([*begun, actors.eos_token_id])  # closed again
    assert not form.is_chat(actors("what is it")["input_ids"])


UNREADABLE = {
    "thoughts are taken out": (lambda: (bytes_tokenizer(THINKS), bytes_tokenizer(THINKS)), "does not write an answer"),
    "other special tokens": (
        lambda: (bytes_tokenizer(WITH_BOS), bytes_tokenizer(WITH_BOS, bos=False)),
        "other special tokens",
    ),
    "no template, another vocabulary": (
        lambda: (bytes_tokenizer(), another_vocabulary(template=None)),
        "'judge' has none",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_chats_in_token_ids_that_would_be_read_otherwise_are_refused(tmp_path, name):
    makers, message = UNREADABLE[name]
    actors, own = makers()
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors))}
    models["train_dataset"] = Dataset.from_dict({"input_ids": [chat_in_ids(actors, PROMPTS["chat"][0]).input_ids] * 4})
    with pytest.raises(ValueError, match=f"conversations in `input_ids`.*{message}.*`prompt`"):
        ppo_trainer(tmp_path, models | {"reward_model": save_judge(tmp_path / "judge", own)})


def test_chats_in_token_ids_are_refused_by_a_function_with_a_chat_template(tmp_path):
    """A policy trained on chats would read them without the marks of their roles."""
    actors = bytes_tokenizer()
    policy, reference = (tiny.tiny_actor(seed, vocab_size=len(actors)) for seed in (0, 1))
    models = {"processing_class": actors, "model": tiny.tiny_actor(vocab_size=len(actors)), "reward_model": None}
    models["reward_funcs"] = ImplicitReward(policy, reference, actors)
    chat, text = chat_in_ids(actors, PROMPTS["chat"][0]).input_ids, actors(PROMPTS["text"][0])["input_ids"]
    for column in ("train_dataset", "eval_dataset"):
        held = {"train_dataset": Dataset.from_dict({"input_ids": [text] * 4})} | {
            column: Dataset.from_dict({"input_ids": [text, chat] * 2})
        }
        with pytest.raises(ValueError, match=rf"`{column}` holds conversations.*'implicit_reward'.*`prompt`"):
            ppo_trainer(tmp_path, models | held)
    ppo_trainer(tmp_path, models | {"train_dataset": Dataset.from_dict({"input_ids": [text] * 4})})
