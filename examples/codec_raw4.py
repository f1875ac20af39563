"""A codec from outside: four bits a number, two in a byte, one scale a token and head.

python examples/codec_raw4.py
"""

import torch

from kv_strategies import Preset, Request, Runner, build, register
from kv_strategies.base import Codec
from kv_strategies.models import load_model


class Raw4(Codec):
    def planes(self, num_kv_heads, block_size, head_dim, dtype):
        codes = ((num_kv_heads, block_size, head_dim // 2), torch.uint8)
        scales = ((num_kv_heads, block_size), torch.bfloat16)
        return {"k": codes, "v": codes, "k_scale": scales, "v_scale": scales}

    def encode(self, states):
        scale = (states.float().abs().amax(-1) / 7).to(torch.bfloat16)
        codes = (
            (states.float() / scale.float().clamp(min=1e-20)[..., None])
            .clamp(-7, 7)
            .round()
            .to(torch.int8)
            .view(torch.uint8)
        )
        low, high = (codes & 15).chunk(2, dim=-1)
        return low | high << 4, scale

    def decode(self, codes, scale):
        nibbles = torch.cat([codes & 15, codes >> 4], dim=-1).to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles).float() * scale.float()[..., None]


RAW4 = Preset("four bits a number and a scale a token and head; lossy", "codec", Raw4, lossy=True)

if __name__ == "__main__":
    register("raw4", RAW4)
    model, tokenizer = load_model()
    strategy = build("prefix+raw4", model, num_blocks=64)
    prompt = tokenizer("To be, or not to be, that is").input_ids
    (result,) = Runner(model, strategy).generate([Request(prompt, max_new_tokens=12)])
    print(tokenizer.decode(result.token_ids))
    print(f"{strategy.stats()['bytes_per_token']:.0f} bytes a token, by the {strategy.stats()['kernels']} kernels")
