"""
Train GPT-2 from scratch: one file, read top to bottom.

    python train_gpt2.py --preset demo                              # any laptop: no GPU, no data, no network needed
    python train_gpt2.py                                            # GPT-2 124M on FineWeb-Edu, one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py          # the same on eight

Every setting is a field of TrainConfig: edit it there, or pass it as a flag. What is not the lesson is in lib/.

Measured: the demo's validation loss falls from 10.75 to 4.76 in 100 s on 2 CPU cores (torch 2.13.0, one run).
A step of GPT-2 124M runs at 553,000 tokens/s, MFU 44.7%, on one H200 (torch 2.11.0, bfloat16, compile).
"""

import lib.start  # noqa: F401 - Ctrl-C during the imports below ends the program at once

import math
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fineweb
import hellaswag
from lib import config as configs
from lib import device as devices
from lib import distributed, tokenizer
from lib.console import UserError, print0, run_as_command
from lib.data.folder import TokenStream, open_shards
from lib.data.order import shuffle
from lib.model import load, rehearse
from lib.optimizers import as_one
from lib.run import Run, RunFolder, one_run, seed_step

# -----------------------------------------------------------------------------
# Settings


@dataclass
class TrainConfig:
    # ---- settings that change the result: model, GPT-2 124M; fields that GPTConfig also has are copied into it
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block, n_embd / n_head channels each
    n_embd: int = 768  # channels of the residual stream
    vocab_size: int = 50304  # GPT-2 has 50257 tokens; a multiple of 128 is faster, and the ids above are never sampled
    sequence_length: int = 1024  # tokens per training sequence, and the block_size of a model from scratch
    init_from: str = "scratch"  # scratch | resume | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint or export
    # data
    data_dir: str = "edu_fineweb10B"  # folder of token shards, made by fineweb.py
    data_source: str = ""  # "demo": build data_dir first if it is missing (30 minutes at most); "": never
    # batch and schedule: 19,073 steps of 2^19 tokens are 10 billion; sizes and rates as in the GPT-3 paper
    total_batch_size: int = 524288  # tokens per optimizer step, over all ranks and micro-batches
    max_steps: int = 19073  # optimizer steps
    warmup_steps: int = 715  # steps of linear warm-up; these are 375M tokens
    max_lr: float = 6e-4  # learning rate after the warm-up
    min_lr_ratio: float = 0.1  # final learning rate as a fraction of max_lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest global L2 norm of the gradient; 0: no clipping
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32; auto: 16 bits on CUDA, float32 elsewhere
    seed: int = 1337  # of the initial weights, the data order and the samples
    # ---- settings that do not: evaluation and output
    log_dir: str = "log"  # folder for log.txt and checkpoints
    log_every: int = 1  # print a line every N steps; log.txt has every step
    val_every: int = 250  # evaluate every N steps; 0: never
    val_tokens: int = 10485760  # tokens per validation, over all ranks
    hellaswag_every: int = 250  # score HellaSwag every N steps; 0: never
    sample_every: int = 250  # print samples every N steps; 0: never
    plot_every: int = 250  # draw log_dir/curve.png every N steps, if matplotlib is installed; 0: never
    sample_prompt: str = "Hello, I'm a language model,"  # what the samples begin with
    sample_temperature: float = 1.0  # below 1 favors the likelier tokens; 0: always the likeliest
    checkpoint_every: int = 1000  # save every N steps; 0: never
    keep_checkpoints: int = 3  # how many of the newest to keep on disk
    tracker: str = ""  # also send every metric to tensorboard or wandb; "": neither
    # machine
    micro_batch_size: int = 64  # sequences per forward pass on one rank, at most; reduced if memory runs out
    device: str = "auto"  # auto | cuda | mps | cpu
    compile: bool | None = None  # torch.compile; None: on for CUDA, off elsewhere
    activation_checkpointing: bool | None = None  # recompute in backward to save memory; None: only if needed
    max_nonfinite: int = 5  # stop after this many consecutive NaN or infinite steps
    collective_timeout: int = 600  # seconds to wait for a dead or hung rank in a step


