"""What one reads is what runs: lines of train_gpt2.py are changed in a copy, and the run is looked at.

An edit is data: a name, pairs of a text of the script and what replaces it, and which first records of the run must
differ from those of the script as it is. All others must be equal.
"""

import importlib.util
import itertools
import json
import math
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import ROOT, assert_same, load, make_items, run_warm, write_shards

import hellaswag
from lib.checkpoint import load_checkpoint
from lib.console import Stopped, UserError
from lib.run import seed_step

SOURCE = (ROOT / "train_gpt2.py").read_text()
FLAGS = [
    "--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=512", "--sequence_length=32", "--total_batch_size=128",
    "--micro_batch_size=2", "--max_steps=2", "--warmup_steps=1", "--max_lr=1e-2", "--val_every=2", "--val_tokens=100",
    "--hellaswag_every=0", "--sample_every=0", "--plot_every=0", "--checkpoint_every=1", "--device=cpu",
    "--sample_prompt=The",
]  # fmt: skip
numbers = itertools.count()

LOSS = "F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())"
HEAD = "            return self.lm_head(x.float())\n"
FIELD = "    n_embd: int = 768\n"
SETTING = "    n_embd: int = 768  # channels of the residual stream\n"
MLP_END = "        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)\n"
GELU = 'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))'


def edited(folder, *edits, name=None):
    """The module of a copy of train_gpt2.py with these edits, (old, new) each."""
    text = SOURCE
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} places are:\n{old}"
        text = text.replace(old, new)
    name = name or f"train_edited_{next(numbers)}"
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [500, 3000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(script, *flags, log_dir="log"):
    return script.main(script.parse_args([*FLAGS, "--data_dir=data", f"--log_dir={log_dir}", *flags]))


def text(path):
    return Path(path).read_text()


def records(log_dir):
    lines = [line.split(" ", 2) for line in text(f"{log_dir}/log.txt").splitlines()]
    return {(int(step), kind): value for step, kind, value in lines}


# -----------------------------------------------------------------------------
# The model and its loss

ALL = {"train", "val", "hella", "sample"}
EDITS = [
    ("label smoothing", [(LOSS, LOSS[:-1] + ", label_smoothing=0.1)")], {"train", "val"}),
    ("label smoothing in training only",
     [(LOSS, LOSS[:-1] + ", label_smoothing=0.1 if self.training else 0.0)")], {"train"}),
    ("z-loss", [(LOSS, LOSS + " + 1e-3 * logits.float().logsumexp(-1).square().mean()")], {"train", "val"}),
    ("targets after the end of a document do not count",
     [(LOSS, LOSS.replace("targets", "targets.masked_fill(idx % 8 == 0, -100)"))], {"train", "val"}),
    ("a weight by class", [(LOSS, LOSS[:-1] + ", weight=torch.ones(logits.size(-1)).index_fill(0, idx[0, 5:9], 0.1))")],
     {"train", "val"}),
    ("a difference between rows",
     [(LOSS, LOSS + " + (x.size(0) > 1) * logits.float().mean((1, 2)).var(0).sum() * 1e6")],
     {"train", "val"}),
    ("a weight by position",
     [(LOSS, "(" + LOSS[:-1] + ', reduction="none").view_as(idx) * torch.linspace(0.5, 1.5, idx.size(1))).mean()')],
     {"train", "val"}),
    ("a soft cap in the head",
     [("        if self.training:\n            return self.lm_head(x)\n",
       "        if self.training:\n            return 0.01 * (self.lm_head(x) / 0.01).tanh()\n"),
      (HEAD, "            return 0.01 * (self.lm_head(x.float()) / 0.01).tanh()\n")], ALL),
    ("a soft cap after the head",
     [("        loss = None if targets is None", "        logits = 0.01 * (logits / 0.01).tanh()\n"
       "        loss = None if targets is None")], {"train", "val"}),  # and a warning
    ("a soft cap that does nothing to small logits yet",
     [("        loss = None if targets is None", "        logits = torch.where(logits.abs() < 1, logits, 0)\n"
       "        loss = None if targets is None")], set()),
    ("a gradient that is halved", [(LOSS, LOSS.replace("logits", "(0.5 * logits + 0.5 * logits.detach())"))], set()),
    ("a scale in a buffer that is 1 at first",
     [(LOSS, LOSS.replace("logits", "(logits * self.scale)")), ("        self.apply(self.init_weights)\n",
       '        self.apply(self.init_weights)\n        self.register_buffer("scale", torch.ones(()))\n')], set()),
    ("larger initial values", [('"init_std", 0.02', '"init_std", 0.2')], ALL),
    ("an MLP with a square", [(GELU, "return self.c_proj(10 * F.relu(self.c_fc(x)).square() + 0.1 * x.mean())")],
     ALL),
    ("no position embeddings", [(" + self.transformer.wpe.weight[start:end]", "")], ALL),
]  # fmt: skip


def first_records(script, folder, items):
    """The records of step 0, among them the losses of HellaSwag's endings, and the last training loss."""
    scores = []
    score = hellaswag.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hellaswag, "FOLDER", items)
        patch.setattr(hellaswag, "SHA256", {})
        patch.setattr(hellaswag, "score", lambda *args: scores.append(score(*args)) or scores[-1])
        flags = ["--vocab_size=50257", "--hellaswag_every=2", "--sample_every=2", "--sample_temperature=0.9"]
        train(script, *flags, log_dir=folder / "log")
    found = records(folder / "log")
    samples = [line for line in text(folder / "log" / "samples.txt").splitlines() if line.startswith("0 ")]
    begin = {kind: found[0, kind] for kind in ("train", "val")} | {"sample": samples}
    return begin | {"hella": scores[0].tolist()}, found[1, "train"]


