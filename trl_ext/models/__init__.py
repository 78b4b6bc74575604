"""
Everything that both trainers know of a model, from its folder to its logits.

    loading          arguments and checks before models, adapters and tokenizers are loaded
    saved_adapter    a saved adapter with its base, as the model that a run starts from
    fingerprint      a fingerprint of an adapter's base
    quantization     frozen models in 8 or 4 bits
    precision        arithmetic that fits the device
    rounding         warnings about 16-bit weights
    sharding         DeepSpeed's ZeRO: checks of its file, copies of partitioned models
    adapter_copies   copies of an adapter
    merging          a whole model of a saved adapter and its base
    trainable        refuses a run that would train nothing
    context          the context in tokens
    probe            random sequences to try a model with, and how far rounding moves its answers
    noise            switches off dropout, jitter and whatever else draws random numbers
    sampling         reads a prompt once while sampling, and computes nothing for responses that have ended
    generation       generation from the model's own distribution
    scoring_head     scoring as the model's own forward does
    lm_head          TRL's fused LM head over the positions that are read
    cpu_head         the same on CPUs
"""
