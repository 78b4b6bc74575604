"""Random models for `measure_gpu.py`, built on the device layer by layer: a 33B model never exists unpacked."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.quantizers import AutoHfQuantizer

from trl_ext.planner import load_config


STD = 0.02
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def config_of(name: str) -> PretrainedConfig:
    """The config of a built-in shape, or of a tiny model; `tokenizer` is its tokenizer."""
    config = LlamaConfig(**TINY) if name == "tiny" else load_config(name)
    config.pad_token_id = config.eos_token_id = 0
    config.bos_token_id, config.num_labels = None, 1
    return config


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word: "w7" is token 7; token 0 ends and pads."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str, packed: bool, scored: bool = False) -> Any:
    """
    A model with random weights on `device`.

    Args:
        packed: linear layers but the head in NF4, as `load_in_4bit` loads them.
        scored: a reward model instead of a causal LM.
    """
    auto = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    config = copy.deepcopy(config)  # what is noted in it is this model's
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    head = None if scored else model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if packed and type(child) is nn.Linear and child is not head:
                setattr(module, name, _packed(child, dtype, device))
            else:
                _fill(child, config, device)
    model.tie_weights()
    return _mark_packed(model, dtype) if packed else model


def _packed(layer: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
    """A random layer in place of `layer`, in NF4; its unpacked weights are gone when it returns."""
    has_bias = layer.bias is not None
    with torch.device("meta"):
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
    weight = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device) * STD
    quantised.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    if has_bias:
        quantised.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device))
    return quantised


def _fill(module: nn.Module, config: PretrainedConfig, device: str) -> None:
    """Gives a module's own parameters and buffers storage: norms 1, biases 0, all else random."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            plain = 0.0 if name == "bias" else 1.0
            value = value.fill_(plain) if parameter.dim() == 1 else value.normal_(std=STD)
            setattr(module, name, nn.Parameter(value))
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies are computed, not stored
        with torch.device(device):
            fresh = type(module)(config)
        for name, buffer in fresh.named_buffers(recurse=False):
            module._buffers[name] = buffer


def _mark_packed(model: Any, dtype: torch.dtype) -> Any:
    """Return what transformers notes on a model that it has loaded in 4 bits."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model.config.quantization_config = options
    model.hf_quantizer = AutoHfQuantizer.from_config(options)
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = options.quant_method
    return model


def save_reward_adapter(config: PretrainedConfig, lora: dict[str, Any], folder: Path) -> None:
    """A random reward adapter with its score head, as `trl-ext reward --use_peft` saves one."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    adapter = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora), low_cpu_mem_usage=True)
    state = {n: torch.randn(p.shape) * STD for n, p in get_peft_model_state_dict(adapter).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    adapter.peft_config["default"].save_pretrained(str(folder))
    tokenizer(config.vocab_size).save_pretrained(str(folder))
