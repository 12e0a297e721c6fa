"""Captions to image shards: identity, leases, the diffusion loop, audit."""
