"""TensorFlow's ways to keep K and V: one Llama decoder over the weights of a model folder, greedy, a prompt at a time.

| way          | K and V                                                | what runs                                |
|--------------|--------------------------------------------------------|------------------------------------------|
| `eager`      | tensors, concatenated at every step                    | operation by operation                   |
| `variable`   | a `tf.Variable` of full length, a slice of it assigned | one `tf.function` for prompts and steps  |
| `two graphs` | the same                                               | one for prompts, one for steps           |
| `while loop` | the same                                               | one for all: prompt and `tf.while_loop`  |
| `xla`        | the same, but a step's places are scattered            | two, the step with `jit_compile=True`    |

The math is that of `modeling_llama.py`; K and V are [Hkv, tokens, D], keys rotated. A place behind a query, not written
yet or left by an earlier prompt, is masked. Guides: tensorflow.org/guide/function, tensorflow.org/xla.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import tensorflow as tf
from safetensors import safe_open
from transformers import LlamaConfig

Generate = Callable[[Sequence[int], int], list[int]]  # a prompt and how many new tokens -> these
Step = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # token ids [T] and the position of the first -> the next token [1]

# Traced as it was imported: AutoGraph would read the source file again, which may have been edited meanwhile.
graph = partial(tf.function, autograph=False)
IDS, ID, POSITION = (tf.TensorSpec(shape, tf.int32) for shape in ([None], [1], []))


def use(cores: Iterable[int], threads: int) -> None:
    """Before anything runs: no GPU, and so many threads, on all of these cores.

    Threads stay on the cores of the one that starts them, and where the environment has OpenMP bind threads, torch has
    bound that one to a single core.
    """
    os.sched_setaffinity(0, cores)
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


class Llama:
    """The decoder of a folder with `config.json` and safetensors, in float32.

    Raises:
        ValueError: no such folder, or a Llama with what this decoder leaves out.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} is no folder with safetensors, which is all that the TensorFlow peer reads")
        given = LlamaConfig.get_config_dict(folder)[0]
        self.config = config = LlamaConfig.from_dict(given)
        rope = config.rope_parameters
        if given["model_type"] != "llama" or rope["rope_type"] != "default" or config.hidden_act != "silu":
            raise ValueError(f"{folder}: the TensorFlow peer knows Llama with plain rotary embedding and silu")
        if config.attention_bias or config.mlp_bias:
            raise ValueError(f"{folder}: the TensorFlow peer knows no biases")
        self.weights = {}
        for path in files:
            with safe_open(path, framework="tf") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    self.weights[name] = tf.cast(file.get_tensor(name), tf.float32)
        if config.tie_word_embeddings:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]
        self.frequencies = rope["rope_theta"] ** -(tf.range(0.0, config.head_dim, 2.0) / config.head_dim)  # [D / 2]

    def __call__(self, ids: tf.Tensor, start: tf.Tensor | int, cache: Concatenated | Preallocated) -> tf.Tensor:
        """The likeliest token [1] behind `ids` [T], of which the first stands at position `start`."""
        positions = start + tf.range(tf.shape(ids)[0])
        angles = tf.cast(positions, tf.float32)[:, None] * self.frequencies
        rotary = tf.cos(angles), tf.sin(angles)  # [T, D / 2] each
        x = tf.gather(self.weights["model.embed_tokens.weight"], ids)  # [T, hidden]
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}"
            h = self.norm(x, f"{at}.input_layernorm")
            q, k, v = (self.heads(self.linear(h, f"{at}.self_attn.{name}_proj")) for name in "qkv")
            k, v = cache.update(layer, rotate(k, *rotary), v, start)
            x += self.linear(attend(rotate(q, *rotary), k, v, positions), f"{at}.self_attn.o_proj")
            h = self.norm(x, f"{at}.post_attention_layernorm")
            gate, up = (self.linear(h, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
            x += self.linear(tf.nn.silu(gate) * up, f"{at}.mlp.down_proj")
        logits = self.linear(self.norm(x[-1:], "model.norm"), "lm_head")  # [1, vocabulary]
        return tf.argmax(logits, axis=-1, output_type=tf.int32)

    def linear(self, x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.matmul(x, self.weights[f"{name}.weight"], transpose_b=True)

    def norm(self, x: tf.Tensor, name: str) -> tf.Tensor:
        mean = tf.reduce_mean(tf.square(x), axis=-1, keepdims=True)
        return self.weights[f"{name}.weight"] * (x * tf.math.rsqrt(mean + self.config.rms_norm_eps))

    def heads(self, x: tf.Tensor) -> tf.Tensor:
        """[T, heads * D] -> [heads, T, D]"""
        x = tf.reshape(x, [-1, x.shape[1] // self.config.head_dim, self.config.head_dim])
        return tf.transpose(x, [1, 0, 2])


def rotate(x: tf.Tensor, cos: tf.Tensor, sin: tf.Tensor) -> tf.Tensor:
    a, b = tf.split(x, 2, axis=-1)
    return tf.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """q [Hq, T, D] at `positions` [T], k and v [Hkv, S, D] from position 0 on -> [T, Hq * D]."""
    (num_heads, _, head_dim), num_kv_heads = q.shape, k.shape[0]
    num_tokens, length = tf.shape(q)[1], tf.shape(k)[1]
    q = tf.reshape(q, [num_kv_heads, -1, head_dim])  # query heads of one group, one below the other
    scores = tf.matmul(q, k, transpose_b=True) * head_dim**-0.5
    scores = tf.reshape(scores, [num_heads, num_tokens, length])
    weights = tf.nn.softmax(tf.where(tf.range(length) <= positions[:, None], scores, float("-inf")))
    out = tf.matmul(tf.reshape(weights, [num_kv_heads, -1, length]), v)
    out = tf.transpose(tf.reshape(out, [num_heads, num_tokens, head_dim]), [1, 0, 2])
    return tf.reshape(out, [num_tokens, num_heads * head_dim])


class Concatenated:
    """K and V as tensors, each step's new ones behind those before: all are copied at every step."""

    def __init__(self, config: LlamaConfig) -> None:
        self.k, self.v = ([None] * config.num_hidden_layers for _ in "kv")

    def update(self, layer: int, k: tf.Tensor, v: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if self.k[layer] is not None:
            k, v = tf.concat([self.k[layer], k], axis=1), tf.concat([self.v[layer], v], axis=1)
        self.k[layer], self.v[layer] = k, v
        return k, v


class Preallocated:
    """K and V as variables of full length, updated in place. A prompt known to be the first (`start` is the number 0,
    not a tensor) attends to itself alone."""

    def __init__(self, config: LlamaConfig, capacity: int) -> None:
        empty = tf.zeros([config.num_key_value_heads, capacity, config.head_dim])
        self.k, self.v = ([tf.Variable(empty) for _ in range(config.num_hidden_layers)] for _ in "kv")

    def update(self, layer: int, k: tf.Tensor, v: tf.Tensor, start: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
        self.write(self.k[layer], k, start)
        self.write(self.v[layer], v, start)
        return (k, v) if isinstance(start, int) else (self.k[layer].value(), self.v[layer].value())

    def write(self, variable: tf.Variable, new: tf.Tensor, start: tf.Tensor | int) -> None:
        variable[:, start : start + tf.shape(new)[1]].assign(new)


class Scattered(Preallocated):
    """For XLA, which takes the bounds of an assigned slice for constants: it would compile a step for each position."""

    def write(self, variable: tf.Variable, new: tf.Tensor, start: tf.Tensor | int) -> None:
        if new.shape[1] != 1:
            return super().write(variable, new, start)
        num_heads = new.shape[0]
        places = tf.stack([tf.range(num_heads), tf.fill([num_heads], start)], axis=1)  # (head, token)
        variable.scatter_nd_update(places, new[:, 0])


def stepwise(prefill: Step, decode: Step, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Every token comes back before the next step, as under `generate()`."""
    token = prefill(tf.constant(prompt), tf.constant(0))
    tokens = [int(token[0])]
    for position in range(len(prompt), len(prompt) + new_tokens - 1):
        token = decode(token, tf.constant(position))
        tokens.append(int(token[0]))
    return tokens


def eager(model: Llama, capacity: int) -> Generate:
    def generate(prompt: Sequence[int], new_tokens: int) -> list[int]:
        cache = Concatenated(model.config)

        def step(ids, start):
            return model(ids, start, cache)

        return stepwise(step, step, prompt, new_tokens)

    return generate


def variable(model: Llama, capacity: int) -> Generate:
    cache = Preallocated(model.config, capacity)

    @graph(input_signature=[IDS, POSITION])
    def step(ids, start):
        return model(ids, start, cache)

    return lambda prompt, new_tokens: stepwise(step, step, prompt, new_tokens)


def two_graphs(model: Llama, capacity: int, kind: type[Preallocated] = Preallocated, jit: bool = False) -> Generate:
    cache = kind(model.config, capacity)

    @graph(input_signature=[IDS, POSITION])
    def prefill(ids, start):
        return model(ids, 0, cache)

    @graph(input_signature=[ID, POSITION], jit_compile=jit)
    def decode(ids, start):
        return model(ids, start, cache)

    return lambda prompt, new_tokens: stepwise(prefill, decode, prompt, new_tokens)


def while_loop(model: Llama, capacity: int) -> Generate:
    cache = Preallocated(model.config, capacity)

    @graph(input_signature=[IDS, POSITION])
    def loop(prompt, new_tokens):
        def step(count, token, tokens):
            token = model(token, tf.shape(prompt)[0] + count - 1, cache)
            return count + 1, token, tokens.write(count, token)

        first = model(prompt, 0, cache)
        tokens = tf.TensorArray(tf.int32, size=new_tokens, element_shape=[1]).write(0, first)
        _, _, tokens = tf.while_loop(lambda count, *_: count < new_tokens, step, [1, first, tokens])
        return tokens.concat()

    return lambda prompt, new_tokens: loop(tf.constant(prompt), tf.constant(new_tokens)).numpy().tolist()


def xla(model: Llama, capacity: int) -> Generate:
    return two_graphs(model, capacity, Scattered, jit=True)


#: Name -> what makes a generator of a model and of the most tokens, prompt and new, that it is to hold.
WAYS: dict[str, Callable[[Llama, int], Generate]] = {
    "eager": eager,
    "variable": variable,
    "two graphs": two_graphs,
    "while loop": while_loop,
    "xla": xla,
}
