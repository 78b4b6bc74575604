"""TRL's formats in the trainers, beside TRL's own trainers; and what is refused before a model is loaded."""

import pytest
from trl import GRPOConfig, GRPOTrainer

import tiny
from dataset_rows import dataset, stream
from dpo_runs import OURS, TRLS, dpo_trainer, tiny_model
from ppo_runs import ppo_run, ppo_trainer, response_lengths
from trl_ext.data.conversions import to_preference, to_prompts


pytestmark = pytest.mark.integration
# Tools and `shout` show in the text.
TEMPLATE = (
    "{% if tools %}{{ 'tree ' * (tools | length) }}{% endif %}{% if shout %}{{ 'great ' }}{% endif %}"
) + tiny.CHAT_TEMPLATE


def tokenizer(template=TEMPLATE):
    made = tiny.tiny_tokenizer()
    made.chat_template = template
    return made


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


TEXTS = [("one two", "good film", "bad film"), ("the cat is", "great", "awful book"), ("why", "yes", "no one")]
STANDARD = [{"prompt": f"{p} ", "chosen": c, "rejected": r} for p, c, r in TEXTS]
CHAT = [{"prompt": user(p), "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in TEXTS]
TOOL = '[{"type": "function", "function": {"name": "tree", "parameters": {}}}]'
FORMATS = {
    "standard": STANDARD,
    "standard, implicit prompt": [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in STANDARD
    ],
    "conversational": CHAT,
    "conversational, implicit prompt": [{s: row["prompt"] + row[s] for s in ("chosen", "rejected")} for row in CHAT],
    "with tools": [row | {"tools": TOOL} for row in CHAT],
    "with template arguments": [row | {"chat_template_kwargs": {"shout": True}} for row in CHAT],
}


# --- DPO


@pytest.mark.parametrize("name", FORMATS)
def test_dpo_prepares_every_format_as_trl_does(tmp_path, name):
    def prepared(side):
        models = {"train_dataset": dataset(*FORMATS[name]), "processing_class": tokenizer()}
        rows = dpo_trainer(tmp_path, models, side=side).train_dataset
        return [[row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows]

    ours = prepared(OURS)
    assert ours == prepared(TRLS)
    assert len(ours) == 3
    text = tokenizer().decode(ours[0][0])
    assert text.startswith({"with tools": "tree", "with template arguments": "great"}.get(name, text[:3]))


# --- PPO

PROMPTS = {
    "text": [{"prompt": p} for p, _, _ in TEXTS],
    "conversation": [{"prompt": user(p)} for p, _, _ in TEXTS],
    "several turns": [{"prompt": user(p) + assistant(c) + user(r)} for p, c, r in TEXTS],
    "an opened answer": [{"prompt": user(p) + assistant(c)} for p, c, _ in TEXTS],
    "prompt and completion": [{"prompt": p, "completion": c} for p, c, _ in TEXTS],
    "preference": [{"prompt": user(p), "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in TEXTS],
    "unpaired preference": [{"prompt": p, "completion": c, "label": True} for p, c, _ in TEXTS],
}


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 2}
    machine = {"report_to": "none", "bf16": False, "use_cpu": True}
    args = GRPOConfig(str(folder), **sizes, **machine, chat_template_kwargs={"shout": True})
    return GRPOTrainer(tiny.tiny_actor(), response_lengths, args, tiny.tiny_prompts(4), processing_class=tokenizer())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROMPTS)
def test_ppo_reads_the_prompts_of_every_format_as_grpo_does(tmp_path, grpo, name):
    rows = PROMPTS[name]
    models = {"train_dataset": dataset(*rows, rows[0]), "processing_class": tokenizer()}
    rollout = ppo_run(tmp_path, models, max_steps=1, chat_template_kwargs={"shout": True}).run_state.rollout
    read = [ids[kept].tolist() for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    expected, *_ = grpo._tokenize_prompts([row["prompt"] for row in [*rows, rows[0]]])
    assert sorted(read) == sorted(expected)
    opening = tiny.VOCABULARY.index("great")
    assert (read[0][0] == opening) is isinstance(rows[0]["prompt"], list)


# --- what is refused, before a model is loaded: the folder does not exist


def ppo_on(tmp_path, **datasets):
    """The tokenizer is here, the model is not."""
    ppo_trainer(tmp_path, {"model": str(tmp_path / "none"), **datasets})


def dpo_on(tmp_path, **datasets):
    dpo_trainer(tmp_path, {"model": str(tmp_path / "none"), **datasets})


@pytest.fixture
def folder(tmp_path):
    """A model's config and tokenizer without its weights."""
    config = tiny.tiny_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "none")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "none")
    return tmp_path


QA = {"question": "what", "good": "yes", "bad": "no"}


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    "name, datasets",
    [
        ("train_dataset", lambda bad, good: {"train_dataset": bad}),
        ("eval_dataset", lambda bad, good: {"train_dataset": good, "eval_dataset": bad}),
        ("near", lambda bad, good: {"train_dataset": good, "eval_dataset": {"near": bad, "far": good}}),
    ],
)
def test_other_columns_are_refused_with_a_mapping(folder, make, name, datasets):
    with pytest.raises(ValueError, match="--columns prompt=question chosen=good rejected=bad") as error:
        dpo_on(folder, **datasets(make(QA, QA), dataset(*STANDARD)))
    assert name in str(error.value).split(" has no column")[0]
    with pytest.raises(ValueError, match="--columns prompt=question`") as error:
        ppo_on(folder, **datasets(make(QA, QA), tiny.tiny_prompts(4)))
    assert name in str(error.value).split(" has no column")[0]


def sharegpt(text):
    return [{"from": "gpt", "value": text}]


MAKES = r"to_preference\(dataset\)` makes"


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "what", "chosen": user("why") + assistant("good"), "rejected": user("why") + assistant("bad")},
            rf"\['prompt'\] hold text and \['chosen', 'rejected'\] conversations; .*{MAKES} turns of the prompts",
        ),
        (
            {"prompt": user("what"), "chosen": sharegpt("good"), "rejected": sharegpt("bad")},
            rf"'chosen' of .* holds list .*{MAKES} that of 'from' and 'value'",
        ),
        ({"prompt": "one", "completion": "two", "label": True}, rf"unpaired preference.*{MAKES} it so"),
    ],
)
def test_dpo_says_what_makes_pairs_of_it(folder, row, message):
    with pytest.raises(ValueError, match=message):
        dpo_on(folder, train_dataset=dataset(row, row))
    if "label" not in row:  # followed to the letter, it can be trained on
        dpo_trainer(folder, {"train_dataset": to_preference(dataset(row, row)), "model": tiny_model()})


