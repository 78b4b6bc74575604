"""
What both trainers know of a model, from its folder to its logits.

    loading          what can be known before weights are loaded; tokenizers; the model under PEFT's wrapper
    fingerprint      which base an adapter belongs to
    quantization     frozen models in 8 or 4 bits
    precision        which arithmetic fits the device
    rounding         16-bit weights that are trained in full
    sharding         DeepSpeed's ZeRO: copies, gathers, what its file must say
    adapter_copies   a copy of an adapter beside it
    trainable        refuses a run that would train nothing
    context          how many tokens a model takes
    probe            random sequences to try a model with, and how far rounding moves its answers
    noise            switches off dropout, jitter and whatever else draws random numbers
    generation       generation from the model's own distribution
    scoring_head     scoring as the model's own forward does
    lm_head          TRL's fused LM head over the positions that are read
    cpu_head         the same on CPUs
"""
