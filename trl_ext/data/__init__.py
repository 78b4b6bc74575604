"""
Datasets: their forms, checks and conversions, in the order in which rows are read.

    formats        which of TRL's formats a dataset is in, and what a trainer needs
    conversions    from one format to the other
    rendering      check that the first rows are written as they are meant
    pairs          what pairs must hold, for DPO and reward models
    json_values    any value as JSON can hold it
    cache          the folder of what is downloaded or made once
    demo           a real model and real human ratings, from the package index alone
"""
