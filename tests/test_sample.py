"""Sampling: the cache changes nothing, the distribution is the one asked for, the terminal gets whole characters."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from support import ROOT, environment, write_items

import hellaswag
import train_gpt2
from lib.checkpoint import write_checkpoint
from lib.console import UserError
from lib.tokenizer import EOT, get_tokenizer
from tools import sample
from train_gpt2 import GPT, GPTConfig, generate, sample_token, stream


def random_model(vocab_size=1000, block_size=24):
    """Weights far from the initialization, so that greedy texts are varied and no two ids are nearly tied."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=3, n_head=4, n_embd=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@torch.no_grad()
def greedy_by_recomputing(model, idx, count):
    for _ in range(count):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("prompt", [1, 7, 23, 24, 30])
def test_the_cache_changes_no_token_within_the_window_and_beyond(prompt):
    model = random_model()
    idx = torch.randint(1000, (3, prompt))
    out = generate(model, idx, 40, temperature=0)
    assert torch.equal(out, greedy_by_recomputing(model, idx, 40))
    assert len(out.unique()) > 20
    assert torch.equal(generate(model, idx, 0), idx)


def test_greedy_tokens_equal_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = random_model(block_size=64)
    settings = dict(vocab_size=1000, n_positions=64, n_embd=64, n_layer=3, n_head=4, eos_token_id=None)
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=0, **settings)).eval()
    theirs.load_state_dict(GPT.from_openai(model.state_dict()), strict=False)
    idx = torch.randint(1000, (2, 5))
    mask = torch.ones_like(idx)
    expected = theirs.generate(idx, attention_mask=mask, max_new_tokens=59, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(model, idx, 59, temperature=0), expected)


