"""Build shards where no file may grow beyond so many bytes: limit_file_size.py BYTES FLAGS."""

import resource
import sys

import fineweb

if __name__ == "__main__":
    size = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    fineweb.main()
