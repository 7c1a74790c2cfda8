"""
Train GPT-2 from scratch: one file, read top to bottom.

    python train_gpt2.py --preset demo                              # any laptop: no GPU, no data, no network needed
    python train_gpt2.py                                            # GPT-2 124M on FineWeb-Edu, one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py          # the same on eight

Every knob is a field of TrainConfig: edit it there, or pass it as a flag of the same name.
The data come from fineweb.py, the HellaSwag score from hellaswag.py.

Measured: the demo's validation loss falls from 10.74 to 5.35 in 75 s on 2 CPU cores (torch 2.13.0, one run); GPT-2 124M
trains at 531,000 tokens/s, MFU 42.9%, on one H200 (torch 2.11.0, bfloat16, compile, 5 steps of a 20-step run), before
the residual stream went to 16 bits, which made the step alone 1.05 times as fast there.
"""

import argparse
import contextlib
import functools
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hellaswag
from lib import checkpoint as durable
from lib import machine
from lib.common import InputError, front_door, get_tokenizer, lock_folder
from lib.shards import build_missing, find_shards, open_shard, read_manifest
from lib.signals import StopRun, stop_signals

# -----------------------------------------------------------------------------
# Knobs


@dataclass
class TrainConfig:
    # where things are
    data_dir: str = "edu_fineweb10B"  # folder of token shards, made by fineweb.py
    data_source: str = ""  # what fineweb.py builds a missing data_dir from; "" = nothing, missing data are an error
    log_dir: str = "log"  # log.txt and checkpoints
    init_from: str = "scratch"  # scratch | resume | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint's path
    # model: GPT-2 124M
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304  # GPT-2 has 50257 tokens; a multiple of 128 is faster, and the rows above are never used
    sequence_length: int = 1024  # tokens
    # batch and schedule: 19,073 steps of 2^19 tokens are 10 billion; sizes and rates as in the GPT-3 paper
    total_batch_size: int = 524288  # tokens an optimizer step, over all ranks and micro-batches
    micro_batch_size: int = (
        64  # sequences a forward pass on one rank, at most; fewer where memory or batch is too small
    )
    max_steps: int = 19073  # optimizer steps
    warmup_steps: int = 715  # steps of linear warm-up: 375M tokens
    max_lr: float = 6e-4
    min_lr_ratio: float = 0.1  # the cosine ends at this share of max_lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    # evaluation and output, every so many steps; 0 switches the thing off
    val_every: int = 250
    val_tokens: int = 10485760  # tokens a validation, over all ranks
    hellaswag_every: int = 250
    sample_every: int = 250
    sample_prompt: str = "Hello, I'm a language model,"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3  # so many of the newest stay on disk
    # machine
    seed: int = 1337  # of the initial weights, the data order and the samples
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32; auto: 16 bits on CUDA, float32 elsewhere
    compile: bool | None = None  # torch.compile; None: on for CUDA, off elsewhere
    activation_checkpointing: bool | None = None  # less memory for a second forward; None: where nothing else fits
    max_nonfinite: int = 5  # stop after so many steps in a row without a finite loss and gradient
    collective_timeout: int = 600  # seconds until ranks that wait for a dead or hung one give up


PRESETS = {
    "gpt2": {},  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, micro_batch_size=32),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, micro_batch_size=16),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, micro_batch_size=8),  # 1558M
    "demo": dict(  # 7M, most of it vocabulary, on the documentation of Python and NumPy: two minutes on two CPU cores
        data_dir="demo_data", data_source="demo", log_dir="demo_log", n_layer=4, n_head=4, n_embd=128, max_lr=3e-3,
        sequence_length=128, total_batch_size=1024, micro_batch_size=4, max_steps=150, warmup_steps=20, val_every=50,
        val_tokens=16384, hellaswag_every=0, sample_every=150, sample_prompt="Return the", checkpoint_every=75,
    ),
}  # fmt: skip


def parse_args(argv=None):
    """The command line as a TrainConfig: the defaults, the preset's overrides, then the flags."""
    parser = argparse.ArgumentParser(description="Train GPT-2", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="a named set of overrides (default: gpt2)")
    for field in fields(TrainConfig):
        kind = {"action": argparse.BooleanOptionalAction} if field.type == bool | None else {"type": field.type}
        parser.add_argument(f"--{field.name}", help=f"default: {field.default!r}", **kind)
    flags = vars(parser.parse_args(argv))
    return TrainConfig(**{**PRESETS[flags.pop("preset")], **flags})


