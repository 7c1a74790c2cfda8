"""
Multiple-choice items: one JSON object per line, with texts, four endings and the index of the right one.
"""

import json
from pathlib import Path

from lib.console import UserError


def read_items(path, fields, style):
    """Yield the items of a .jsonl as dicts, their label as an int. Raises UserError for a line without the fields that
    the style needs; blank lines are skipped."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8-sig"))
            if item["label"] == "":
                raise ValueError("an empty label, as in the test split, whose answers are secret: use another split")
            label, endings = int(str(item["label"])), item["endings"]  # the hub's own data set has "3"
            if label not in range(4) or len(endings) != 4:
                raise ValueError(f"label {label} and {len(endings)} endings")
            if {type(text) for text in [item[field] for field in fields] + endings} != {str}:
                raise ValueError("a value that is not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = f"a JSON object with {', '.join(fields)}, label 0 to 3 and 4 endings"
            start = line[:100].decode(errors="replace")
            raise UserError(
                f"{path}, line {number}: --style {style} needs {wanted}, not {error!r:.200}: {start}"
            ) from None
        yield {**item, "label": label}