SMALL = dict(  # 2.5M parameters, almost all embeddings: minutes on a laptop
    n_layer=4, n_head=4, n_embd=48, max_lr=7e-3, min_lr_ratio=0.3, sequence_length=128, total_batch_size=1024,
    micro_batch_size=8, max_steps=528, warmup_steps=60, log_every=20, val_every=132, val_tokens=16384,
    hellaswag_every=0, sample_every=528, sample_temperature=0.8, plot_every=264, checkpoint_every=264,
)  # fmt: skip
# learning rates and batch sizes of the GPT-3 paper's models of similar size (Brown et al., 2020, table 2.1)
PRESETS = {
    "gpt2": {},  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, micro_batch_size=32),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, micro_batch_size=16),  # 774M
    "gpt2-xl": dict(  # 1558M; twice the batch of the others: 19,073 steps are two epochs of 10 billion tokens
        n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, warmup_steps=358, total_batch_size=1048576, micro_batch_size=8,
    ),
    "small": {**SMALL, "data_dir": "my_data", "log_dir": "my_log", "sample_prompt": "The"},  # for about 1 MB of text
    "demo": {  # on the documentation of Python and NumPy
        **SMALL, "data_dir": "demo_data", "data_source": "demo", "log_dir": "demo_log", "sample_prompt": "Return the",
    },
}  # fmt: skip


def parse_args(argv=None):
    """The command line as a TrainConfig: the defaults, the preset's overrides, then the flags."""
    return configs.parse_args(TrainConfig, PRESETS, "Train GPT-2", argv)


# -----------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence
    vocab_size: int = tokenizer.VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    @classmethod
    def of(cls, config):
        """The config of a model from scratch: fields that the settings also have are copied from there."""
        same = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(block_size=config.sequence_length, **{name: getattr(config, name) for name in same})


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.init_std = 0.02 * (2 * config.n_layer) ** -0.5  # the residual stream must not grow with depth

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # flash attention, if the device has it
        else:
            y = attend_to_cache(q, k, v, cache, start)  # for sampling, see there
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.init_std = 0.02 * (2 * config.n_layer) ** -0.5  # as above: a block adds to it twice

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 uses the approximation


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        # LayerNorm gives float32 under autocast: cast back, to keep the residual stream in 16 bits
        x = x + self.attn(self.ln_1(x).to(x.dtype), cache, start)
        return x + self.mlp(self.ln_2(x).to(x.dtype))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: recompute activations in backward, to save memory
        self.fast_loss = None  # on a CPU, a run sets it to a function that computes the loss of forward() faster
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.transformer.wpe.init_std = 0.01  # as in OpenAI's code
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: the matrix that embeds tokens also predicts them
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """OpenAI's initial values of linear layers and embeddings: normal, with a standard deviation of 0.02 or the
        module's own init_std, and zero biases. Other modules, and weights that were set to zero, keep theirs."""
        if isinstance(module, nn.Linear | nn.Embedding) and (module.weight.is_meta or module.weight.any()):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", 0.02))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden_states(self, idx, cache=None, start=0):
        """Run everything except the output head: token ids (B, T) int64 to (B, T, n_embd).

        cache: for sampling, keys and values (n_layer, 2, B, n_head, length, n_embd / n_head): of the first `start`
        tokens; those of idx are added.
        """
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}: shorten the sequence")
        if start > 0 and cache is None:
            raise ValueError(f"start is {start}, but there is no cache of the tokens before it")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:end]  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):  # 16 bits in the residual stream, too: half its memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], start)
        return self.transformer.ln_f(x.float())  # CUDA's autocast does this by itself, the CPU's does not

    def head(self, x):
        """Hidden states (..., n_embd) to logits (..., vocab_size); in eval mode in float32, since 16-bit logits tie."""
        if self.training:
            return self.lm_head(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.lm_head(x.float())

    def forward(self, idx, targets=None, return_logits=True):
        """Return (logits, loss) for token ids (B, T) int64.

        logits: (B, T, vocab_size), or None without return_logits, which saves their memory and time in training. loss:
        for targets (B, T) int64, the mean cross-entropy in nats per token, a float32 scalar; targets of -100 are
        ignored. Raises ValueError if T is larger than block_size.
        """
        x = self.hidden_states(idx)
        if self.fast_loss and targets is not None and not return_logits:
            return None, self.fast_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return (logits if return_logits else None), loss

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's weights from the Hugging Face hub: gpt2 (124M), gpt2-medium, gpt2-large or gpt2-xl."""
        config, weights = load.fetch_openai(name)  # the fields of a GPTConfig, and tensors by name
        return load.rebuild({"config": config, "model": cls.from_openai(weights)}, cls, GPTConfig)

    @staticmethod
    def from_openai(theirs):
        """OpenAI's weights as our state_dict; the names are the same."""
        # their linear layers are 1x1 convolutions, with matrices (in, out) where nn.Linear has (out, in)
        conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        ours = {name: weight.t() if name.endswith(conv1d) else weight for name, weight in theirs.items()}
        ours.setdefault("lm_head.weight", ours.get("transformer.wte.weight"))  # tied, so they have it once
        return ours

    def flops_per_token(self, T=None):
        """6N + 6LCT, as in llm.c: a weight takes 2 FLOP per token forward and 4 backward (not wpe, which is looked up);
        q @ k and p @ v take 2TC each per layer forward, thrice that with backward, and causality halves it to 6TC."""
        c = self.config
        weights = sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)
        return 6 * weights + 6 * c.n_layer * c.n_embd * (T or c.block_size)

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        """AdamW with the GPT-3 paper's betas; weight decay on matrices and embeddings, none on biases and norms."""
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def load_model(name):
    """A GPT on the CPU, from an OpenAI model name or the path of a checkpoint or of a folder by tools/export_hf.py."""
    return load.load_model(name, GPT, GPTConfig)


