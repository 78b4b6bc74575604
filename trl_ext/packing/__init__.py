"""
Many sequences in one row, shared beginnings once.

    segments    rows [common | chosen | rejected]
    attention   attention over such rows, piece by piece
    flex        the same in one kernel, on CUDA
    exactness   which models and runs it is not exact for, and why
"""
