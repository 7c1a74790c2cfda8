"""
Sample text from a model, printed token by token.

    python -m tools.sample demo_log --prompt "Return the"
    python -m tools.sample gpt2 --prompt FILE:story.txt --num_samples 3 --top_p 0.9
    python -m tools.sample log/model_19073.pt            # asks for prompts; Ctrl-D exits

The model is a checkpoint, a log_dir (its newest checkpoint), a folder by tools/export_hf.py, or an OpenAI name. GPT-2
continues a text, up to <|endoftext|>; it does not answer. An empty prompt begins a new text.
"""

import argparse
import codecs
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # python tools/sample.py works, too
import train_gpt2
from lib.console import UserError, run_as_command
from lib.device import check_device, default_device
from lib.files import expand
from lib.model.load import check_usable
from lib.tokenizer import EOT, VOCAB_SIZE, get_tokenizer

LIMITS = {  # from, to
    "temperature": (0, 1e30), "top_k": (0, VOCAB_SIZE), "top_p": (1e-9, 1), "max_new_tokens": (0, 10**9),
    "num_samples": (1, 10**9), "seed": (0, 2**63 - 1),
}  # fmt: skip


def read_prompt(prompt):
    """The text of --prompt; None: standard input. The last newline of a file is not part of it."""
    try:
        if prompt is None:
            data = sys.stdin.buffer.read()
        elif prompt.startswith("FILE:"):
            data = Path(expand(prompt.removeprefix("FILE:"))).read_bytes()
        else:
            return prompt.encode().decode()
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")  # as some editors write
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompt as UTF-8 text: {error}") from None


def ask():
    """Yield lines typed at the terminal."""
    sys.stdin.reconfigure(errors="replace")  # half a character, as some editing keys leave, is no error
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    with contextlib.suppress(EOFError):
        while True:
            yield input("prompt> ")


def write(text):
    """Print a piece of text immediately, whatever the terminal's encoding."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        raise UserError(f"cannot write to standard output: {error}") from None


def model_to_sample(name, device):
    """The model, ready to sample from, on its device."""
    check_device(device)
    model = train_gpt2.load_model(name)
    check_usable(name, model)
    if device == "cpu":  # a single token reads every matrix once, which on CPUs is faster column by column
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()
    return model.eval().to(device)


def print_samples(args):
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(args, name) <= most:  # also rejects NaN
            raise UserError(f"{name} is {getattr(args, name)}: it must be from {least} to {most}")
    if sys.stdout is None:
        raise UserError("standard output is closed: leave out >&-")
    if args.prompt is None and sys.stdin is None:
        raise UserError("standard input is closed: give --prompt")
    prompts = ask() if args.prompt is None and sys.stdin.isatty() else [read_prompt(args.prompt)]
    torch.set_float32_matmul_precision("high")
    model = model_to_sample(args.model, args.device)
    script = sys.modules[type(model).__module__]
    stream = getattr(script, "stream", train_gpt2.stream)  # the script may have changed it
    generator = torch.Generator(args.device).manual_seed(args.seed)
    room = model.config.block_size
    for prompt in prompts:
        ids = get_tokenizer().encode_ordinary(prompt) or [EOT]
        if len(ids) > room:
            print(f"the prompt has {len(ids):,} tokens, the model sees only the last {room:,}", file=sys.stderr)
        for number in range(args.num_samples):
            write("---------------\n" * (number > 0) + prompt)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can span tokens
            idx = torch.tensor([ids[-room:]], device=args.device)
            for token in stream(model, idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator):
                if token.item() == EOT:
                    break
                write(decoder.decode(get_tokenizer().decode_single_token_bytes(token.item())))
            write(decoder.decode(b"", final=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Sample text from a model", allow_abbrev=False)
    default = " (default: %(default)s)"
    parser.add_argument("model", help="a checkpoint, log_dir, exported folder, or an OpenAI name such as gpt2")
    parser.add_argument("--prompt", help="the text to continue, or FILE:name (default: standard input, or ask)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts for each prompt" + default)
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens at most" + default)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token" + default)
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k likeliest; 0: from all" + default)
    parser.add_argument("--top_p", type=float, default=1.0, help="and from the likeliest of this probability" + default)
    parser.add_argument("--seed", type=int, default=1337, help="the same seed, the same texts" + default)
    parser.add_argument("-d", "--device", default=default_device(), help="cuda, mps or cpu" + default)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit quietly under `| head`
    run_as_command(print_samples, parser.parse_args())


if __name__ == "__main__":
    main()