# -----------------------------------------------------------------------------
# Data


class DataLoaderLite:
    """Batches of token shards, in an order that is a pure function of the position.

    The tokens of a split are one stream, cut into sequences of T tokens plus one, the last target. An epoch visits each
    sequence once, in a permutation seeded by (seed, epoch). A batch is the next num_processes * B of them, B on each
    rank: neither number changes the order. data_root: the folder of the shards, or a ShardFolder.
    """

    def __init__(
        self, B, T, process_rank, num_processes, split, data_root="edu_fineweb10B", vocab_size=50304, seed=0, position=0
    ):
        self.B = B
        self.T = T
        self.process_rank = process_rank
        self.num_processes = num_processes
        self.split = split
        self.seed = seed
        self.tokens = TokenStream(data_root, split, vocab_size)
        self.num_sequences = (len(self.tokens) - 1) // T
        if self.num_sequences == 0:
            raise UserError(f"{self.tokens.root}/ has {len(self.tokens)} {split} tokens, too few for a sequence of {T}")
        self.seek(position)

    def reset(self):
        self.seek(0)

    def seek(self, position):
        """Continue after `position` sequences, counted over all ranks and epochs, and start to read them ahead."""
        self.position = position
        self.prepared = None
        self.upcoming = self.locate(np.arange(self.B) + position + self.process_rank * self.B)

    def locate(self, numbers):
        """Map numbers of sequences, counted over all epochs, to a (TokenStream, start, end) each."""
        epochs, places = np.divmod(numbers, self.num_sequences)
        places = shuffle(places, self.num_sequences, self.seed, epochs)
        return [(self.tokens, start, start + self.T + 1) for start in (places * self.T).tolist()]

    def prepare(self):
        """Read the batch that next_batch will return."""
        rows = np.stack([tokens.read(start, end) for tokens, start, end in self.upcoming])  # (B, T + 1) uint16
        self.prepared = [torch.from_numpy(t.astype(np.int64, order="C")) for t in (rows[:, :-1], rows[:, 1:])]

    def next_batch(self):
        """The next (x, y), both (B, T) int64 on the CPU; y is x shifted by one token."""
        if not self.prepared:
            self.prepare()
        x, y = self.prepared
        self.seek(self.position + self.B * self.num_processes)
        return x, y


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
def evaluate_loss(model, loader, num_sequences, device, check_stop=lambda: None):
    """The mean loss in nats per target over the loader's first num_sequences, clamped to [1, all]; the same for any B
    and number of ranks. Targets of -100 do not count."""
    num_sequences = max(1, min(num_sequences, loader.num_sequences))
    model.eval()
    loader.reset()
    total = torch.zeros(2, device=device)  # the sum of the losses in nats per target, and of the weights
    while loader.position < num_sequences:
        check_stop()
        mine = num_sequences - loader.position - loader.process_rank * loader.B  # sequences of this batch that count
        x, y = loader.next_batch()
        y[max(0, mine) :] = -100  # rather than a smaller batch: compiled code keeps its one shape
        if count := (y != -100).sum().item():
            _, loss = model(x.to(device), y.to(device), return_logits=False)
            weight = count / y.size(1)
            total += torch.stack([loss * weight, torch.full_like(loss, weight)])
    model.train()
    loss, weight = mean_over_ranks(total).tolist()
    return loss / weight


