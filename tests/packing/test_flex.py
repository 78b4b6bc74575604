"""FlexAttention over shared rows: its blocks against a mask written out, its outputs against dense attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

import attention_families as families
import dpo_runs
import oracles
import segment_trees as trees
from dense_attention import dense, tensors
from pair_forwards import both
from trl_ext.packing import attention, flex
from trl_ext.packing.segments import attention_mask_of


# Without a compiler torch computes the kernel's definition, all scores at once, and warns that it does.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
# As models ask for: grouped; wider queries than values (MLA); wider than the hidden size says (Gemma), with a window;
# with a cap on scores (Gemma 2); with sinks (GPT-OSS).
HEADS_OF_MODELS = [
    attention.Heads(4, 2, 16, 16, None, None),
    attention.Heads(4, 4, 24, 16, 0.3, None),
    attention.Heads(4, 1, 32, 32, 1.0, 200),
    attention.Heads(4, 2, 16, 16, None, 200, softcap=2.0),
    attention.Heads(4, 2, 16, 16, None, None, has_sinks=True),
]


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention)


def block_numbers(counts, which):
    """For each row and block of queries, the set of blocks of keys."""
    return [[set(which[r, 0, i, :n].tolist()) for i, n in enumerate(row[0])] for r, row in enumerate(counts.tolist())]


@trees.some_examples
@given(trees.trees(largest=9), trees.windows)
def test_blocks_of_any_trees_are_those_of_the_mask(rows, window):
    """A block is computed if it has a visible score, and needs no mask if it has only such."""
    mask = attention_mask_of(rows, window)
    width = mask.size(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 4)
        blocks = flex.block_mask_of(rows, window)
    assert (create_mask(blocks.mask_mod, len(mask), 1, width, width, device="cpu") == mask).all()
    in_part = block_numbers(blocks.kv_num_blocks, blocks.kv_indices)
    whole = block_numbers(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    for r, row in enumerate(mask[:, 0]):
        for i, queries in enumerate(row.split(4)):
            pieces = queries.split(4, dim=1)
            some = {j for j, piece in enumerate(pieces) if piece.any()}
            every = {j for j, piece in enumerate(pieces) if piece.all() and piece.shape == (4, 4)}
            assert in_part[r][i] & whole[r][i] == set()
            assert whole[r][i] <= every
            assert some <= in_part[r][i] | whole[r][i]
            if window is None:  # at its far end some blocks turn out to be empty
                assert whole[r][i] == every - {i}
                assert in_part[r][i] | whole[r][i] == some


def test_blocks_spare_what_nobody_sees():
    """Pairs side by side: the blocks between them are left out, and most of a long one's need no mask."""
    rows = trees.packed(trees.side_by_side(trees.pair(1024, 512, 512), trees.pair(1024, 512, 512)))
    blocks = flex.block_mask_of(rows)
    assert blocks.kv_num_blocks.sum() == 2 * 16  # the diagonals
    assert blocks.full_kv_num_blocks.sum() == 2 * (12 * 11 // 2 + 4 * 3 // 2 + 4 * 8)


def test_blocks_beyond_a_window_are_spared_also_where_another_sequence_begins():
    rows = trees.packed([(1000, None), (1048, None)])
    blocks = flex.block_mask_of(rows, window=128)
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks).max() <= 3


@pytest.mark.integration  # torch's definition of the kernel is slow
@trees.few_examples
@given(trees.trees(), st.sampled_from([(2, 2), (4, 2)]), trees.windows, st.sampled_from([None, 0.5]), st.booleans())
def test_flex_over_any_trees_equals_dense_attention(rows, heads, window, softcap, has_sinks):
    leaves, real = [leaf.detach() for leaf in tensors(rows, *heads)], trees.real_tokens(rows)
    sinks = torch.linspace(-1, 2, heads[0], dtype=torch.float64) if has_sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_kernel", lambda: flex_attention)
        got = flex.attend(*leaves, flex.Blocks(rows)[window], 0.7, softcap, sinks)
    expected = dense(*leaves, attention_mask_of(rows, window), 0.7, softcap, sinks)
    torch.testing.assert_close(got[real], expected[real], **oracles.FLOAT64)


def test_a_model_that_attends_by_flex_gives_the_same_log_probabilities(uncompiled):
    _, model, forward = both("llama")
    assert forward.pack() is None
    assert not forward.packing.one_kernel  # on a CPU
    ids = torch.randint(5, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    ids[3:, :4] = ids[:3, :4]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    seen = []
    with torch.no_grad():
        expected = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        forward.packing.one_kernel = True
        flex_attend = flex.attend
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "attend", lambda *args: seen.append(1) or flex_attend(*args))
            got = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    assert len(seen) == model.config.num_hidden_layers
    torch.testing.assert_close(got, expected, **oracles.FLOAT32)


