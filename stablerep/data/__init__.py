"""Reading shards and turning them into training batches."""
