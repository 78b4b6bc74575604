"""
Many sequences in one row, shared beginnings once.

    segments    rows of segments, each with at most one parent
    budget      sequences cut into parts of so many tokens
    attention   attention over such rows, piece by piece
    flex        the same in one kernel, on CUDA
    exactness   which models and runs it is not exact for, and why
    probe       whether packed rows give a model its own log-probabilities
    forward     a model's forward over packed rows, and up to which lengths
    scores      a classifier's scores over packed rows
"""
