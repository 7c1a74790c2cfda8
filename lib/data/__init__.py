"""From text to tokens to batches: sources, the hub, shards and their manifest, the stream."""
