"""
`rollout_lag`: a vLLM server generates the rollouts to come while the ones before are scored and learned from.

    rollouts   which are asked for, when, and what a checkpoint keeps of them
    server     the requests, made in a thread
    rows       the rows of the rollouts to come, by a second reading of the data
    beside     reward functions, asked while reference and critic score
"""
