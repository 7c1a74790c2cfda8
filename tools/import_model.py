"""
Import a GPT-2 that another program saved, as a folder like those of tools/export_hf.py.

    python -m tools.import_model build-nanogpt/log/model_19072.pt my_gpt2
    python -m tools.import_model weights.safetensors my_gpt2 --n_head 12

It reads checkpoints of the tutorial and of nanoGPT, llm.c's .bin, state dicts and safetensors, and runs no code from
them. The folder can be used like a checkpoint: --init_from my_gpt2, python -m tools.sample my_gpt2, python
hellaswag.py -m my_gpt2. The optimizer is not imported, so a run from the folder begins at step 0.
"""

import argparse
from pathlib import Path

from lib.console import UserError, run_as_command, say
from lib.model.foreign import read_foreign
from lib.model.load import check_vocabulary, rebuild
from tools.export_hf import new_folder, render_card, write_folder
from train_gpt2 import GPT, GPTConfig


def import_model(path, folder, n_head=None):
    folder = new_folder(folder)
    checkpoint, facts, notes = read_foreign(path, n_head)
    try:
        model = rebuild(checkpoint, GPT, GPTConfig)
    except UserError as error:
        raise UserError(f"cannot import {path}: {error}") from None
    check_vocabulary(path, model.config)
    for note in notes:
        say(f"note: {note}")
    origin, facts = "imported from a file of another program", {"file": Path(path).name, **facts}
    write_folder(folder, model, lambda parameters: render_card(checkpoint["config"], parameters, origin, facts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", help="a checkpoint of another program, or weights")
    parser.add_argument("folder", help="the folder to create; it may exist if it is empty")
    parser.add_argument("--n_head", type=int, help="attention heads of a block, if the file does not say")
    args = parser.parse_args()
    run_as_command(import_model, args.file, args.folder, args.n_head)


if __name__ == "__main__":
    main()