CPU = torch.device("cpu")


def test_a_kernel_that_cannot_run_here_is_a_reason(uncompiled):
    """Three heads of queries cannot share two of keys; newer torch says first that a CPU has no backward of it."""
    heads = attention.Heads(3, 2, 16, 16, None, None)
    reason = flex.why_not([heads], torch.float32, CPU, attention.pieces)
    assert reason.startswith(("ValueError: ", "NotImplementedError: "))


@pytest.mark.parametrize("heads", HEADS_OF_MODELS)
def test_a_kernel_that_computes_something_else_is_a_reason(monkeypatch, heads):
    """It is tried at the heads that a model asks for, of which queries and values may differ in width."""
    asked = []

    def of_pieces(query, key, value, blocks, scaling, softcap, sinks, factor=1.0):
        asked.append((query.size(1), key.size(1), query.size(3), value.size(3), scaling, softcap, sinks is not None))
        return attention.pieces(query, key, value, flex.example(CPU), scaling, heads.window, softcap, sinks) * factor

    monkeypatch.setattr(flex, "attend", of_pieces)
    assert flex.why_not([heads], torch.float32, CPU, attention.pieces) is None
    assert set(asked) == {(*heads[:5], *heads[6:])}
    monkeypatch.setattr(flex, "attend", lambda *args: of_pieces(*args, factor=1.02))
    assert "it is off by" in flex.why_not([heads], torch.float32, CPU, attention.pieces)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS_OF_MODELS)
def test_flex_gives_what_the_pieces_give_on_cuda(heads, dtype):
    assert flex.why_not([heads], dtype, torch.device("cuda"), attention.pieces) is None


@pytest.mark.gpu
def test_rows_of_many_lengths_stay_in_the_kernel_on_cuda():
    """More lengths than torch compiles for one by one; a matrix of all scores would not fit under the limit."""
    for width in range(4096, 4096 + 12 * 77, 77):
        rows = trees.packed(trees.pair(width, 1024, 1024), device="cuda")
        size = rows.input_ids.size(1)
        leaves = [torch.randn(1, 8, size, 64, device="cuda").requires_grad_() for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        flex.attend(*leaves, flex.block_mask_of(rows)).sum().backward()
        assert torch.cuda.max_memory_allocated() < 8 * size**2 * 4


def runs_of(tmp_path, name, weights, monkeypatch, **options):
    """Losses and first gradient of our run by FlexAttention, of ours piece by piece, and of TRL's, in bf16."""
    models = {
        "model": lambda: families.family_in(name, 0).to(weights),
        "ref_model": lambda: families.family_in(name, 1).to(weights),
    }
    runs = {}
    for way, side in {"flex": dpo_runs.OURS, "pieces": dpo_runs.OURS, "TRL": dpo_runs.TRLS}.items():
        with monkeypatch.context() as patch:
            if way == "pieces":
                patch.setattr(flex, "why_not", lambda *args: "not wanted here")
            keep = dpo_runs.KeepGradients()
            made = {key: value() for key, value in models.items()} | {"callbacks": [keep]}
            trainer = dpo_runs.dpo_trainer(tmp_path / way, made, side, bf16=True, **options)
            trainer.train()
        if way != "TRL":
            assert [forward.packing.on for forward in trainer._forwards] == [True, True]
            assert [bool(forward.packing.one_kernel) for forward in trainer._forwards] == [
                way == "flex" and not options["use_cpu"]
            ] * 2
        runs[way] = [line["loss"] for line in dpo_runs.lines(trainer)], keep.steps[0]
    return runs


def assert_near(runs, tolerance):
    for way in ("flex", "pieces"):
        assert runs[way][0] == pytest.approx(runs["TRL"][0], rel=tolerance)
        assert dpo_runs.gradient_difference(runs[way][1], runs["TRL"][1]) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["llama", "mistral_short_window", "values narrower than queries", "heads wider in some layers"]
)
def test_bf16_runs_equal_trl_on_cuda(tmp_path, name, weights, monkeypatch):
    """By FlexAttention and piece by piece, for heads of every width that families have, and a sliding window."""
    assert_near(runs_of(tmp_path, name, weights, monkeypatch, use_cpu=False), 5e-2)
