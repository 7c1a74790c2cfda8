import lib.start  # noqa: F401 - Ctrl-C while a tool imports torch ends it at once
