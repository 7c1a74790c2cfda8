"""
Token shards that others have published: fetched, and copied into the folder unchanged.
"""

import shutil

import numpy as np

from lib.data.manifest import write_manifest, write_shard
from lib.tokenizer import EOT


def copy_shards(out, manifest, progress, paths, bar):
    """Copy the fetched .bin files from `progress` on, and list them in the manifest."""
    write_manifest(out, manifest, progress=progress)
    for index, path in paths(progress["file"]):
        with open(path, "rb") as source:
            shard = write_shard(out / path.name, lambda file, source=source: shutil.copyfileobj(source, file, 1 << 20))
        manifest["documents"] += int(np.count_nonzero(np.fromfile(path, "<u2", offset=1024) == EOT))
        manifest["tokens"] += shard["tokens"]
        manifest["shards"].append(shard)
        write_manifest(out, manifest, progress={"file": index + 1, "row": 0, "skip": 0})
        bar.update(shard["tokens"], manifest, path.name)
