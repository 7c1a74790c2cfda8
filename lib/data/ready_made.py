"""
Token shards that others have published: fetched, and copied into the folder unchanged.
"""

import shutil

import numpy as np

from lib.data.manifest import write_manifest
from lib.data.shards import check_shard_set, open_shard
from lib.files import atomic_write, hash_file
from lib.tokenizer import EOT


def place_shards(out, manifest, progress, paths, bar):
    """Copy the fetched .bin files from `progress` on, and list them in the manifest."""
    check_shard_set([file["file"] for file in manifest["files"]])
    write_manifest(out, manifest, progress=progress)
    for index, path in paths(progress["file"]):
        tokens = open_shard(path)
        manifest["documents"] += int(np.count_nonzero(tokens == EOT))
        manifest["tokens"] += len(tokens)
        manifest["shards"].append({"file": path.name, "tokens": len(tokens), "sha256": hash_file(path)})
        with open(path, "rb") as source, atomic_write(out / path.name) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        write_manifest(out, manifest, progress={"file": index + 1, "row": 0, "skip": 0})
        bar.update(len(tokens), manifest, path.name)
