"""Loading a model over several ranks, by Transformers' own plan of tensor parallelism.

    torchrun --nproc-per-node 2 script.py      every process calls load_model() and gets its share of the weights

A Llama folder is read by upstream, each rank its own shards. What has to be made first (random weights, gguf files,
converted ones) is made whole on every rank, the same, and then cut.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from ..step.ranks import ranks_of
from ..step.shards import check_heads, local, sharded_dim

#: How long a rank waits for the others in a collective of gloo, or of NCCL outside of a graph: loading takes minutes.
_TIMEOUT = timedelta(minutes=30)


def is_wanted(asked: bool | None) -> bool:
    """Whether a model is to be spread: where `torchrun` has started several processes, unless told.

    Raises:
        ValueError: asked for, and there is one process.
    """
    if asked and num_ranks() == 1:
        raise ValueError("tp=True takes several processes: start them with torchrun --nproc-per-node N")
    return num_ranks() > 1 and asked is not False


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(device: str | torch.device | None) -> torch.device:
    """Become one of them, and get the device that is this rank's: a GPU each, or the CPU.

    Raises:
        ValueError: another kind of device was asked for than the ranks have, or there are fewer GPUs than ranks here.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and torch.device(device).type != kind:
        raise ValueError(f"tensor parallelism runs on {kind} here, not on {device}: leave the device out")
    own = torch.device(kind)
    if kind == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ['RANK']} has no GPU of its own: {torch.cuda.device_count()} are here. Start as many "
                "ranks, as in torchrun --nproc-per-node gpu"
            )
        own = torch.device(kind, index)
        torch.cuda.set_device(own)
        # NCCL's own watchdog would end the process before it can say which rank is gone: see `step/heartbeat.py`.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if not dist.is_initialized():
        backend, bound = ("nccl", {"device_id": own}) if kind == "cuda" else ("gloo", {})
        dist.init_process_group(backend, timeout=_TIMEOUT, **bound)
    return own


def shards(config: LlamaConfig) -> dict[str, object]:
    """What makes `from_pretrained` read this rank's share.

    Raises:
        ValueError: the ranks cannot share the KV heads evenly.
    """
    check_heads(config, num_ranks())
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=num_ranks())}


@torch.no_grad()
def cut(model: LlamaForCausalLM) -> None:
    """Keep of a model that is whole on every rank this one's share, and let its modules work with the others. Done
    already where upstream has read it so. From here on torch draws the same random numbers on all ranks.
    """
    if ranks_of(model).size == 1:
        config, _, mesh = model.prepare_distribute_model(**shards(model.config))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())  # upstream cuts parameters one by one
        model.maybe_distribute_model(model, config, mesh)
        for parameter in model.parameters():
            if (part := local(parameter)) is not parameter:
                parameter._local_tensor = part.clone()  # else the whole would be held behind it
        if model.config.tie_word_embeddings and sharded_dim(model.model.embed_tokens.weight) == 0:
            model.tie_weights()
    torch.manual_seed(ranks_of(model).random.getrandbits(63))