def test_an_edit_takes_effect_where_it_must_and_nowhere_else(folder, capsys):
    """All in one test: each is compared with the script as it is. What cannot show in the first records is in the
    gradient, and the run gives up its faster loss with a line."""
    items = folder / "hellaswag"
    items.mkdir()
    (items / "hellaswag_val.jsonl").write_text("".join(json.dumps(item) + "\n" for item in make_items(4)))
    as_it_is, end = first_records(edited(folder), folder, items)
    said = capsys.readouterr().out
    assert "the loss is that of GPT.forward" not in said and "changes the logits" not in said
    for number, (name, edits, differ) in enumerate(EDITS):
        place = folder / str(number)
        place.mkdir()
        found, its_end = first_records(edited(place, *edits), place, items)
        assert {kind for kind in found if found[kind] != as_it_is[kind]} == differ, name
        said = capsys.readouterr().out
        assert ("changes the logits after head()" in said) == (name == "a soft cap after the head"), name
        if name.startswith(("a soft cap that", "a scale in")):
            assert re.search(r"the loss is that of GPT.forward, \d+ ms .* computes something else, in \d+ ms", said)
        else:
            assert its_end != end, name


def test_a_bias_of_the_head_is_trained(folder):
    head = "self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias="
    train(edited(folder, (head + "False)", head + "True)")))
    assert load("log/model_00002.pt")["model"]["lm_head.bias"].abs().max() > 0


def test_with_a_frozen_body_the_head_learns(folder):
    end = "        self.apply(self.init_weights)\n"
    train(edited(folder, (end, end + "        self.transformer.h.requires_grad_(False)\n")))
    first, last = (load(f"log/model_0000{step}.pt")["model"] for step in (1, 2))
    assert float(records("log")[0, "norm"]) > 0
    assert torch.equal(first["transformer.h.0.mlp.c_fc.weight"], last["transformer.h.0.mlp.c_fc.weight"])
    assert not torch.equal(first["lm_head.weight"], last["lm_head.weight"])


