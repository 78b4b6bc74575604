"""
Show where the time of one sampled token goes, on the model *wide* of `bench_ppo.py`, by `generate` and by
`trl_ext.models.sampling`.

    python benchmarks/profile_sampling.py
    python benchmarks/profile_sampling.py --vocabulary 500 --tokens 2      # does it run?
"""

import argparse
from collections import Counter
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from trl_ext.models.sampling import sampling_what_counts


# The operators of a part; the head's matrix product is told by the vocabulary in its shapes, all else is the layers'.
NOISE = {"aten::exponential_"}
CHOICE = {"aten::_softmax", "aten::div", "aten::argmax", "aten::amax", "aten::amin", "aten::aminmax", "aten::lt"}
PARTS = ("head", "noise of the draw", "softmax and choice", "layers and all else")


def part_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """Return the part of a token's step that an operator belongs to."""
    if name in NOISE:
        return "noise of the draw"
    if not any(vocabulary in shape for shape in shapes):
        return "layers and all else"
    return "softmax and choice" if name in CHOICE else "head"


def milliseconds(model: Qwen2ForCausalLM, job: argparse.Namespace, is_ours: bool) -> Counter[str]:
    """Return the milliseconds of each part per token of the whole batch, without those of reading the prompts."""
    ids = torch.randint(job.vocabulary, (job.batch, job.prompt))

    def of_tokens(count: int) -> Counter[str]:
        config = GenerationConfig(max_new_tokens=count, do_sample=True, temperature=1.0, top_k=0, pad_token_id=0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
        spent: Counter[str] = Counter()
        with sampling_what_counts(model, model.model, config) if is_ours else nullcontext(), torch.no_grad():
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
                model.generate(**inputs)
        for event in run.key_averages(group_by_input_shape=True):
            spent[part_of(event.key, event.input_shapes, job.vocabulary)] += event.self_cpu_time_total / 1e3
        return spent

    of_tokens(1)  # the first call is slower
    spent = of_tokens(1 + job.tokens)
    spent.subtract(of_tokens(1))
    return Counter({part: time / job.tokens for part, time in spent.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    job = parser.parse_args(argv)
    torch.manual_seed(0)
    widths = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(**widths, num_hidden_layers=2, vocab_size=job.vocabulary, tie_word_embeddings=True)
    ).eval()
    sides = {"`generate`": milliseconds(model, job, False), "`trl_ext`": milliseconds(model, job, True)}
    print(f"| ms per token of {job.batch} rows | {' | '.join(sides)} |")
    print("|---|" + "---:|" * len(sides))
    for part in PARTS:
        print(f"| {part} | " + " | ".join(f"{side[part]:.1f}" for side in sides.values()) + " |")
    print("| total | " + " | ".join(f"{side.total():.1f}" for side in sides.values()) + " |")


if __name__ == "__main__":
    main()
