"""The data plane: model forward, paged attention, block moves and sampling on one engine."""