def test_under_autocast_the_cache_is_as_good_as_its_type():
    model, idx = random_model(), torch.randint(1000, (2, 20))
    cache = torch.empty(3, 2, 2, 4, 20, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model.hidden_states(idx)
        parts = [model.hidden_states(idx[:, :12], cache)]
        parts += [model.hidden_states(idx[:, i : i + 1], cache, start=i) for i in range(12, 20)]
    assert (torch.cat(parts, dim=1) - whole).abs().mean() < 0.02 * whole.abs().mean()


def probabilities(logits, temperature, top_k, top_p):
    """The distribution by the book, one id after the other."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: 1 if temperature == 0 else top_k or len(logits)]
    weights = {i: 2.718281828459045 ** (logits[i] / (temperature or 1)) for i in order}
    kept, reached = {}, 0.0
    for i in order:
        if reached < top_p:
            kept[i] = weights[i] / sum(weights.values())
            reached += kept[i]
    return [kept.get(i, 0.0) / reached for i in range(len(logits))]


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1, 0, 1), (1, 5, 1), (0.5, 0, 1), (2, 10, 1), (1, 0, 0.5), (0.7, 12, 0.8), (0, 0, 1), (1, 99, 1), (1, 0, 1e-9)],
)
def test_samples_have_the_distribution_of_their_definition(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 30, generator=generator)
    found = sample_token(logits.expand(100_000, 30), temperature, top_k, top_p, generator)
    found = found.flatten().bincount(minlength=30) / 100_000
    expected = torch.tensor(probabilities(logits[0].tolist(), temperature, top_k, top_p))
    assert (found - expected).abs().max() < 0.006  # four standard deviations
    assert not found[expected == 0].any()


def test_the_same_seed_gives_the_same_tokens():
    model, idx = random_model(), torch.randint(1000, (1, 5))
    texts = [generate(model, idx, 30, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, path = random_model(vocab_size=50304), tmp_path_factory.mktemp("log") / "model_00003.pt"
    contents = {"model": model.state_dict(), "optimizer": {}, "config": asdict(model.config), "train_config": {}}
    write_checkpoint(path, {**contents, "step": 3})
    return str(path)


def arguments(model, **overrides):
    defaults = dict(prompt="The water", num_samples=1, max_new_tokens=8, temperature=1.0, top_k=50, top_p=1.0, seed=1)
    return Namespace(model=model, device="cpu", **{**defaults, **overrides})


def test_the_program_prints_what_generate_gives(checkpoint, capsys):
    sample.print_samples(arguments(checkpoint, num_samples=2, max_new_tokens=40))
    generator = torch.Generator().manual_seed(1)
    idx = torch.tensor([get_tokenizer().encode_ordinary("The water")])
    rows = [generate(random_model(50304), idx, 40, generator=generator)[0].tolist() for _ in range(2)]
    texts = [get_tokenizer().decode(row) for row in rows]
    assert capsys.readouterr().out == f"{texts[0]}\n---------------\n{texts[1]}\n"


def test_an_empty_prompt_begins_a_new_text():
    texts = train_gpt2.sample(random_model(50304), "", "cpu", seed=1, length=4)
    assert len(texts) == 3 and all(text.startswith("<|endoftext|>") for text in texts)


def test_a_temperature_next_to_0_takes_the_likeliest():
    for temperature in (0, 1e-40, 1e-6):
        assert sample_token(torch.tensor([[1.0, 9.0, 3.0]]), temperature, 50, 1.0, None).item() == 1


def test_characters_come_whole_and_the_text_ends_at_its_end(checkpoint, monkeypatch):
    text = "naïve 世界 🙂 𝕊"
    ids = [*get_tokenizer().encode_ordinary(text), get_tokenizer().encode_ordinary("🙂")[0], EOT, 464]
    monkeypatch.setattr(train_gpt2, "stream", lambda *args: (torch.tensor([[i]]) for i in ids))
    pieces = []
    monkeypatch.setattr(sample, "write", pieces.append)
    sample.print_samples(arguments(checkpoint))
    assert "".join(pieces) == f"The water{text}\ufffd\n"  # the half of a character at the end is shown as such
    assert sum(map(bool, pieces)) > 7 and not any("\ufffd" in piece for piece in pieces[:-1])


def test_prompts_from_files_and_standard_input(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_bytes("\ufeffZürich\r\n\r\n".encode())  # as some editors write
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"FILE: is text here\n")))
    for prompt, expected in ((f"FILE:{tmp_path / 'p.txt'}", "Zürich\n"), (None, "FILE: is text here"), ("", "")):
        sample.print_samples(arguments(checkpoint, prompt=prompt, max_new_tokens=0))
        assert capsys.readouterr().out == expected + "\n"


def test_of_a_long_prompt_the_end_is_used(checkpoint, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train_gpt2, "stream", lambda model, idx, *args: seen.append(idx) or stream(model, idx, *args))
    sample.print_samples(arguments(checkpoint, prompt="one two three four five six " * 20))
    assert "the prompt has 121 tokens, the model sees only the last 24" in capsys.readouterr().err
    assert seen[0].tolist() == [get_tokenizer().encode_ordinary("one two three four five six " * 20)[-24:]]


REFUSALS = {
    "temperature is -1": {"temperature": -1.0},
    "temperature is nan": {"temperature": float("nan")},
    "top_p is 0": {"top_p": 0.0},
    "top_k is -1": {"top_k": -1},
    "num_samples is 0": {"num_samples": 0},
    "cannot use device 'gpu'": {"device": "gpu"},
    "No such file": {"prompt": "FILE:nowhere"},
    "cannot read the prompt as UTF-8 text": {"prompt": "a\udcff"},
    "is neither a path nor one of gpt2, gpt2-medium": {"model": "nowhere"},
    "was not written by this trainer": {"model": str(ROOT / "README.md")},
    "config.json": {"model": str(ROOT / "lib")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_name_the_remedy(message, checkpoint):
    with pytest.raises(UserError, match=message):
        sample.print_samples(Namespace(**{**vars(arguments(checkpoint)), **REFUSALS[message]}))


def test_a_model_without_the_whole_vocabulary_is_refused(tmp_path, checkpoint):
    contents = {**torch.load(checkpoint), "model": random_model().state_dict(), "config": asdict(random_model().config)}
    write_checkpoint(tmp_path / "model_00003.pt", contents)
    write_items(tmp_path / "items.jsonl", 2)
    with pytest.raises(UserError, match="a vocab_size of 1000: .* 50257 are needed"):
        sample.print_samples(arguments(str(tmp_path / "model_00003.pt")))
    with pytest.raises(UserError, match="a vocab_size of 1000: .* 50257 are needed"):
        hellaswag.run(tmp_path / "model_00003.pt", "cpu", tmp_path / "items.jsonl", None)


def test_a_log_dir_stands_for_its_newest_checkpoint(checkpoint, tmp_path, capsys):
    for step in (99999, 100000):
        shutil.copy(checkpoint, tmp_path / f"model_{step:05d}.pt")
    (tmp_path / "model_99999.pt").write_bytes(b"damaged")
    (tmp_path / "config.json").write_text("{}")  # of the run
    sample.print_samples(arguments(str(tmp_path)))
    assert capsys.readouterr().out.startswith("The water")


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint, tiny, tmp_path):
    contents = torch.load(checkpoint)
    contents["model"]["transformer.h.1.ln_2.bias"][0] = float("inf")
    write_checkpoint(tmp_path / "model_00003.pt", contents)
    with pytest.raises(UserError, match=r"model_00003.pt: NaN or infinite values in transformer.h.1.ln_2.bias"):
        sample.print_samples(arguments(str(tmp_path / "model_00003.pt")))
    write_items(tmp_path / "items.jsonl", 2)
    with pytest.raises(UserError, match="NaN or infinite values in transformer.h.1.ln_2.bias"):
        hellaswag.run(tmp_path / "model_00003.pt", "cpu", tmp_path / "items.jsonl", None)
    with pytest.raises(UserError, match="NaN or infinite values in transformer.h.1.ln_2.bias"):
        train_gpt2.main(tiny(init_from=str(tmp_path / "model_00003.pt"), sequence_length=16))


def test_the_program_ends_quietly_after_ctrl_c_and_a_closed_pipe(checkpoint):
    for how in ("Ctrl-C", "closed pipe"):
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "sample.py", checkpoint, "--prompt=x", "--max_new_tokens=1000000"],
            env=environment(PYTHONPATH=""), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert os.read(process.stdout.fileno(), 1) == b"x"
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.stderr.close()
        expected = {"Ctrl-C": (-signal.SIGINT, "\n"), "closed pipe": (-signal.SIGPIPE, "")}
        assert (process.wait(timeout=60), errors) == expected[how]


@pytest.mark.parametrize(
    "redirect, message",
    [(">/dev/full", "cannot write to standard output: .*No space left"), (">&-", "standard output is closed"),
     ("<&-", "standard input is closed: give --prompt")],
)  # fmt: skip
def test_lost_streams_are_one_line(redirect, message, checkpoint):
    prompt = "" if redirect == "<&-" else "--prompt=x"
    command = f"{sys.executable} -m tools.sample {checkpoint} {prompt} {redirect}"
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and re.fullmatch(f"error: {message}.*\n", result.stderr), result.stderr


def test_half_a_character_typed_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\n"), encoding="utf-8"))
    assert list(sample.ask()) == ["caf\ufffd"]
