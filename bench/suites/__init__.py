"""What is measured: a suite is a folder or a file, a workload a file in it; see `../workload.py` for what that holds.

| suite        | asks                                                                                      |
|--------------|-------------------------------------------------------------------------------------------|
| `default`    | memory, speed and correctness of every strategy and of the native caches                  |
| `equality`   | tokens of 64 ragged prompts, 128 new each, in float32 and on a GPU in bfloat16            |
| `strategies` | what each strategy is for, against what it must reach                                     |
| `evict`      | what a prompt leaves of itself, and what follows: blocks, steps, first tokens, requests at once |
| `cost`       | perplexity, logits and retrieval of every lossy setting                                   |
| `limit`      | decode, prefill and batching held against the limits of the machine, profiles of the step |
| `tensorflow` | TensorFlow's ways to keep K and V, beside torch's and ours, on a CPU                       |

`python -m bench workloads` prints the questions. Accuracy and speed are separate cases. Importing `all.py` makes all of
them known.
"""
