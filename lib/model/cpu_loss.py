"""
A faster path beside the visible one: on a CPU, the output head and its cross-entropy a chunk of tokens at a time. A run
takes it only if it computes what GPT.forward shows.
"""

import contextlib
import copy
import functools
import math
import time

import torch

from lib.console import print0
from lib.tokenizer import EOT

CHUNK = 512  # tokens


@functools.cache
def logits_buffer(vocab_size, dtype):
    """Memory for the logits of a chunk, the same in every step."""
    return torch.empty(CHUNK, vocab_size, dtype=dtype)


def chunked_cross_entropy(x, weight, targets):
    """F.cross_entropy(x @ weight.T, targets): x (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64. Returns a
    float32 scalar in nats per token."""
    weight = weight if torch.is_grad_enabled() else weight.detach()  # or validation computes gradients, too
    return ChunkedCrossEntropy.apply(x, weight, targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The logits of 2,048 tokens take 400 MB, and on CPU allocating and sweeping them costs more than the products.

    Here all chunks of all steps share one buffer, and the gradient, softmax - onehot, is computed in the forward.
    Targets below 0 are ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        w, count = weight.to(x.dtype), (targets >= 0).sum()
        loss, ctx.dx, ctx.dw = x.new_zeros((), dtype=torch.float32), torch.zeros_like(x), torch.zeros_like(w)
        buffer = logits_buffer(len(w), x.dtype)
        for xs, ys, dxs in zip(x.split(CHUNK), targets.split(CHUNK), ctx.dx.split(CHUNK), strict=True):
            tokens = torch.arange(len(xs))
            p = torch.mm(xs, w.t(), out=buffer[: len(xs)])
            p = torch.softmax(p, dim=1, out=p)
            loss -= p[tokens, ys.clamp(min=0)].float().clamp(min=1e-38).log()[ys >= 0].sum()
            if any(ctx.needs_input_grad):
                p[tokens, ys.clamp(min=0)] -= 1
                p[tokens[ys < 0]] = 0  # by index: a mask would sweep all of p
                torch.mm(p, w, out=dxs)
                ctx.dw.addmm_(p.t(), xs)
        ctx.dx /= count
        ctx.dw /= count
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        return ctx.dx.mul_(grad), ctx.dw.mul_(grad).float(), None


def trial(model, x, y, fast):
    """(losses in train and eval mode, gradients by name, seconds) of a forward and backward with `fast` or, if that is
    None, with the loss that GPT.forward shows.

    Of a copy with other weights and buffers, the same each time: with those of the beginning, a change of the logits
    may be smaller than the rounding, or still be switched off by a zero."""
    model = copy.deepcopy(model)
    model.fast_loss = fast
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                if value.is_floating_point():
                    value += 3 * model.config.n_embd**-0.5 * torch.randn_like(value)
        start = time.perf_counter()
        _, loss = model(x, y, return_logits=False)
        loss.backward()
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            _, in_eval = model(x, y, return_logits=False)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return (loss.item(), in_eval.item()), gradients, seconds


def equal(a, b):
    """Whether two results of trial() differ by rounding only."""
    same_losses = all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a[0], b[0], strict=True))
    if not same_losses or a[1].keys() != b[1].keys():
        return False
    whole = torch.stack([gradient.norm() for gradient in a[1].values()]).norm()
    errors = [((a[1][name] - b[1][name]).norm(), a[1][name].norm()) for name in a[1]]
    return all(error <= 1e-3 * max(norm, 1e-3 * whole) for error, norm in errors)


def fast_loss(model, tokens):
    """chunked_cross_entropy if on this model, a GPT on a CPU, it gives the losses and gradients of the lines in
    GPT.forward, tried in float32, else None, with a message. tokens: some of the training data."""
    if next(model.parameters()).device.type != "cpu":
        return None
    draw = torch.Generator().manual_seed(0)
    V = model.config.vocab_size
    ids = torch.randint(V, (2, model.config.block_size + 1), generator=draw)  # a row of random ids, a row of text
    ids[0, ::5] = min(EOT, V - 1)  # some changes concern the ends of documents
    text = torch.tensor(tokens.tolist()).clamp(max=V - 1)[: ids.size(1)]
    ids[1, : len(text)] = text
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[0, ::7] = -100
    shown = trial(model, x, y, None)
    fast = None
    with contextlib.suppress(Exception):  # it needs the head to be one matrix
        fast = trial(model, x, y, chunked_cross_entropy)
    if fast and equal(shown, fast):
        return chunked_cross_entropy
    print0(
        f"the loss is that of GPT.forward, {1000 * shown[2]:.0f} ms for {x.numel()} tokens here; the chunked one of "
        "lib/model/cpu_loss.py computes something else" + f", in {1000 * fast[2]:.0f} ms" * bool(fast)
    )
    return None
