"""Files of other programs, which people give where ours are expected: what they are, and what helps."""

import contextlib
from fnmatch import fnmatch
from pathlib import Path

SAVE = "AutoModelForCausalLM.from_pretrained(FOLDER, {}=True).save_pretrained(NEW)"
NUMPY = "for i, s in enumerate(['val', 'train']): n.save(f'x_{s}_00000{i}', n.fromfile(s + '.bin', '<u2'))"
KINDS = (  # (name, first bytes, what it is: what helps); the first that fits
    ("*", b"version https://git-lfs", "a git-LFS pointer to the file itself: run git lfs pull in its folder"),
    ("*", b"GGUF", "llama.cpp's format, mostly rounded: use the weights that it was converted from"),
    ("*.h5", b"\x89HDF", f"a TensorFlow checkpoint: convert it with transformers 4, {SAVE.format('from_tf')}"),
    ("*.msgpack", b"", f"a Flax checkpoint: convert it with transformers 4, {SAVE.format('from_flax')}"),
    ("adapter_config.json", b"", "a LoRA adapter: merge it first, with merge_and_unload() of the library peft"),
    ("*.index.json", b"{", "the list of a model's parts: give their folder"),
    ("*.bin", (20240801).to_bytes(4, "little"), "Llama 3's tokens, by llm.c: build shards from the text by fineweb.py"),
    ("*.idx", b"MMIDIDX", "Megatron's tokens: build shards from the text by fineweb.py"),
    ("*.arrow", b"", 'made by save_to_disk: datasets.load_from_disk(FOLDER).to_parquet("x.parquet") makes a source'),
    ("train.bin", b"", f"nanoGPT's tokens: in its folder, with `import numpy as n`, run {NUMPY}"),
)


def recognize(path):
    """What a file, or a folder by one of its files, seems to be and what helps, as the end of a message; or ""."""
    path = Path(path)
    with contextlib.suppress(OSError):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            for name, start, what in KINDS:
                if fnmatch(file.name, name) and file.is_file():
                    with open(file, "rb") as content:
                        if content.read(len(start)) == start:
                            return f". {file.name} looks like {what}"
    return ""