def test_initial_values_are_their_authors_but_for_linear_layers_and_embeddings(folder):
    own = MLP_END + (
        "        self.q_norm = nn.RMSNorm(config.n_embd)\n"
        "        self.scale = nn.Parameter(torch.full((3,), 7.0))\n"
        "        self.lora_b = nn.Linear(4, config.n_embd)\n"
        "        nn.init.zeros_(self.lora_b.weight)\n"
        "        self.gate = nn.Linear(config.n_embd, 64)\n"
        "        self.small = nn.Linear(config.n_embd, 64)\n"
        "        self.small.init_std = 1e-4\n"
    )
    mlp = (
        edited(folder, (MLP_END, own))
        .GPT(edited(folder).GPTConfig(n_layer=1, n_embd=64, n_head=1))
        .transformer.h[0]
        .mlp
    )
    assert (mlp.q_norm.weight == 1).all() and (mlp.scale == 7).all() and not mlp.lora_b.weight.any()
    assert 0.015 < mlp.gate.weight.std() < 0.025 and mlp.small.weight.std() < 2e-4 and not mlp.gate.bias.any()
    assert 0.01 < mlp.c_proj.weight.std() < 0.018  # 0.02 / sqrt(2)


def test_tokens_after_a_cache_see_what_comes_before_them_only(folder):
    script = edited(folder)
    model = script.GPT(script.GPTConfig(16, 60, 2, 2, 8)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    idx = torch.randint(60, (3, 12))
    cache = torch.empty(2, 2, 3, 2, 12, 4)
    parts = [model.hidden_states(idx[:, a:b], cache, a) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(idx))
    with pytest.raises(ValueError, match="no cache"):
        model.hidden_states(idx[:, 5:], start=5)


# -----------------------------------------------------------------------------
# What is written can be read

DROPOUT = [
    (SETTING, SETTING + "    dropout: float = 0  # of the MLP\n"),
    (FIELD + "\n", FIELD + "    dropout: float = 0\n\n"),
    (MLP_END, MLP_END + "        self.dropout = config.dropout\n"),
    (GELU, "return F.dropout(" + GELU.removeprefix("return ") + ", self.dropout, self.training)"),
]


@pytest.mark.parametrize(
    "field, flags, value",
    [
        ("dropout: float = 0", ["--dropout=0.1"], 0.1),
        ("window: int | None = 128", ["--window=none"], None),
        ("kinds: list = field(default_factory=list)", ["--kinds=[1, 2]"], [1, 2]),
        ("betas: tuple[float, float] = (0.9, 0.95)", ["--betas=0.8,0.9"], (0.8, 0.9)),
        ("name: str | None = None", [], None),
    ],
)
def test_a_field_of_any_type_is_saved_and_read_again(field, flags, value, folder):
    script = edited(
        folder, ("import asdict, dataclass, fields", "import asdict, dataclass, field, fields"),
        (SETTING, f"{SETTING}    {field}\n"), (FIELD + "\n", f"{FIELD}    {field}\n\n"),
    )  # fmt: skip
    train(script, *flags)
    name = field.split(":")[0]
    assert getattr(script.load_model("log/model_00002.pt").config, name) == value
    train(script, *flags, "--init_from=resume", "--max_steps=3")
    assert load("log/model_00003.pt")["config"][name] == value


RECORD = "            run.record(val=val_loss)\n"


@pytest.mark.parametrize("value", ["torch.tensor(val_loss)", "__import__('numpy').float32(val_loss)", "7"])
def test_a_record_that_is_a_number_becomes_one(value, folder):
    script = edited(folder, (RECORD, f"            val_loss = {value}\n{RECORD}"))
    metrics = train(script)
    assert type(metrics["val_loss"]) is float and type(load("log/model_00002.pt")["val_loss"]) is float


@pytest.mark.parametrize(
    "record, words",
    [("entropy='high'", "record entropy is 'high', not a number"), ("**{'a b': 1}", "'a b' cannot be a kind"),
     ("entropy=torch.ones(2)", "record entropy is tensor")],
)  # fmt: skip
def test_a_record_that_the_log_cannot_hold_is_refused_by_name(record, words, folder):
    with pytest.raises(UserError, match=words):
        train(edited(folder, (RECORD, f"            run.record(val=val_loss, {record})\n")))


CONTENTS = '"model": model, "optimizer": optimizer,'


@pytest.mark.parametrize(
    "entry, words",
    [
        ('"step": 3', "step: a checkpoint has an entry of that name"),
        ('"best": __import__("numpy").float64(3)', "best is of type numpy.float64"),
        ('"paths": [1, {"a": __import__("pathlib").Path()}]', r"paths\[1\]\['a'\] is of type pathlib"),
        ('"loader": data', "loader is of type lib.data"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_step_0(entry, words, folder):
    with pytest.raises(UserError, match=words):
        train(edited(folder, (CONTENTS, f"{CONTENTS} {entry},")))
    assert not list(folder.glob("log/*.pt")) and not list(folder.glob("log/log.txt"))


# -----------------------------------------------------------------------------
# Starting from other weights


def test_a_start_from_other_weights_honours_settings_and_keeps_sizes(folder, capsys):
    script = edited(folder, *DROPOUT)
    train(script, "--dropout=0.2", log_dir="first")
    for flags, value in ((["--dropout=0.5"], 0.5), ([], 0.2)):
        train(script, "--init_from=first/model_00002.pt", f"--log_dir={value}", "--n_layer=12", *flags)
        out = capsys.readouterr().out
        assert ("dropout is 0.5, not 0.2 as in the weights" in out) == (value == 0.5)
        saved = load(f"{value}/model_00002.pt")
        assert saved["config"]["dropout"] == saved["train_config"]["dropout"] == value
        assert saved["config"]["n_layer"] == saved["train_config"]["n_layer"] == 1
        assert json.loads(text(f"{value}/config.json"))["dropout"] == value
        assert f"dropout = {value}" in text(f"{value}/summary.md")
        train(script, "--init_from=resume", f"--log_dir={value}", "--n_layer=12", "--max_steps=3", *flags)
    with pytest.raises(UserError, match="dropout was 0.2 when the run began and is 0.3"):
        train(script, "--init_from=resume", "--log_dir=0.2", "--dropout=0.3")


def test_weights_that_a_file_lacks_are_new_and_named(folder, capsys):
    train(edited(folder), log_dir="first")
    script = edited(folder, (MLP_END, MLP_END + "        self.lora = nn.Parameter(torch.zeros(config.n_embd))\n"),
                    (GELU, GELU + " * (1 + self.lora)"))  # fmt: skip
    train(script, "--init_from=first/model_00002.pt")
    assert "new weights, which the checkpoint does not have: transformer.h.0.mlp.lora" in capsys.readouterr().out
    assert records("log")[0, "val"] == records("first")[2, "val"]
    assert load("log/model_00002.pt")["model"]["transformer.h.0.mlp.lora"].any()


# -----------------------------------------------------------------------------
# State


def crash_at(script, step, *flags, log_dir="stopped"):
    get_lr = script.get_lr

    def crashing(at, config):
        if at == step:
            raise MemoryError("a crash, for the test")
        return get_lr(at, config)

    script.get_lr = crashing
    with pytest.raises(MemoryError):
        train(script, *flags, log_dir=log_dir)
    script.get_lr = get_lr


COUNTER = (
    MLP_END,
    MLP_END
    + '        self.register_buffer("seen", torch.zeros(1))\n        self.register_buffer("mean", torch.zeros(1))\n',
)
COUNTING = (
    "        " + GELU,
    "        self.seen += 1\n        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()\n"
    "        " + GELU + " + self.seen * 1e-4 + self.mean",
)
STOPPER = [
    ("# -----------------------------------------------------------------------------\n# The run\n",
     "class Stopper:\n    count = 0\n    def state_dict(self):\n        return {'count': self.count}\n"
     "    def load_state_dict(self, state):\n        self.count = state['count']\n\n\n# The run\n"),
    (CONTENTS, '"stopper": (stopper := Stopper()), ' + CONTENTS),
    (RECORD, RECORD + "            stopper.count += 1\n            run.record(count=stopper.count)\n"),
]  # fmt: skip


PYTHON = [
    (GELU, GELU + " * (__import__('random').random() * np.random.rand() if self.training else 1)"),
]
LEFT_OUT = [
    ("[p for p in self.parameters() if p.dim() >= 2]", "[p for p in self.transformer.h.parameters() if p.dim() > 1]")
]
LOOKS = [(MLP_END, MLP_END + "        self.rate = torch.linspace(0, 0.1, 3)[1].item()\n")]


@pytest.mark.parametrize(
    "edits", [DROPOUT, [COUNTER, COUNTING], STOPPER, PYTHON, LEFT_OUT, LOOKS],
    ids=["dropout", "buffers", "stopper", "Python's numbers", "parameters without an optimizer", "values in __init__"],
)  # fmt: skip
def test_stateful_code_resumes_bit_for_bit(edits, folder):
    script = edited(folder, *edits)
    flags = ["--max_steps=6", "--val_every=2", *(["--dropout=0.3"] if edits is DROPOUT else [])]
    train(script, *flags, log_dir="whole")
    crash_at(script, 4, *flags)  # after the validation and the checkpoint of step 4
    train(script, *flags, "--init_from=resume", log_dir="stopped")
    assert text("whole/log.txt") == text("stopped/log.txt")
    script.load_model("whole/model_00006.pt")
    for name in ("model", "optimizer", *(["stopper"] if edits is STOPPER else [])):
        assert_same(load("whole/model_00006.pt")[name], load("stopped/model_00006.pt")[name])


def test_a_run_stopped_between_two_evaluations_counts_none_of_them_twice(folder):
    """It is stopped while other weights are in place for an evaluation: the checkpoint has the run's own."""
    swapped = (
        "import contextlib\n\n@contextlib.contextmanager\n@torch.no_grad()\ndef swapped(model):\n"
        "    own = [p.clone() for p in model.parameters()]\n"
        "    for p in model.parameters():\n        p.data.zero_()\n"
        "    try:\n        yield\n    finally:\n"
        "        for p, value in zip(model.parameters(), own, strict=True):\n            p.data.copy_(value)\n\n\n"
    )
    stop = "            with swapped(model):\n                stop_at(step)\n"
    script = edited(
        folder, *STOPPER[:2], ("def train(config,", "stop_at = print\n\n\n" + swapped + "def train(config,"),
        (RECORD, STOPPER[2][1] + stop),
    )  # fmt: skip
    flags = ["--max_steps=6", "--val_every=2"]
    train(script, *flags, log_dir="whole")

    def stop_at(step):
        if step == 4:
            raise Stopped(15)

    script.stop_at = stop_at
    with pytest.raises(Stopped):
        train(script, *flags, log_dir="stopped")
    assert load("stopped/model_00004.pt")["stopper"] == {"count": 2}
    script.stop_at = print
    train(script, *flags, "--init_from=resume", log_dir="stopped")
    assert text("whole/log.txt") == text("stopped/log.txt")
    assert_same(load("whole/model_00006.pt")["model"], load("stopped/model_00006.pt")["model"])


def test_a_batch_that_grows_counts_its_tokens_and_resumes(folder):
    script = edited(folder, ("train_loader, grad_accum_steps, lr,", "train_loader, 1 + (step > 1), lr,"))
    flags = ["--max_steps=5", "--total_batch_size=256"]
    metrics = train(script, *flags, log_dir="whole")
    assert metrics["tokens"] == load("whole/model_00005.pt")["tokens"] == (2 + 3 * 2) * 64
    assert "tokens | 512 in 5 steps" in text("whole/summary.md")
    crash_at(script, 3, *flags)
    train(script, *flags, "--init_from=resume", log_dir="stopped")
    assert text("whole/log.txt") == text("stopped/log.txt")


def test_masked_targets_weigh_the_same_whatever_the_micro_batch(folder):
    begin = "        x, y = self.prepared\n"
    masks = (begin, begin + "        y[x % 3 == 0] = -100\n        y[x[:, 0] % 2 == 0] = -100\n")
    script = edited(folder, masks)
    for B in (1, 2, 4):
        train(script, f"--micro_batch_size={B}", "--max_steps=0", "--val_tokens=400", log_dir=f"of_{B}")
    assert records("of_1") == records("of_2") == records("of_4")


def test_a_second_run_in_the_process_at_the_same_time_is_refused(folder):
    script, errors = edited(folder), []

    def second():
        try:
            train(script, log_dir="second")
        except UserError as error:
            errors.append(error)

    get_lr = script.get_lr

    def starting(step, config):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return get_lr(step, config)

    script.get_lr = starting
    train(script)
    assert len(errors) == 2 and "another run is in progress in this process" in str(errors[0])
    script.get_lr = get_lr
    train(script, log_dir="third")


@pytest.mark.parametrize(
    "name, edits",
    [
        ("tracker", []),
        ("keep_checkpoints", []),
        ("sample_prompt", [("config.sample_prompt", '"The"')]),
        ("min_lr_ratio", [("config.max_lr * config.min_lr_ratio", "0.0")]),
        ("hellaswag_every", [(" if config.hellaswag_every else None", ' if "" else None'),
                             ("if hella and run.due(config.hellaswag_every)", "if hella")]),
        ("log_every", [("if (config.log_every and step % config.log_every == 0) or not finite", "if True")]),
    ],
)  # fmt: skip
def test_a_deleted_setting_breaks_nothing(name, edits, folder):
    line = re.search(rf"^    {name}: .*\n", SOURCE, re.M)[0]
    script = edited(folder, (line, ""), *edits)
    script.PRESETS.clear()
    flags = [flag for flag in FLAGS if not flag.startswith(f"--{name}=")]
    script.PRESETS["gpt2"] = {}
    script.main(script.parse_args([*flags, "--data_dir=data", "--log_dir=log"]))


def test_a_checkpoint_knows_its_script(folder, capsys):
    train(edited(folder, name="train_relu"))
    assert load_checkpoint(folder / "log" / "model_00002.pt")["script"][0] == "train_relu.py"


# -----------------------------------------------------------------------------
# Ranks

ZERO = [
    ("        fused = device", "        import torch.distributed.optim as sharded\n        fused = device"),
    ("        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)",
     "        sharded = sharded.ZeroRedundancyOptimizer if dist.is_initialized() else None\n"
     "        return sharded(self.parameters(), torch.optim.AdamW, lr=learning_rate)"),
]  # fmt: skip


def test_a_sharded_optimizer_is_collected_and_resumes_and_ranks_draw_their_own_dropout(folder):
    text = SOURCE
    drew = folder / "drew.txt"
    draws = [(GELU, f"open({str(drew)!r}, 'a').write(str(float(torch.rand(1))) + chr(10)); " + GELU)]
    for old, new in [*ZERO, *draws]:
        text = text.replace(old, new)
    (folder / "train_zero.py").write_text(text)
    flags = [*FLAGS, f"--data_dir={folder}/data", f"--log_dir={folder}/log"]
    for extra in ["--max_steps=2"], ["--max_steps=4", "--init_from=resume"]:
        result = run_warm(folder / "train_zero.py", *flags, *extra, ranks=2)
        assert result.returncode == 0, result.stdout
    assert "max_steps 2 -> 4" in result.stdout and math.isfinite(float(records(folder / "log")[3, "train"]))
    state = load(folder / "log" / "model_00004.pt")["optimizer"]["state"]
    assert len(state) == 16 and all({"exp_avg", "exp_avg_sq", "step"} == part.keys() for part in state.values())
    drawn = set(map(float, drew.read_text().split()))
    for step, rank in itertools.product(range(4), range(2)):
        seed_step(1337, step, rank)
        assert float(torch.rand(1)) in drawn
