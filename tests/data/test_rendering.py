"""What the first rows would be written as is checked before training: nothing left out, nothing twice, no Python."""

import copy

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors

import dpo_runs
import ppo_runs
import tiny
from reward_runs import reward_trainer
from trl_ext.data import rendering
from trl_ext.data.conversions import to_preference, to_prompts
from trl_ext.data.pairs import check_columns


# Thoughts are cut off, as by DeepSeek-R1's template.
THINKS = tiny.CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
DROPS_SYSTEM = tiny.CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
ALTERNATES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)
WRITES_OUT = tiny.CHAT_TEMPLATE.replace("> ' + message['content'] + ' <", "> ' ~ message['content'] ~ ' <")
KEEPS = tiny.CHAT_TEMPLATE.replace(  # as Qwen 3: thoughts in a block of their own, of the last turn
    "message['content']", "(message['reasoning_content'] or '') + '\n' + message['content']"
)
READS_PARTS = tiny.CHAT_TEMPLATE.replace(
    "message['content']", "(message['content'] if message['content'] is string else message['content'][0]['text'])"
)

ESCAPES = tiny.CHAT_TEMPLATE.replace(  # as Llama 3.1
    "message['content']", "(message['content'] | tojson if message['role'] == 'tool' else message['content'])"
)
TOOLS_AND_PARTS = "{{ tools | tojson }}" + READS_PARTS


def tokenizer(template=tiny.CHAT_TEMPLATE, bos=False):
    made = tiny.tiny_tokenizer()
    made.chat_template = template
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
        )
    return made


def keeps_spaces():
    made = tokenizer(bos=True)
    made.add_tokens([" "])
    return made


def ends_texts(cls=False):
    """A tokenizer that puts EOS behind every text; with a CLS token it is one of an encoder, like RoBERTa's."""
    made = tokenizer()
    made.cls_token = made.bos_token if cls else None
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", made.bos_token_id), ("<eos>", made.eos_token_id)]
    )
    return made


def bos_is_eos():
    """As OPT's tokenizer, which puts its end token before every text."""
    made = tokenizer()
    made.bos_token = made.eos_token
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", made.eos_token_id)]
    )
    return made


def said(role, content, **more):
    return [{"role": role, "content": content, **more}]


def chat(prompt="who is it ?", chosen="a cat", rejected="a dog", role="assistant", system=None, **columns):
    before = [] if system is None else said("system", system)
    return {
        "prompt": before + said("user", prompt),
        "chosen": said("assistant", chosen),
        "rejected": said(role, rejected),
        **columns,
    }


def parts(text):
    return [{"type": "text", "text": text}]