def test_conversations_without_a_common_turn_need_a_prompt(folder):
    """TRL would stumble over the empty prompt."""
    row = {"chosen": assistant("good"), "rejected": assistant("bad")}
    with pytest.raises(ValueError, match="`train_dataset` has no column 'prompt', and the conversations of its first"):
        dpo_on(folder, train_dataset=dataset(row, row))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "one", "messages": user("one") + assistant("a")}, r"prompts of text beside \['messages'\]"),
        ({"prompt": user("one"), "chosen": "a", "rejected": "b"}, r"of conversation beside \['chosen', 'rejected'\]"),
        ({"prompt": [{"from": "human", "value": "one"}]}, r"are messages with `from` and `value`"),
    ],
)
def test_ppo_says_what_makes_prompts_of_it(folder, row, message):
    with pytest.raises(ValueError, match=rf"{message}.*trl_ext.data.conversions.to_prompts\(dataset\)`"):
        ppo_on(folder, train_dataset=dataset(*[row] * 4))
    ppo_trainer(folder, {"train_dataset": to_prompts(dataset(*[row] * 4))})


@pytest.mark.parametrize("trainer, rows", [(ppo_on, PROMPTS["conversation"]), (dpo_on, CHAT)], ids=["ppo", "dpo"])
@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_conversations_without_a_chat_template_are_refused(folder, trainer, rows, make):
    with pytest.raises(ValueError, match="of `train_dataset` hold conversations, and the tokenizer has no chat temp"):
        trainer(folder, train_dataset=make(*rows), processing_class=tokenizer(None))


def test_template_is_looked_for_in_the_models_folder(folder):
    (folder / "none" / "chat_template.jinja").unlink()
    tokenizer(None).save_pretrained(folder / "none")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        dpo_on(folder, train_dataset=dataset(*CHAT), processing_class=None)
    with pytest.raises(OSError, match="no file named"):  # the control: text goes on to the weights
        dpo_on(folder, train_dataset=dataset(*STANDARD), processing_class=None)


@pytest.mark.parametrize("trainer", [ppo_on, dpo_on])
def test_stream_of_no_rows_is_refused(folder, trainer):
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        trainer(folder, train_dataset=stream())


def test_images_are_left_to_trl(folder):
    """A vision row is not asked for a chat template of the text tokenizer: TRL says what it needs."""
    rows = dataset(*[row | {"image": [0.0]} for row in CHAT])
    with pytest.raises(ValueError, match="vision"):
        dpo_trainer(folder, {"train_dataset": rows, "processing_class": tokenizer(None)})
