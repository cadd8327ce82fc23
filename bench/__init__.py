"""Benchmarks: every op and every model against its peers and against the limits of the machine they run on.

    alula bench ops     each op at named cases: bandwidth or arithmetic rate, share of the limit, ratio to PyTorch
    alula bench model   a model of a published shape with random weights: prefill and decode, ratio to each peer
    alula bench plot    bar charts of recorded results

The rules of a figure: the result is checked first and a wrong one is not timed; a warm-up; contestants take turns
(A B A B ...); median and quartiles; caches are cold for ops (buffers rotate); machine, threads, versions and commit are
recorded; the limit is measured in the same run.
"""