def implicit(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


TEXT = {"prompt": "who is it ? ", "chosen": "a cat", "rejected": "a dog"}
IN_PARTS = chat(parts("who ?"), parts("a cat"), parts("a dog"))
THOUGHT = chat(chosen="<think>good</think>two", rejected="<think>bad</think>three")
REASONED = {"prompt": said("user", "who ?")} | {
    side: said("assistant", word, reasoning_content="so so") for side, word in (("chosen", "cat"), ("rejected", "dog"))
}

LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
CALLED = chat() | {"chosen": said("assistant", "so", tool_calls=[LOOK])}
TOOLS = {"tools": [{"type": "function", "function": {"name": "look"}}]}
CALLS = tiny.CHAT_TEMPLATE.replace(
    "message['content']", "(message.get('tool_calls', []) | tojson) + message['content']"
)

REFUSED = {  # name -> the tokenizer, a pair, what the error says
    "thoughts": (tokenizer(THINKS), THOUGHT, r"leaves out a part of `chosen` of row 0.*'<think>good</think>two'"),
    "thoughts of an implicit prompt": (tokenizer(THINKS), implicit(THOUGHT), "leaves out a part of `chosen`"),
    "equal but for thoughts": (
        tokenizer(THINKS),
        chat(chosen="<think>good</think>two", rejected="<think>bad</think>two"),
        "leaves out a part of `chosen`",
    ),
    "thoughts under a key": (tokenizer(), REASONED, "it says 'so so'"),
    "a call of a tool": (tokenizer(), CALLED, "leaves out `tool_calls` of `chosen` of row 0 .*: 'look' is not"),
    "a call before the answer": (
        tokenizer(),
        chat() | {"prompt": said("user", "who ?") + CALLED["chosen"] + said("tool", "blue")},
        "leaves out `tool_calls` of the prompt",
    ),
    "tools": (tokenizer(), chat() | TOOLS, "leaves out `tools` of row 0 .*: 'look'"),
    "tools as text": (tokenizer(), chat(tools='[{"name": "look"}]'), "leaves out `tools` of row 0 .*: 'look'"),
    "EOS behind the prompt": (ends_texts(), TEXT, r"ends every text with '<eos>', also the prompt of row 0 .*add_eos"),
    "BOS behind a space": (keeps_spaces(), TEXT | {"prompt": " <bos> who ?"}, "puts another before it"),
    "BOS before an answer": (tokenizer(), TEXT | {"rejected": " <bos> a dog"}, "`rejected` of row 0 .* begins with"),
    "parts that do not add up": (
        tokenizer(),
        IN_PARTS,
        r"cannot write row 0 .*to_preference\(dataset\)`.* joins parts",
    ),
    "parts": (
        tokenizer(WRITES_OUT),
        IN_PARTS,
        r"content of the prompt of row 0 .* a list of parts.*`.*to_preference\(dataset\)`",
    ),
    "a system that is dropped": (
        tokenizer(DROPS_SYSTEM),
        chat(system="be kind"),
        "leaves out a part of the prompt.*kind",
    ),
    "a system that is refused": (tokenizer(ALTERNATES), chat(system="be kind"), "cannot write row 0.*not supported"),
    "rejected by the user": (tokenizer(), chat(role="user"), r"`rejected` .* ends with a message of the role 'user'"),
    "rejected by the user, implicit": (
        tokenizer(),
        implicit(chat(role="user")),
        "ends with a message of the role 'user'",
    ),
    "chosen begins with the prompt": (
        tokenizer(),
        chat() | implicit(chat()),
        r"begins with a message of the role 'user' .*to_preference\(dataset\)` takes it off",
    ),
    "text begins with the prompt": (tokenizer(), TEXT | implicit(TEXT), r"would read it twice.*to_preference"),
    "text with BOS": (
        tokenizer(bos=True),
        TEXT | {"prompt": "<bos> who ? "},
        "begins with '<bos>', and the tokenizer",
    ),
    "implicit text with BOS": (
        tokenizer(bos=True),
        implicit(TEXT | {"prompt": "<bos> who ? "}),
        "begins with '<bos>', and the tokenizer",
    ),
    "a message with an end": (tokenizer(), chat(chosen="a cat <eos>"), "is written as text already: 'a cat <eos>'"),
}
ACCEPTED = {
    "chat": (tokenizer(), chat(system="be kind")),
    "implicit chat": (tokenizer(), implicit(chat())),
    "thoughts of an earlier turn": (
        tokenizer(THINKS),
        chat() | {"prompt": said("user", "a") + said("assistant", "<think>b</think>c") + said("user", "d")},
    ),
    "thoughts that are kept": (tokenizer(KEEPS), REASONED),
    "parts that are read": (tokenizer(READS_PARTS), IN_PARTS),
    "tools": (
        tokenizer("{{ tools | tojson }}" + tiny.CHAT_TEMPLATE),
        chat(tools='[{"name": "f"}]') | {"chosen": [{"role": "assistant", "content": ""}]},
    ),
    "several turns": (
        tokenizer(),
        chat() | {"chosen": said("assistant", "a") + said("user", "b") + said("assistant", "c")},
    ),
    "white space": (tokenizer(), chat(chosen="  a cat\n\n", rejected="\ta dog")),
    "text": (tokenizer(bos=True), TEXT),
    "text that ends": (tokenizer(), TEXT | {"chosen": "a cat<eos>"}),
    "calls and tools": (tokenizer("{{ tools | tojson }}" + CALLS), CALLED | TOOLS),
    "EOS behind a text that is scored": (ends_texts(cls=True), TEXT),
    "BOS that is EOS, before no prompt": (bos_is_eos(), {"chosen": "good cat", "rejected": "bad dog"}),
    "turns with BOS of their own": (tokenizer(), TEXT | {"prompt": "<bos> who ? <eos> <bos> it ?"}),
    "a tool's JSON, written as a text of JSON": (
        tokenizer(ESCAPES),
        chat()
        | {"prompt": said("user", "who ?") + said("assistant", "") + said("tool", '{"sky": "so "é"",\n "n": 1}')},
    ),
    "parts that are read beside tools": (tokenizer(TOOLS_AND_PARTS), IN_PARTS | {"tools": '[{"type": "function"}]'}),
    "one answer begins as the prompt does": (tokenizer(), TEXT | {"chosen": "who is it ? a cat"}),
}


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_pair_that_would_not_be_read_as_it_is_meant_is_refused(case, as_stream):
    known, row, message = REFUSED[case]
    rows = Dataset.from_list([copy.deepcopy(row)] * 2)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_columns(rows.to_iterable_dataset() if as_stream else rows, None, lambda: known)


@pytest.mark.parametrize("case", ACCEPTED)
def test_pair_that_is_read_as_it_is_meant_passes(case):
    known, row = ACCEPTED[case]
    check_columns(Dataset.from_list([row] * 2), None, lambda: known)


def test_rows_from_all_over_a_table_are_looked_at():
    rows = [chat()] * 20 + [chat(chosen="a cat <eos>")] * 4
    with pytest.raises(ValueError, match="is written as text already"):
        check_columns(Dataset.from_list(rows), None, tokenizer)
    for rare, known in ((THOUGHT, tokenizer(THINKS)), (CALLED, tokenizer()), (REASONED, tokenizer())):
        with pytest.raises(ValueError, match=r"leaves out .* of row 21 of `train_dataset`"):
            check_columns(Dataset.from_list([chat()] * 21 + [rare] + [chat()] * 30), None, lambda known=known: known)
    wrong_role = [chat()] * 20 + [chat(role="user")] + [chat()] * 20
    with pytest.raises(ValueError, match="`rejected` of row 20 of `train_dataset`"):
        check_columns(Dataset.from_list(wrong_role), None, tokenizer)


@pytest.mark.parametrize("case", ["thoughts", "parts", "text with BOS"])
def test_dpo_checks_before_it_trains(tmp_path, case):
    known, row, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list([row] * 4), "processing_class": known})


