import json

import pytest
import torch
from support import make_items, run, write_shards

import hellaswag
from lib.common import InputError
from train_gpt2 import GPT, GPTConfig


def small_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def tutorial_scores(model, item):
    """Sum and mean loss of each ending the plain way: full logits of one item, positions picked by the mask."""
    _, tokens, mask, _ = hellaswag.render_example(item)
    losses = torch.nn.functional.cross_entropy(
        model(tokens)[0][:, :-1].reshape(-1, 50304), tokens[:, 1:].reshape(-1), reduction="none"
    ).view(4, -1)
    losses = losses * mask[:, 1:]
    return losses.sum(1), losses.sum(1) / mask[:, 1:].sum(1)


def test_render_example():
    data, tokens, mask, label = hellaswag.render_example(
        {"ctx": "A man is", "label": 2, "endings": ["sitting.", "on a roof.", "x", "running away quickly."]}
    )
    assert data["ctx_tokens"] == [32, 582, 318] and label == data["label"] == 2
    assert tokens.shape == mask.shape == (4, 3 + max(map(len, data["ending_tokens"])))
    for row in range(4):
        ending = data["ending_tokens"][row]
        assert tokens[row, : 3 + len(ending)].tolist() == [32, 582, 318, *ending]
        assert mask[row].tolist() == [0] * 3 + [1] * len(ending) + [0] * (mask.size(1) - 3 - len(ending))
    assert data["ending_tokens"][0][0] == 5586  # " sitting", with its space


def test_batched_equals_one_by_one():
    model, items = small_model(), make_items(40)
    with torch.no_grad():
        one_by_one = [(s.argmin().item() == i["label"], m.argmin().item() == i["label"])
                      for i in items for s, m in [tutorial_scores(model, i)]]  # fmt: skip
        tokens, mask, _ = hellaswag.make_batches(items[:5])[0]
        lengths = sorted(items[:5], key=lambda item: hellaswag.render_example(item)[1].size(1))
        expected = torch.stack([torch.stack(tutorial_scores(model, item)) for item in lengths])  # (5, 2, 4)
        for i, scores in enumerate(hellaswag.score(model, tokens, mask)):
            assert torch.allclose(scores.view(5, 4), expected[:, i], atol=1e-4)
    counts = hellaswag.evaluate(model, hellaswag.make_batches(items), torch.device("cpu"))
    assert counts.tolist() == [sum(s for s, _ in one_by_one), sum(m for _, m in one_by_one), 40]


def test_the_ranks_together_score_every_item_once():
    model, items = small_model(), make_items(45)
    cpu = torch.device("cpu")
    alone = hellaswag.evaluate(model, hellaswag.make_batches(items, batch_size=8), cpu)
    for world_size in (2, 3):
        batches = [hellaswag.make_batches(items, rank, world_size, batch_size=8) for rank in range(world_size)]
        assert len({len(b) for b in batches}) == 1
        assert torch.equal(sum(hellaswag.evaluate(model, b, cpu) for b in batches), alone)


def test_acc_and_acc_norm_can_disagree():
    """A model that knows only how common a token is: a short ending has the lowest sum, a long one the lowest mean."""

    class Unigram(torch.nn.Module):
        def hidden_states(self, tokens):
            return torch.zeros(*tokens.shape, 1)

        def head(self, hidden):
            logits = torch.zeros(len(hidden), 50304)
            logits[:, common] = 5.0
            return logits

    encode = hellaswag.get_tokenizer().encode_ordinary
    common = encode(" the")[0]
    item = {"ctx": "Then", "endings": ["dog", "the the the the", "dog dog", "dog man roof"]}
    for label, expected in ((0, [1, 0, 1]), (1, [0, 1, 1])):
        batches = hellaswag.make_batches([{**item, "label": label}])
        assert hellaswag.evaluate(Unigram(), batches, torch.device("cpu")).tolist() == expected


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    good = json.dumps(make_items(1)[0])
    for bad in ("{", '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', '{"ctx": "a"}', "\xff", "[]"):
        path.write_bytes(f"{good}\n{good}\n{bad}\n".encode("latin-1"))
        with pytest.raises(InputError, match="line 3"):
            list(hellaswag.iterate_examples(path=path))
    with pytest.raises(InputError, match="cannot read"):
        list(hellaswag.iterate_examples(path=tmp_path / "none.jsonl"))


def test_the_command_line_scores_a_checkpoint(tmp_path):
    write_shards(tmp_path / "data", [1000, 5000])
    result = run(
        "train_gpt2.py", "--data_dir", tmp_path / "data", "--log_dir", tmp_path / "log", "--n_layer=1", "--n_head=1",
        "--n_embd=16", "--sequence_length=256", "--total_batch_size=512", "--micro_batch_size=2", "--max_steps=1",
        "--hellaswag_every=0", "--sample_every=0", "--device=cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in make_items(12)))
    args = ("-m", tmp_path / "log" / "model_00001.pt", "-d", "cpu", "--data", tmp_path / "items.jsonl")
    result = run("hellaswag.py", *args)
    assert result.returncode == 0, result.stdout
    last = result.stdout.splitlines()[-1].split()
    assert last[0] == "12" and last[1::2] == ["acc:", "acc_norm:"] and 0 <= float(last[4]) <= 1
    assert run("hellaswag.py", *args, "--limit", "5").stdout.splitlines()[-1].startswith("5 acc: ")
    with pytest.raises(InputError, match="gpt2-xl"):
        hellaswag.run("gpt5", "cpu", None, None)