def sample_token(logits, temperature, top_k, top_p, generator):
    """Sample an id for each row of logits (B, V), of which only the top_k likeliest count (0: all), and of those the
    fewest whose probabilities add up to top_p. Returns (B, 1)."""
    if temperature < 1e-5:  # dividing by less could overflow
        temperature, top_k = 1.0, 1
    V = logits.size(1)
    values, candidates = logits.topk(min(top_k or V, V))  # the likeliest first
    p = F.softmax(values / temperature, dim=1)
    if top_p < 1:
        p[p.cumsum(dim=1) - p >= top_p] = 0  # if the ones before it reach top_p already
    return candidates.gather(1, torch.multinomial(p, num_samples=1, generator=generator))


def attend_to_cache(q, k, v, cache, start):
    """Causal attention when sampling: the keys and values of the first `start` tokens are in the cache, (2, B, nh,
    length, hs), and need not be computed again for each new token. q, k, v: (B, nh, T, hs) of the tokens after them."""
    end = start + q.size(2)
    cache[:, :, :, start:end] = torch.stack((k, v))
    k, v = cache[:, :, :, :end].to(q.dtype)
    mask = torch.ones(q.size(2), end, dtype=torch.bool, device=q.device).tril(start)  # each sees itself and all before
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, generator=None):
    """Yield the next ids (B, 1) of token ids (B, T), max_new_tokens times. The model should be in eval mode."""
    c = model.config
    length = min(idx.size(1) + max_new_tokens, c.block_size)
    cache = torch.empty(c.n_layer, 2, len(idx), c.n_head, length, c.n_embd // c.n_head, device=idx.device)
    start = 0  # tokens in the cache
    for _ in range(max_new_tokens):
        idx = idx[:, -c.block_size :]
        with devices.flash_attention():  # not cuDNN's, which makes a plan for each new length
            hidden = model.hidden_states(idx[:, start:], cache, start)
        logits = model.head(hidden[:, -1])[:, : tokenizer.VOCAB_SIZE]  # no padded ids
        logits = logits.nan_to_num().clamp(-1e30, 1e30)  # a run may have diverged
        token = sample_token(logits, temperature, top_k, top_p, generator)
        yield token
        start = 0 if idx.size(1) == c.block_size else idx.size(1)  # full: the window slides, every position changes
        idx = torch.cat([idx, token], dim=1)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, generator=None):
    """Continue token ids (B, T) by sampling max_new_tokens more: (B, T + max_new_tokens)."""
    was_training = model.training
    model.eval()
    idx = torch.cat([idx, *stream(model, idx, max_new_tokens, temperature, top_k, top_p, generator)], dim=1)
    model.train(was_training)
    return idx