PROMPTS = {
    "parts": (
        tokenizer(WRITES_OUT),
        {"prompt": said("user", parts("who ?"))},
        r"a list of parts.*to_prompts\(dataset\)",
    ),
    "a system that is dropped": (
        tokenizer(DROPS_SYSTEM),
        {"prompt": said("system", "be kind") + said("user", "who ?")},
        "leaves out a part of the prompt of row 0",
    ),
    "text with BOS": (tokenizer(bos=True), {"prompt": "<bos> who ?"}, "begins with '<bos>', and the tokenizer"),
    "ids with BOS, behind padding": (
        tokenizer(bos=True),
        {"input_ids": [0, 1, 1, 20], "attention_mask": [0, 1, 1, 1]},
        "begin with '<bos>' .*take one of the two out of the list",
    ),
    "ids with BOS": (
        tokenizer(bos=True),
        {"input_ids": [1, 1, 20]},
        r"`input_ids` of row 0 .* begin with '<bos>' \(1\) twice.*`add_special_tokens=False`",
    ),
    "a message with an end": (tokenizer(), {"prompt": said("user", "<bos> who ?")}, "is written as text already"),
    "numbers": (tokenizer(), {"prompt": 7}, "'prompt' of `train_dataset` holds number; PPO reads text"),
    "lists of text": (tokenizer(), {"prompt": ["a", "b"]}, "'prompt' of `train_dataset` holds list of text"),
    "truth": (tokenizer(), {"prompt": True}, "'prompt' of `train_dataset` holds true or false"),
}


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_that_would_not_be_read_as_it_is_meant_is_refused(tmp_path, case, as_stream):
    known, row, message = PROMPTS[case]
    rows = Dataset.from_list([row] * 8)
    models = {"train_dataset": rows.to_iterable_dataset() if as_stream else rows, "processing_class": known}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ppo_runs.ppo_trainer(tmp_path, models)


