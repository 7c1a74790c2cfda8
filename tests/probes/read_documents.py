"""Read a .parquet, and print how many documents it has and what memory pyarrow took at most."""

import sys
from pathlib import Path

import pyarrow

from lib.data.readers import documents_of

print(sum(1 for _ in documents_of(Path(sys.argv[1]))), pyarrow.default_memory_pool().max_memory())