def check_config(c, world_size):
    """Raise InputError, with the remedy, for a TrainConfig that cannot run."""
    for field in fields(c):
        least = {"keep_checkpoints": 2}.get(field.name, 0 if field.name.endswith(("_every", "_steps", "seed")) else 1)
        if field.type is int and getattr(c, field.name) < least:
            raise InputError(f"{field.name} is {getattr(c, field.name)}: it must be {least} or more")
    for name, choices in (("device", "auto cuda mps cpu"), ("dtype", "auto bfloat16 float16 float32")):
        if getattr(c, name) not in choices.split():
            raise InputError(f"{name} is {getattr(c, name)!r}: it must be one of {choices}")
    if c.n_embd % c.n_head:
        fit = [n for n in range(1, c.n_embd + 1) if c.n_embd % n == 0]
        raise InputError(f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}: these n_head fit: {fit}")
    rows, rest = divmod(c.total_batch_size, c.sequence_length * world_size)  # sequences of each rank in a step
    if rest or rows % min(rows, c.micro_batch_size):
        fit = [n for n in range(1, rows + 1) if rows % n == 0 and not rest]
        raise InputError(
            f"total_batch_size {c.total_batch_size} is not divisible by micro_batch_size {c.micro_batch_size} x "
            f"sequence_length {c.sequence_length} x {world_size} ranks: these micro-batch sizes fit: {fit or 'none'}"
        )
    sources = ("scratch", "resume", *OPENAI_MODELS)
    if c.init_from not in sources and not Path(c.init_from).is_file():
        raise InputError(f"init_from {c.init_from!r} is no file and none of {', '.join(sources)}")
    if c.vocab_size < 50257 and (c.sample_every or c.hellaswag_every):
        raise InputError(f"vocab_size {c.vocab_size} is below 50257: it needs --sample_every 0 --hellaswag_every 0")