def test_prompt_of_ppo_does_not_end(tmp_path):
    with pytest.raises(ValueError, match="ends every text with '<eos>', also the prompt of row 0 of `train_dataset`"):
        ppo_runs.ppo_trainer(tmp_path, {"processing_class": ends_texts()})


def test_dpo_says_that_it_would_learn_what_others_say(tmp_path, caplog):
    both = {side: said("user", "why ?") + said("assistant", side) for side in ("good", "bad")}
    goes_on = said("user", "and ?") + said("assistant", "so")
    row = {"chosen": both["good"] + goes_on, "rejected": both["bad"] + goes_on}
    trainer = dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list([row] * 4)})
    words = trainer._tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
    assert "and ?" in words
    assert "why ?" not in words
    assert "Answers of the train dataset go on over turns of the role user" in caplog.text
    caplog.clear()
    short = [{"chosen": both["good"], "rejected": both["bad"]}] * 4
    dpo_runs.dpo_trainer(tmp_path, {"train_dataset": Dataset.from_list(short)})
    assert "go on over turns" not in caplog.text


# --- columns that are a part of the prompt

ORCA = {"system": "be kind", "question": "who is it ?", "chosen": "a cat", "rejected": "a dog"}
ALPACA = {"instruction": "say who", "input": "it is big", "chosen": "a cat", "rejected": "a dog"}


@pytest.mark.parametrize(
    "row, way, expected",
    [
        (ORCA, {"prompt": "question"}, said("system", "be kind") + said("user", "who is it ?")),
        ({**TEXT, "system_prompt": "be kind"}, {"system": "system_prompt"}, None),
        ({**chat(), "system": "be kind"}, {}, None),
        (ALPACA, {"prompt": "instruction+input"}, "say who\n\nit is big"),
        ({**TEXT, "instruction": "say who"}, {"prompt": "prompt+instruction"}, "who is it ? \n\nsay who"),
    ],
    ids=["system and question", "system_prompt", "system beside messages", "instruction and input", "instruction"],
)
def test_question_that_nobody_reads_is_an_error_with_its_cure(row, way, expected):
    rows = Dataset.from_list([row] * 3)
    with pytest.raises(ValueError, match="Nothing would read") as error:
        check_columns(rows, None, tokenizer)
    assert f"to_preference(dataset{f', {way}' if way else ''})" in str(error.value)
    for dataset in (rows, rows.to_iterable_dataset()):
        cured = to_preference(dataset, way)
        check_columns(cured, None, tokenizer)
        pair = next(iter(cured))
        expected = expected or said("system", "be kind") + said("user", "who is it ?" + " " * (row is not ORCA))
        turns = [] if isinstance(pair["prompt"], str) else [m["content"].strip() for m in pair["prompt"]]
        assert pair["prompt"] == expected or turns == ["be kind", "who is it ?"]
        assert "a cat" in str(pair["chosen"])