def sample(model, prompt, device, seed, temperature=1.0, count=3, length=32):
    """Return `count` texts that continue the prompt by `length` tokens; the same seed gives the same texts."""
    bpe = tokenizer.get_tokenizer()
    idx = torch.tensor([bpe.encode_ordinary(prompt) or [tokenizer.EOT]] * count, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = generate(model, idx, length, temperature, generator=generator).tolist()
    return [bpe.decode(row) for row in rows]


# -----------------------------------------------------------------------------
# Ranks


def data_parallel(model):
    """A DistributedDataParallel around the model: the gradients of all ranks are averaged while the backward runs, in
    about 20 buckets, for each of which torch.compile makes a graph."""
    distributed.wait_for_all()
    megabytes = 4e-6 * sum(p.numel() for p in model.parameters())  # of float32 gradients
    return DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=max(25, megabytes / 20))


def mean_over_ranks(tensor):
    """The mean of a tensor over all ranks, in place; gloo cannot average, so sum and divide."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


# -----------------------------------------------------------------------------
# One step


def train_step(model, optimizer, scaler, loader, grad_accum_steps, lr, grad_clip, autocast, device):
    """One optimizer step on the loader's next micro-batches. Returns (loss, norm, finite).

    loss: the mean over the whole batch and all ranks in nats per token, before the update; norm: the global L2 norm of
    the gradient before clipping; finite: False for a NaN or infinity in them, but True where float16 overflowed.
    """
    loss = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        x, y = devices.to_device(loader.next_batch(), device)
        # DDP reads this in its forward: the ranks average their gradients once a step, during the last backward
        model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast():  # the gradients of all micro-batches add up to that of the mean over the batch
            micro_loss = model(x, y, return_logits=False)[1] / grad_accum_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    loader.prepare()  # the next batch, while the device works
    loss = mean_over_ranks(loss).item()  # .item() waits for it
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    for group in optimizer.param_groups:  # each group keeps its ratio to max_lr
        group["lr"] = lr * group.get("lr_scale", 1.0)
    # a NaN would stay in AdamW's moments for good: skip it. float16's gradients overflow now and then by design: its
    # scaler skips those itself and lowers its scale, which is 1 for other types. loss and norm are equal on all ranks
    finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)
    if finite or scaler.is_enabled():
        scaler.step(optimizer)  # the weights change here: optimizer.step(), if the gradients did not overflow
        scaler.update()
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))  # DDP's are views of its buckets
    return loss, norm, finite


# -----------------------------------------------------------------------------
# The run


def train(config, rank, local_rank, world_size, device, folder):
    """Train by config, a TrainConfig, on this rank, in a RunFolder. Returns the last metrics."""
    # data: shards that fineweb.py made, of which the val split is never trained on
    T = config.sequence_length
    data = open_shards(config.data_dir, T, config.total_batch_size // T, config.val_every > 0)
    hella = hellaswag.load(rank, local_rank, world_size, device, T) if config.hellaswag_every else None

    # model: `compiled` is for fixed shapes, `model` for HellaSwag and samples, each of whose shapes would recompile it
    config, saved = folder.open(config, device)  # saved: the newest checkpoint if this run resumes, else None
    model, config = load.initial_model(config, GPTConfig.of(config), saved, GPT, device)
    compiled = devices.compile_model(model, config.compile, device)
    ddp = data_parallel(compiled) if world_size > 1 else compiled

    # optimizer
    optimizer = as_one(model.configure_optimizers(config.weight_decay, config.max_lr, device.type), config.max_lr)
    autocast, scaler = devices.precision(config.dtype, device)

    # resume: a checkpoint holds these, of objects the state_dict; run adds step, tokens, val_loss, the code's version
    contents = {"model": model, "optimizer": optimizer, "scaler": scaler, "data": data.facts}
    contents |= {"config": asdict(model.config), "train_config": asdict(config)}
    run = Run(__file__, folder, contents, saved)

    # batch: micro-batches that fit in memory, also beside HellaSwag's longest items, and how many make up a step
    longest = partial(hellaswag.score, model, hella[-2:], device) if hella else None
    B = rehearse(config, model, ddp, optimizer, autocast, device, world_size, data, longest)
    grad_accum_steps = config.total_batch_size // (B * T * world_size)
    V = model.config.vocab_size
    train_loader = DataLoaderLite(B, T, rank, world_size, "train", data, V, config.seed, position=run.tokens // T)

    for step in run.steps():
        # once in a while (every val_every steps, and at the last one): the loss on tokens that are never trained on
        if run.due(config.val_every):
            val_loader = DataLoaderLite(B, T, rank, world_size, "val", data, V)
            with run.clock.timing("validation"), autocast():
                val_loss = evaluate_loss(compiled, val_loader, config.val_tokens // T, device, run.check_stop)
            run.record(val=val_loss)
            run.say(f"val loss {val_loss:.4f}")

        # once in a while: can it pick the right ending of a story out of four?
        if hella and run.due(config.hellaswag_every):
            with run.clock.timing("HellaSwag"), autocast():
                counts = hellaswag.evaluate(model, hella, device, run.check_stop)
            _, right, items = mean_over_ranks(counts.float()).tolist()
            run.record(hella=right / items)
            run.say(f"HellaSwag {right / items:.4f}")

        # once in a while: read what it writes
        if rank == 0 and run.due(config.sample_every):
            with run.clock.timing("samples"), autocast():
                texts = sample(model, config.sample_prompt, device, config.seed, config.sample_temperature)
            run.show_samples(texts)

        # once in a while: the curves so far, as a picture
        if rank == 0 and step > 0 and run.due(config.plot_every):
            picture = folder.path.absolute() / "curve.png"
            run.start_beside("-m", "tools.plot", picture.parent, "--out", picture)

        # once in a while: save everything needed to continue from here
        if step > 0 and run.due(config.checkpoint_every):
            run.save()

        if step == config.max_steps:
            break  # the final weights are evaluated and saved

        # always: one step, its records in log.txt and with the tracker, and its line on the console
        lr = get_lr(step, config)
        before = train_loader.position
        seed_step(config.seed, step, rank)  # for dropout and the like
        with run.clock.timing("training"):
            loss, norm, finite = train_step(
                ddp, optimizer, scaler, train_loader, grad_accum_steps, lr, config.grad_clip, autocast, device
            )
        tokens = (train_loader.position - before) * T  # of all ranks
        speed = tokens / run.clock.last  # tokens/s
        mfu = devices.mfu(speed / world_size * model.flops_per_token(T), device)
        run.record(train=loss, lr=lr, norm=norm, tokens_per_second=speed, mfu=mfu)
        if (config.log_every and step % config.log_every == 0) or not finite:
            print0(run.step_line(loss, lr, norm, finite, speed, mfu))
        run.count(tokens, finite)
    return run.finish(f"{world_size} x {devices.name_of(device)}", configs.changed(config), scored=bool(hella))


def main(config):
    """Train by config, a TrainConfig; under torchrun, as one of its ranks. Returns the last metrics as a dict.

    Raises UserError for what the user can fix. A signal ends the run after it is saved: SystemExit, or
    KeyboardInterrupt for Ctrl-C.
    """
    rank, local_rank, world_size = distributed.torchrun_ranks()  # 0, 0, 0 without torchrun
    config = configs.check(config, max(1, world_size), load.OPENAI_MODELS)
    device = devices.choose_device(config.device, local_rank, in_group=world_size > 0)
    folder = RunFolder(config.log_dir, resume=config.init_from == "resume")
    if world_size:
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**backend, **distributed.fresh_start(rank, world_size, config.collective_timeout))
    try:
        with one_run(), distributed.leaving_together(), folder:
            if config.data_source and local_rank == 0:
                fineweb.build_missing(config.data_source, config.data_dir)  # once per machine, while other ranks wait
            distributed.wait_for_all()
            torch.manual_seed(config.seed)  # of the initial weights; later, each step has its own
            torch.set_float32_matmul_precision("high")  # TF32 tensor cores for what stays float32
            return train(config, rank, local_rank, max(1, world_size), device, folder)
    finally:
        if world_size:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_as_command(main, parse_args())
