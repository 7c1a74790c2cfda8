import hashlib
import http.server
import json
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict

import pyarrow.parquet
import pytest
import torch
from support import command_of, environment, make_items, run, run_warm, write_items

import hellaswag
from lib.checkpoint import write_checkpoint
from lib.console import UserError
from train_gpt2 import GPT, GPTConfig, load_model


def small_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def items_as_bytes(count):
    return "".join(json.dumps(item) + "\n" for item in make_items(count)).encode()


def tutorial_scores(model, item):
    """Sum and mean loss of each ending the plain way: full logits of one item, positions picked by the mask."""
    _, tokens, mask, _ = hellaswag.render_example(item)
    losses = torch.nn.functional.cross_entropy(
        model(tokens)[0][:, :-1, :50257].reshape(-1, 50257), tokens[:, 1:].reshape(-1), reduction="none"
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
        one_by_one = torch.stack([torch.stack(tutorial_scores(model, item)) for item in items])  # (40, 2, 4)
        batches = hellaswag.make_batches(items, batch_size=9)
        expected = one_by_one[[i for places, *_ in batches for i in places]]
        assert torch.allclose(hellaswag.score(model, batches, torch.device("cpu")), expected, atol=1e-4)
    counts = hellaswag.evaluate(model, hellaswag.make_batches(items), torch.device("cpu"))
    right = one_by_one.argmin(2) == torch.tensor([[item["label"]] for item in items])
    assert counts.tolist() == [*right.sum(0).tolist(), 40]


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
        head = torch.nn.Linear(1, 50304, bias=False)

        def hidden_states(self, tokens):
            return torch.ones(*tokens.shape, 1)

    with torch.no_grad():
        Unigram.head.weight.zero_()[hellaswag.get_tokenizer().encode_ordinary(" the")] = 5.0
    item = {"ctx": "Then", "endings": ["dog", "the the the the", "dog dog", "dog man roof"]}
    for label, expected in ((0, [1, 0, 1]), (1, [0, 1, 1])):
        batches = hellaswag.make_batches([{**item, "label": label}])
        assert hellaswag.evaluate(Unigram(), batches, torch.device("cpu")).tolist() == expected


def test_items_come_in_the_forms_in_which_people_have_them(tmp_path):
    items = make_items(5)
    lines = "".join(json.dumps(item) + "\n" for item in items)
    forms = {"lines": lines, "crlf": lines.replace("\n", "\r\n\r\n"), "list": json.dumps(items, indent=1)}
    for name, text in forms.items():
        (tmp_path / name).write_text("\ufeff" + text, newline="")
    rows = [{**item, "label": str(item["label"])} for item in items]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet")
    for name in (*forms, "parquet"):
        assert list(hellaswag.iterate_examples(path=tmp_path / name)) == items


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    good = json.dumps(make_items(1)[0])
    for bad in ("{", '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', '{"ctx": "a"}', "\xff", "[]"):
        path.write_bytes(f"{good}\n{good}\n{bad}\n".encode("latin-1"))
        with pytest.raises(UserError, match="line 3"):
            list(hellaswag.iterate_examples(path=path))
    with pytest.raises(UserError, match="cannot read"):
        list(hellaswag.iterate_examples(path=tmp_path / "none.jsonl"))


def test_labels_may_be_text_as_in_the_hubs_own_data_set_and_blank_lines_are_none(tmp_path):
    items, path = make_items(4), tmp_path / "items.jsonl"
    lines = [json.dumps({**item, "label": str(item["label"])}) for item in items]
    path.write_text("\n".join(lines[:2] + [""] + lines[2:]) + "\n\n  \n")
    assert list(hellaswag.iterate_examples(path=path)) == items


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label": ""}, "test split"), ({"label": "4"}, "label 4"), ({"label": 2.5}, "2.5"), ({"label": True}, "True"),
        ({"label": None}, "None"), ({"endings": ["a"] * 3}, "3 endings"), ({"ctx": 5}, "not text"),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong_is_said_with_the_start_of_its_line(change, words, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": "the line", **make_items(1)[0], **change, "more": "x" * 10_000}))
    with pytest.raises(UserError, match=words) as error:
        list(hellaswag.iterate_examples(path=path))
    assert '{"id": "the line"' in str(error.value) and len(str(error.value)) < 600


def test_the_padding_ids_of_the_vocabulary_do_not_count():
    model, items = small_model(), make_items(5)
    batches, cpu = hellaswag.make_batches(items), torch.device("cpu")
    before = hellaswag.score(model, batches, cpu)
    with torch.no_grad():
        model.lm_head.weight[50257:] = 1e3 * torch.randn(47, 32)
    assert torch.equal(hellaswag.score(model, batches, cpu), before)


def test_items_longer_than_the_model_lose_the_start_of_their_context():
    model, item = (
        small_model(),
        {"ctx": "the man sits " * 100, "label": 0, "endings": ["on", "a b", "a roof", "x " * 60]},
    )
    scores = hellaswag.score(model, hellaswag.make_batches([item], max_length=100), torch.device("cpu"))
    data = hellaswag.encode(item)
    for ending, found in zip(data["ending_tokens"], scores[0, 0], strict=True):
        row = torch.tensor([(data["ctx_tokens"] + ending)[-101:]])  # 100 are read, and the last one is only predicted
        with torch.no_grad():
            log_p = model(row[:, :-1])[0][0, :, :50257].log_softmax(1)
        assert found == pytest.approx(-log_p.gather(1, row[0, 1:, None])[-len(ending) :].sum().item(), abs=1e-3)


def test_without_a_context_the_endings_open_a_document():
    data, tokens, mask, _ = hellaswag.render_example({"ctx": "", "label": 0, "endings": ["a", "b", "c", "d e"]})
    assert data["ctx_tokens"] == [50256] and mask.sum(1).tolist() == [1, 1, 1, 2] and mask[:, 0].sum() == 0


def test_the_harness_style_cleans_and_counts_characters():
    item = {
        "activity_label": "Home and Garden", "ctx_a": "[header] How to clean [title] Wipe it. [step] Use a cloth.",
        "ctx_b": "then YOU [substeps]", "label": 1, "endings": ["[substeps] wipe.", "wash [it] up", " dry ", "sing"],
    }  # fmt: skip
    data = hellaswag.encode(item, "harness")
    decode = hellaswag.get_tokenizer().decode
    assert decode(data["ctx_tokens"]) == "Home and Garden: How to clean. Wipe it. Use a cloth. Then you"
    assert [decode(ending) for ending in data["ending_tokens"]] == ["   wipe.", "  wash up", "  dry", "  sing"]
    assert data["lengths"] == [6, 7, 3, 4]


class Server(http.server.BaseHTTPRequestHandler):
    """Answers every request with `answer`, raw bytes."""

    def do_GET(self):
        self.wfile.write(self.answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that sets what the download gets; its folder is tmp_path/hellaswag."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/{{split}}")
    yield lambda answer: setattr(Server, "answer", answer)
    server.shutdown()
    server.server_close()


def good_answer(content):
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


def test_a_download_that_fails_is_said_and_leaves_nothing(served, tmp_path, capsys):
    content = items_as_bytes(3)
    answers = {
        b"HTTP/1.0 404 Not Found\r\n\r\n": "404",
        good_answer(content)[:-5]: "IncompleteRead",
        b"nonsense\r\n\r\n": "nonsense",
        good_answer(content): "is not the published file",
        good_answer(b""): "is not the published file, 0 bytes",
    }
    for answer, words in answers.items():
        served(answer)
        with pytest.raises(UserError, match=words):
            list(hellaswag.iterate_examples())
        assert hellaswag.load(0, 0, 1, torch.device("cpu"), 1024) is None
        out = capsys.readouterr().out
        assert out.count("continuing without HellaSwag: ") == 1 and words in out
        assert not list(tmp_path.glob("hellaswag/*"))


def test_a_download_is_kept_and_a_file_cut_short_is_refused(served, tmp_path, monkeypatch):
    content, path = items_as_bytes(3), tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    monkeypatch.setattr(hellaswag, "SHA256", {"val": hashlib.sha256(content).hexdigest()})
    served(good_answer(content))
    assert list(hellaswag.iterate_examples()) == make_items(3) and path.read_bytes() == content
    served(b"")  # from now on it comes from the disk
    assert list(hellaswag.iterate_examples()) == make_items(3)
    for broken in (content[: content.index(b"\n") + 1], b""):
        path.write_bytes(broken)
        with pytest.raises(
            UserError, match="hellaswag_val.jsonl is not the published file.* delete it to fetch it again"
        ):
            list(hellaswag.iterate_examples())


def test_a_folder_that_takes_no_file_is_said(served, tmp_path, monkeypatch):
    content = items_as_bytes(3)
    monkeypatch.setattr(hellaswag, "SHA256", {})
    served(good_answer(content))
    (tmp_path / "hellaswag").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot fetch"):
        hellaswag.fetch("val")
    (tmp_path / "hellaswag").unlink()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hellaswag, "atomic_write", full)
    with pytest.raises(UserError, match="No space left"):
        hellaswag.fetch("val")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a checkpoint of a tiny model."""
    path = tmp_path_factory.mktemp("run") / "model_00001.pt"
    model = small_model()
    contents = {"model": model.state_dict(), "optimizer": {}, "config": asdict(model.config), "train_config": {}}
    write_checkpoint(path, {**contents, "step": 1})
    return path


def test_the_command_line_scores_a_checkpoint(checkpoint, tmp_path):
    items = make_items(12)
    (tmp_path / "items.jsonl").write_bytes(items_as_bytes(12))
    args = ("-m", checkpoint, "-d", "cpu", "--data", tmp_path / "items.jsonl")
    result = run_warm("hellaswag.py", *args, "--json", tmp_path / "scores.json")
    assert result.returncode == 0, result.stdout
    *_, before, last = result.stdout.splitlines()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["model"] == str(checkpoint) and scores["style"] == "completion" and scores["n"] == 12
    for key, choices in (("acc", "choices"), ("acc_norm", "choices_norm")):
        right = [choice == item["label"] for choice, item in zip(scores[choices], items, strict=True)]
        assert scores[key] == pytest.approx(sum(right) / 12)
        assert scores[f"{key}_stderr"] == pytest.approx(statistics.stdev(right) / 12**0.5)
    assert last == f"12 acc: {scores['acc']:.4f} acc_norm: {scores['acc_norm']:.4f}"
    assert f"acc {scores['acc_stderr']:.4f} acc_norm {scores['acc_norm_stderr']:.4f}" in before
    model = load_model(str(checkpoint)).eval()
    with torch.no_grad():
        expected = [[loss.argmin().item() for loss in tutorial_scores(model, item)] for item in items]
    assert [list(pair) for pair in zip(scores["choices"], scores["choices_norm"], strict=True)] == expected
    assert run_warm("hellaswag.py", *args, "--limit", "5").stdout.splitlines()[-1].startswith("5 acc: ")


def test_scoring_imports_no_compiler(checkpoint, tmp_path):
    """It takes torch a second to import, as long as 100 items of a small model."""
    write_items(tmp_path / "items.jsonl", 2)
    args = ("-m", checkpoint, "-d", "cpu", "--data", tmp_path / "items.jsonl")
    result = run("hellaswag.py", *args, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert "torch.nn.modules" in result.stdout and "2 acc:" in result.stdout
    assert "torch._dynamo.symbolic_convert" not in result.stdout


def test_scores_that_cannot_be_printed_are_an_error(checkpoint, tmp_path):
    (tmp_path / "items.jsonl").write_bytes(items_as_bytes(2))
    command = command_of("hellaswag.py", "-m", checkpoint, "-d", "cpu", "--data", tmp_path / "items.jsonl")
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode and "cannot write to standard output: [Errno 28]" in result.stderr, result.stderr


def test_what_the_user_can_put_right_is_said_without_a_traceback(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "items.jsonl").write_bytes(items_as_bytes(2))
    (tmp_path / "empty.jsonl").touch()
    good = {"-m": checkpoint, "-d": "cpu", "--data": tmp_path / "items.jsonl"}
    for change, words in (
        ({"--limit": 0}, "--limit is 0: it must be 1 or more"),
        ({"--limit": -3}, "--limit is -3"),
        ({"-d": "banana"}, "cannot use device 'banana'"),
        *([] if torch.cuda.is_available() else [({"-d": "cuda"}, "cannot use device 'cuda'")]),
        ({"--data": tmp_path / "empty.jsonl"}, "empty.jsonl is empty"),
        ({"--data": tmp_path}, "cannot read"),
        ({"-m": "gpt5"}, "gpt2-xl"),
        ({"--style": "harness"}, "line 1: --style harness needs a JSON object with activity_label, ctx_a, ctx_b"),
        ({"--json": tmp_path / "none" / "scores.json"}, "cannot write"),
    ):
        flags = [str(part) for flag in {**good, **change}.items() for part in flag]
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags])
        with pytest.raises(SystemExit) as exit:
            hellaswag.main()
        err = capsys.readouterr().err
        assert exit.value.code == 2 and words in err and "Traceback" not in err, err