ANSWERS = {"chosen": "a cat", "rejected": "the dog"}
QUESTION = "who is it ?"


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("name", ["post", "q", "dialogue", "messages", "of_my_own"])
def test_text_beside_answers_that_have_no_prompt_is_an_error_with_its_cure(name, as_stream):
    row = {name: said("user", QUESTION) if name == "messages" else QUESTION, **ANSWERS, "source": "forum of cats"}
    rows = Dataset.from_list([row] * 3)
    given = rows.to_iterable_dataset() if as_stream else rows
    with pytest.raises(ValueError, match=rf"Nothing would read '{name}', and .* 'who is it \?'") as error:
        check_columns(given, None, tokenizer)
    if name == "messages":  # there is no telling how answers in text go on from it
        assert "one conversation in `prompt`, and the answers as messages of the assistant" in str(error.value)
        return
    assert f"to_preference(dataset, {{'prompt': '{name}'}})" in str(error.value)
    cured = to_preference(given, {"prompt": name})
    check_columns(cured, None, tokenizer)
    assert next(iter(cured)) == {"prompt": QUESTION, **ANSWERS, "source": "forum of cats"}
    check_columns(given.remove_columns(name), None, tokenizer)


def test_reward_training_and_dpo_refuse_answers_without_their_question(tmp_path):
    rows = Dataset.from_list([{"title": "cats", "post": QUESTION, **ANSWERS}] * 4)
    for make in (dpo_runs.dpo_trainer, lambda folder, given: reward_trainer(folder, given["train_dataset"], None)):
        with pytest.raises(ValueError, match=r"Nothing would read 'title' and 'post'.*\{'prompt': 'title\+post'\}"):
            make(tmp_path, {"train_dataset": rows})


METADATA = {"source": "a b", "prompt_id": "x y", "chosen_model": "m n", "score": 0.5, "lang": "en", "label": "good"}


def test_text_that_nothing_reads_beside_a_prompt_is_named_in_one_line(tmp_path, caplog):
    for whole in (TEXT, chat(), implicit(chat())):
        check_columns(Dataset.from_list([whole | METADATA] * 3), None, tokenizer)
        assert caplog.messages == []
        more = {"context": "the story of it", "question": "who is it ?"} if "prompt" in whole else {}
        more |= {"history": [["so", "so"]]}
        check_columns(Dataset.from_list([whole | more] * 3), None, tokenizer)
        assert len(caplog.messages) == 1
        named = "'context', 'history'" if "prompt" in whole else "'history'"
        assert f"Nothing reads the columns {named} of `train_dataset`" in caplog.text
        caplog.clear()


def test_ppo_names_text_that_no_reward_function_could_read(tmp_path, caplog):
    rows = {"train_dataset": Dataset.from_list([{"prompt": "say it again", "input": "good story"}] * 8)}
    said_so = "Nothing reads the columns 'input' of `train_dataset`"
    ppo_runs.ppo_trainer(tmp_path, rows)
    assert caplog.text.count(said_so) == 1
    caplog.clear()
    ppo_runs.ppo_trainer(tmp_path, rows | {"reward_model": None, "reward_funcs": lambda prompts, **_: [0.0] * 8})
    assert said_so not in caplog.text


def test_system_that_is_empty_in_the_first_rows_is_seen():
    for empty, before, after in (("", 40, 3), (None, 40, 3), ("", 2, 1)):
        rows = Dataset.from_list([TEXT | {"system": empty}] * before + [TEXT | {"system": "be kind"}] * after)
        with pytest.raises(ValueError, match=r"Nothing would read 'system'.*'be kind'"):
            check_columns(rows, None, tokenizer)
        assert [len(row["prompt"]) for row in to_preference(rows)] == [1] * before + [2] * after


def test_question_that_the_answers_begin_with_is_no_error():
    row = {"question": "who is it ?", "chosen": "who is it ? a cat", "rejected": "who is it ? a dog", "system": ""}
    check_columns(Dataset.from_list([row] * 2), None, tokenizer)
    prompts = Dataset.from_list([{"prompt": "who ?", "question": "who ?", "system": None}] * 2)
    rendering.check_written_prompts(prompts, "prompts", tokenizer(), None, list)