# -----------------------------------------------------------------------------
# Model

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # flash attention, where the device has it
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 was trained with the approximation


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep only what lies between blocks
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: the matrix that embeds tokens also predicts them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's: residual projections are smaller, so that the residual stream does not grow with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1)
            elif name.endswith("wpe.weight"):
                parameter.normal_(0, 0.01)
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0, 0.02 * (2 * self.config.n_layer) ** -0.5)
            else:
                parameter.normal_(0, 0.02)

    def hidden_states(self, idx):
        """All of the model but its head: token ids (B, T) int64 to (B, T, n_embd)."""
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}: shorten it")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):  # 16 bits in the residual stream, too: half of its traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.transformer.h:
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.transformer.ln_f(x.float())  # CUDA's autocast does it by itself, the CPU's does not

    def head(self, x):
        """Hidden states (..., n_embd) to logits (..., vocab_size): float32 in eval mode, else autocast's type."""
        if self.training:
            return self.lm_head(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.lm_head(x.float())

    def forward(self, idx, targets=None, return_logits=True):
        """Return (logits, loss) for token ids (B, T) int64.

        logits: (B, T, vocab_size), or None without return_logits, which saves their memory and time in training. loss:
        for targets (B, T) int64, the mean cross-entropy in nats per token, a float32 scalar; targets of -100 do not
        count. Raises ValueError where T is larger than block_size.
        """
        x = self.hidden_states(idx)
        if targets is not None and not return_logits and x.device.type == "cpu":
            return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return (logits if return_logits else None), loss

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's weights from the Hugging Face hub: gpt2 (124M), gpt2-medium, gpt2-large or gpt2-xl."""
        if name not in OPENAI_MODELS:
            raise InputError(f"unknown model {name!r}: choose one of {', '.join(OPENAI_MODELS)}")
        try:
            from transformers import GPT2LMHeadModel

            theirs = GPT2LMHeadModel.from_pretrained(name)
        except (ImportError, OSError) as error:
            raise InputError(f"cannot load {name}: it takes pip install transformers and a network: {error}") from None
        c, weights = theirs.config, theirs.state_dict()
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        for key, own in model.state_dict().items():
            # OpenAI's linear layers were 1x1 convolutions, with weights (in, out) where nn.Linear has (out, in)
            is_linear = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            own.copy_(weights[key].t() if is_linear else weights[key])
        return model

    def flops_per_token(self):
        """6N + 6LCT as in llm.c: 6 operations a weight, without the positions, and the causal half of attention."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * weights + 6 * c.n_layer * c.n_embd * c.block_size

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        """AdamW with the GPT-3 paper's betas; weight decay on matrices and embeddings, none on biases and norms."""
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, a chunk of tokens at a time, for CPU.

    The logits of 2,048 tokens take 400 MB, and there allocating and sweeping them costs more than the matrix products.
    All chunks of all steps share one buffer, and as softmax - onehot is the gradient, they compute it on the way.
    """

    buffers = {}  # by vocabulary and type

    @staticmethod
    def forward(ctx, x, weight, targets):
        chunk, w, count = 512, weight.to(x.dtype), (targets >= 0).sum()  # chunk: tokens
        loss, ctx.dx, ctx.dw = x.new_zeros((), dtype=torch.float32), torch.zeros_like(x), torch.zeros_like(w)
        buffer = ChunkedCrossEntropy.buffers.setdefault((len(w), x.dtype), w.new_empty(chunk, len(w)))
        for xs, ys, dxs in zip(x.split(chunk), targets.split(chunk), ctx.dx.split(chunk), strict=True):
            rows = torch.arange(len(xs))
            p = torch.mm(xs, w.t(), out=buffer[: len(xs)])
            p = torch.softmax(p, dim=1, out=p)
            loss -= p[rows, ys.clamp(min=0)].float().clamp(min=1e-38).log()[ys >= 0].sum()
            if ctx.needs_input_grad[0]:
                p[rows, ys.clamp(min=0)] -= 1
                p[rows[ys < 0]] = 0  # by row number: a mask would sweep all of p
                torch.mm(p, w, out=dxs)
                ctx.dw.addmm_(p.t(), xs)
        ctx.dx /= count
        ctx.dw /= count
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        return ctx.dx.mul_(grad), ctx.dw.mul_(grad).float(), None


def load_model(name):
    """A GPT on the CPU, from an OpenAI model name or the path of a checkpoint."""
    if name in OPENAI_MODELS:
        return GPT.from_pretrained(name)
    if not Path(name).is_file():
        raise InputError(f"{name!r} is no checkpoint file and none of {', '.join(OPENAI_MODELS)}")
    checkpoint = durable.load_checkpoint(name)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model


# -----------------------------------------------------------------------------
# Data


class DataLoaderLite:
    """Batches of token shards, in an order that is a pure function of the position.

    The tokens of a split are one stream, cut into rows of T+1 tokens that overlap by one. An epoch of the train split
    visits every row once, in a permutation seeded by (seed, epoch); the val split goes in order. A batch takes the next
    num_processes * B rows, B of them on each rank, so that the same rows follow each other whatever the two are.
    """

    def __init__(self, B, T, process_rank, num_processes, split, data_root="edu_fineweb10B", vocab_size=50304, seed=0):
        self.B, self.T, self.process_rank, self.num_processes = B, T, process_rank, num_processes
        self.split, self.seed = split, seed
        self.paths = find_shards(data_root, split)
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # where each one ends in the stream
        self.num_rows = int(self.ends[-1] - 1) // T
        if self.num_rows == 0:
            raise InputError(f"{data_root}/ has {self.ends[-1]} {split} tokens, too few for {T} + 1: build more")
        for i in range(process_rank, len(self.paths), num_processes):  # the ranks share the reading
            if self.shards[i].max() >= vocab_size:
                at = int(np.argmax(self.shards[i] >= vocab_size))
                raise InputError(
                    f"{self.paths[i]} has token id {self.shards[i][at]} at offset {at}, not below vocab_size "
                    f"{vocab_size}: it is damaged or made with another tokenizer, build it again"
                )
        self.reset()

    def reset(self):
        self.seek(0)

    def seek(self, position):
        """Continue after `position` rows, counted over all ranks and epochs."""
        self.position, self.epoch = position, None

    def describe(self):
        """What tells these shards from others: by name, their token counts and the hashes that a manifest has."""
        manifest = read_manifest(self.paths[0].parent) or {"shards": []}
        hashes = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        return {p.name: [len(shard), hashes.get(p.name)] for p, shard in zip(self.paths, self.shards, strict=True)}

    def row(self, number):
        """Row `number` of the run: T+1 token ids, uint16."""
        epoch, index = divmod(number, self.num_rows)
        if self.split == "train":
            if epoch != self.epoch:  # RandomState rather than default_rng: NumPy promises that its streams never change
                self.epoch, self.order = epoch, np.random.RandomState([self.seed, epoch]).permutation(self.num_rows)
            index = int(self.order[index])
        start, end = index * self.T, (index + 1) * self.T + 1
        first, last = np.searchsorted(self.ends, (start, end - 1), side="right")
        offset = self.ends[first] - len(self.shards[first])
        pieces = self.shards[first : last + 1]  # one, or several where the row crosses from shard to shard
        return (pieces[0] if first == last else np.concatenate(pieces))[start - offset : end - offset]

    def next_batch(self):
        """The next (x, y), both (B, T) int64 on the CPU; y is x shifted by one token."""
        first = self.position + self.process_rank * self.B
        rows = torch.from_numpy(np.stack([self.row(first + i) for i in range(self.B)]).astype(np.int64))
        self.position += self.B * self.num_processes
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# Learning rate, evaluation, sampling


def get_lr(step, config):
    """The learning rate of a step: linear warm-up, cosine to max_lr * min_lr_ratio at max_steps, constant after."""
    min_lr = config.max_lr * config.min_lr_ratio
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return min_lr
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return min_lr + (config.max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate_loss(model, loader, num_rows, device, before_batch=lambda: None):
    """The mean loss in nats per token over the first num_rows rows of the loader, whatever its B and the ranks."""
    model.eval()
    loader.reset()
    total, count = torch.zeros((), device=device), 0
    while loader.position < num_rows:
        before_batch()
        mine = min(loader.B, num_rows - loader.position - loader.process_rank * loader.B)  # rows that count
        x, y = loader.next_batch()
        if mine > 0:
            y[mine:] = -100  # rather than a smaller batch: compiled code keeps its one shape
            _, loss = model(x.to(device), y.to(device), return_logits=False)
            total += loss * mine
            count += mine
    model.train()
    total, count = machine.sum_over_ranks(torch.stack([total, torch.tensor(float(count), device=device)])).tolist()
    return total / count


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
    """Continue token ids (B, T) by sampling max_new_tokens more: (B, T + max_new_tokens)."""
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        hidden = model.hidden_states(idx[:, -model.config.block_size :])
        logits = model.head(hidden[:, -1])[:, :50257] / temperature  # (B, 50257): the padded ids are not tokens
        values, candidates = logits.topk(top_k)
        choice = torch.multinomial(F.softmax(values, dim=-1), num_samples=1, generator=generator)
        idx = torch.cat([idx, candidates.gather(1, choice)], dim=1)
    model.train(was_training)
    return idx


def sample(model, prompt, device, seed, count=3, length=32):
    """Return `count` texts that continue the prompt by `length` tokens; the same seed gives the same texts."""
    idx = torch.tensor([get_tokenizer().encode_ordinary(prompt)] * count, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return [get_tokenizer().decode(row) for row in generate(model, idx, length, generator=generator).tolist()]


# -----------------------------------------------------------------------------
# The run


def accumulate_gradients(model, loader, micro_steps, device, autocast, scaler, synchronize=True):
    """Add the gradients of the mean loss over the loader's next micro-batches; return that loss, a float32 scalar."""
    total = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = (machine.to_device(t, device) for t in loader.next_batch())
        # DDP reads this in its forward: only the last backward sums over the ranks, while it runs
        model.require_backward_grad_sync = synchronize and micro_step == micro_steps - 1
        with autocast():
            _, loss = model(x, y, return_logits=False)
        loss = loss / micro_steps
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def main(config):
    """Train by config, a TrainConfig; under torchrun, as one of its ranks. Returns the last metrics as a dict.

    Raises InputError, before anything is allocated or overwritten, for what the user can put right.
    """
    check_config(config, int(os.environ.get("WORLD_SIZE", 1)))
    log_dir, log_file = Path(config.log_dir), Path(config.log_dir) / "log.txt"
    clock = machine.Stopwatch()
    with (
        machine.distributed(config.device, config.collective_timeout) as (rank, local_rank, world_size, device),
        stop_signals(device) as check_stop,
        contextlib.ExitStack() as held,
    ):
        # a restart by torchrun --max-restarts resumes by itself, also on the machines whose own count is still 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
        resuming = config.init_from == "resume" or machine.sum_over_ranks(restarts).item() > 0
        if not resuming and (log_file.exists() or any(log_dir.glob("model_*.pt"))):
            raise InputError(f"{log_dir}/ holds a run: give --init_from resume, delete it, or give another --log_dir")

        def log(message, record=None):
            """Print the message on rank 0, and append the record to log.txt."""
            if rank == 0:
                print(message, flush=True)
                if record:
                    with open(log_file, "a") as file:
                        file.write(f"{record}\n")

        # data
        T, rows_per_step = config.sequence_length, config.total_batch_size // config.sequence_length
        rows = rows_per_step // world_size
        B = min(config.micro_batch_size, rows)
        if local_rank == 0 and config.data_source:
            build_missing(config.data_source, config.data_dir)
        machine.wait_for_all()
        train_loader, val_loader = (
            DataLoaderLite(B, T, rank, world_size, split, config.data_dir, config.vocab_size, config.seed)
            for split in ("train", "val")
        )
        if train_loader.num_rows < rows_per_step:
            found = f"{config.data_dir}/ has {train_loader.num_rows} training sequences of {T} tokens"
            raise InputError(f"{found}, too few for one step of {rows_per_step}: build more, or lower total_batch_size")
        if rank == 0:
            held.enter_context(lock_folder(log_dir))
        data = {**train_loader.describe(), **val_loader.describe()}
        val_rows = max(1, min(config.val_tokens // T, val_loader.num_rows))
        hella = hellaswag.load(rank, local_rank, world_size, device, T) if config.hellaswag_every else None

        # model: one set of weights and two handles. `compiled` is for the fixed shapes of training and validation,
        # `model` for the changing ones of HellaSwag and sampling, each of which would compile anew
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 tensor cores for what stays float32
        checkpoint = durable.find_checkpoint(log_dir, rank) if resuming else None
        if checkpoint:
            model = GPT(GPTConfig(**checkpoint["config"]))
        elif config.init_from in ("scratch", "resume"):
            model = GPT(GPTConfig(T, config.vocab_size, config.n_layer, config.n_head, config.n_embd))
        else:
            model = load_model(config.init_from)
        model.to(device)
        compiled = torch.compile(model, dynamic=False) if machine.choose_compile(config.compile, device) else model
        trained = DistributedDataParallel(compiled, gradient_as_bucket_view=True) if world_size > 1 else compiled
        optimizer = model.configure_optimizers(config.weight_decay, config.max_lr, device.type)
        dtype = machine.choose_dtype(config.dtype, device)
        autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16's small gradients vanish

        device_name, peak = machine.name_and_peak(device)
        about_mfu = f"\nMFU is 6N + 6LCT a token over {peak} TFLOP/s (datasheet)" if peak else ""
        log(
            f"GPT-2, {sum(p.numel() for p in model.parameters()):,} parameters, on {world_size} x {device_name}, "
            f"{dtype}, compile {'off' if compiled is model else 'on'}, torch {torch.__version__}{about_mfu}"
        )

        # what a checkpoint holds, and where the run goes on
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        state = {"step": 0, "nonfinite": 0, "val_loss": None}
        facts = {"config": asdict(model.config), "train_config": asdict(config), "data": data}
        if checkpoint:
            log(durable.restore(checkpoint, parts, facts, state))
        elif resuming:
            log(f"no checkpoint in {log_dir}/ yet: starting at step 0")
        if rank == 0:
            durable.cut_log(log_file, state["step"])

        # a rehearsal of what a step needs at most: two micro-batches, the second beside the gradients of the first,
        # and room for AdamW's moments
        def rehearse(B, recompute):
            model.zero_grad()
            train_loader.B, model.activation_checkpointing = B, recompute
            _moments = [torch.empty_like(p) for p in 2 * list(model.parameters()) if not optimizer.state]
            accumulate_gradients(trained, train_loader, 2, device, autocast, scaler, synchronize=False)

        B, note = machine.fit_in_memory(rehearse, B, rows, config.activation_checkpointing, device)
        val_loader.B, grad_accum_steps = B, rows // B
        model.zero_grad()
        micro_batches = f"{grad_accum_steps} micro-batches of {B} x {T} on each rank{note}"
        log(f"{config.max_steps} steps of {config.total_batch_size:,} tokens: {micro_batches}")
        first_step, metrics = state["step"], {}
        train_loader.seek(first_step * rows_per_step)

        def save():
            with clock.timing("checkpoints"):
                return rank != 0 or durable.save_checkpoint(log_dir, config.keep_checkpoints, parts, {**facts, **state})

        def due(every):
            return every > 0 and (state["step"] % every == 0 or state["step"] == config.max_steps)

        try:
            for step in range(first_step, config.max_steps + 1):  # inclusive: the last weights are evaluated and saved
                state["step"] = step
                check_stop()
                if state["nonfinite"] >= config.max_nonfinite:
                    raise StopRun(f"not finite in {state['nonfinite']} steps in a row up to step {step - 1}")
                if due(config.val_every):
                    with clock.timing("validation"), autocast():
                        state["val_loss"] = evaluate_loss(compiled, val_loader, val_rows, device, check_stop)
                    log(f"step {step:5d} | val loss {state['val_loss']:.4f}", f"{step} val {state['val_loss']:.4f}")
                if hella is not None and due(config.hellaswag_every):
                    with clock.timing("HellaSwag"), autocast():
                        counts = machine.sum_over_ranks(hellaswag.evaluate(model, hella, device, check_stop))
                    _, right, total = counts.tolist()
                    metrics["hella"] = right / total
                    log(f"step {step:5d} | HellaSwag {right}/{total}", f"{step} hella {right / total:.4f}")
                if rank == 0 and due(config.sample_every):
                    with clock.timing("samples"), autocast():
                        for text in sample(model, config.sample_prompt, device, config.seed):
                            log(f"step {step:5d} | sample {text!r}")
                saved = step == 0 or not due(config.checkpoint_every) or save()
                if step == config.max_steps:
                    break

                # one optimizer step: the gradients of the micro-batches add up to that of the whole batch
                start = time.perf_counter()
                loss = accumulate_gradients(trained, train_loader, grad_accum_steps, device, autocast, scaler)
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
                lr = get_lr(step, config)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = machine.sum_over_ranks(loss).item() / world_size  # .item() waits for the device
                # a NaN would stay in AdamW's moments for good. All ranks see the same sums, so all decide the same;
                # float16's gradients overflow now and then by design, and its scaler skips those updates itself
                finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)
                if finite or scaler.is_enabled():
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
                state["nonfinite"] = 0 if finite else state["nonfinite"] + 1

                seconds = time.perf_counter() - start
                clock["training"] += seconds
                speed, left = config.total_batch_size / seconds, seconds * (config.max_steps - step - 1)
                mfu = f" | MFU {speed * model.flops_per_token() / (world_size * peak * 1e12):.1%}" if peak else ""
                note = "" if finite else " | UPDATE SKIPPED, NOT FINITE"
                log(
                    f"step {step:5d}/{config.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | "
                    f"{seconds * 1000:.2f} ms | {speed:,.0f} tok/s{mfu} | "
                    f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m left{note}",
                    f"{step} train {loss:.6f}",
                )
                metrics["train_loss"] = loss
                if step == first_step:
                    machine.set_timeout(config.collective_timeout)
        except StopRun as reason:
            saved = save()
            if state["nonfinite"] >= config.max_nonfinite:
                raise InputError(f"{reason}: try a lower max_lr or --dtype float32, and --init_from resume") from None
            log(f"{reason}. To go on, give the same command with --init_from resume")
        else:
            log(f"done: {clock}. All is in {log_dir}/")
            if config.checkpoint_every:
                log(f"next: python hellaswag.py -m {log_dir}/model_{step:05d}.pt")
        if not saved:
            raise InputError(f"the last checkpoint could not be saved: make room for it in {log_dir}/ and resume")
        return {"step": state["step"], "val_loss": state["val_loss"], **metrics}


if __name__ == "__main__":
    front_door(main, parse_args())
