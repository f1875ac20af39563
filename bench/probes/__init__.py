"""One thing alone, a kernel or a link: what it reaches of this machine's limits, and at which sizes.

| probe                                     | question                                                                 |
|-------------------------------------------|--------------------------------------------------------------------------|
| `python -m bench.probes.kernel_bandwidth` | the decode kernel: its share of the read bandwidth, a sweep of its sizes |
| `python -m bench.probes.linear_bandwidth` | the products of a layer with few rows, beside cuBLAS                     |
| `python -m bench.probes.product_chain`    | the same one after the other, as a decode step runs them                 |
| `python -m bench.probes.offload`          | top-N kernels, streams over the link, steps and tiers of offload         |

What they are held against is measured by `limits.py`.
"""