def test_prompts_get_their_system_turn(tmp_path):
    rows = Dataset.from_list([{"prompt": "who ?", "system": "be kind", "answer": "a cat"}] * 8)
    with pytest.raises(ValueError, match=r"Nothing would read 'system'.*`.*conversions.to_prompts\(dataset\)`"):
        ppo_runs.ppo_trainer(tmp_path, {"train_dataset": rows})
    assert to_prompts(rows)[0] == {"prompt": said("system", "be kind") + said("user", "who ?"), "answer": "a cat"}


def test_conversions_join_parts_and_take_a_repeated_prompt_off():
    in_parts = Dataset.from_list([{"prompt": said("user", parts("who ?"))}])
    assert to_prompts(in_parts)[0] == {"prompt": said("user", "who ?")}
    for row, converted in (
        (IN_PARTS, chat("who ?")),
        (chat() | implicit(chat()), chat()),
        (TEXT | implicit(TEXT), TEXT),
    ):
        assert to_preference(Dataset.from_list([row] * 2))[0] == converted


def test_padding_that_is_the_bos_token_is_no_second_bos(tmp_path):
    """As GPT-2's `<|endoftext|>`, which is BOS, EOS and, in most scripts, the pad token."""
    known = tokenizer()
    known.bos_token = known.pad_token = known.eos_token
    pad = known.pad_token_id
    for row in ({"input_ids": [pad, pad, 20, 21], "attention_mask": [0, 0, 1, 1]}, {"input_ids": [pad, pad, 20, 21]}):
        models = {"train_dataset": Dataset.from_list([row] * 8), "processing_class": known}
        trainer = ppo_runs.ppo_trainer(tmp_path, models)
        assert trainer.train_dataset[0] == row


GREETINGS = [TEXT | {"prompt": "Hello", "chosen": "Hello to you", "rejected": "Hello ."}] + [TEXT] * 3


def test_answers_that_greet_as_their_prompt_does_repeat_no_prompt():
    rows = Dataset.from_list(GREETINGS)
    check_columns(rows, None, tokenizer)
    assert to_preference(rows)[:] == rows[:]
    repeated = [TEXT | implicit(TEXT)] * 4 + [TEXT]
    assert list(to_preference(Dataset.from_list(repeated))) == [TEXT] * 5


def test_repeated_prompt_is_taken_off_whatever_white_space_is_around_it():
    rows = Dataset.from_list([TEXT | {"chosen": "\nwho is it ?\na cat", "rejected": "who is it ?\na dog"}] * 2)
    with pytest.raises(ValueError, match="would read it twice"):
        check_columns(rows, None, tokenizer)
    cured = to_preference(rows)
    check_columns(cured, None, tokenizer)
    assert cured[0] == TEXT | {"chosen": "\na cat", "rejected": "\na dog"}


# --- keyword arguments of the template


@pytest.mark.parametrize("as_stream", [False, True])
def test_each_row_has_its_own_template_arguments_and_none_where_it_has_none(tmp_path, as_stream):
    """A table gives every row the keys of all; a template takes `None` for a value."""
    template = tiny.CHAT_TEMPLATE.replace(
        "{% if add",
        "{% if loud is defined %}{{ 'great ' }}{% endif %}{% if low is defined %}{{ 'dull ' }}{% endif %}{% if add",
    )
    kwargs = [{"loud": True}, None, {"low": False}]
    rows = [chat(chat_template_kwargs=each) for each in kwargs]
    data = Dataset.from_list(rows)
    if as_stream:
        data = IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))
    models = {"train_dataset": data, "processing_class": tokenizer(template)}
    prepared = dpo_runs.dpo_trainer(tmp_path, models, max_steps=1).train_dataset
    texts = [tiny.tiny_tokenizer().decode(row["prompt_ids"] + row["chosen_ids"]) for row in prepared]
    assert [("great" in text, "dull" in text) for text in texts] == [(True, False), (False, False), (False, True)]
