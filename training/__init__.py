"""Fits models: corpus, batches, network, checkpoint. The only home of torch."""
