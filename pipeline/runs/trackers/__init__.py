"""The trackers: Weights & Biases, TensorBoard and MLflow behind one interface, each by its own library.

A tracker gets plain values and must not know stages, artifacts or metrics.jsonl. It raises what its library raises.
"""
