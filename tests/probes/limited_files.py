"""Train with a real limit on the size of files, which the log stays under and a checkpoint does not."""

import resource

import train_gpt2

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
