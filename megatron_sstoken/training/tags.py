"""Under which tag TensorBoard shows a metric. It sorts by name: numbers keep the order in which a person reads."""

GROUPS: dict[str, dict[str, str]] = {
    "loss": {
        "loss/validation": "validation",
        "loss/all": "all",
        "loss/selected": "selected",
        "loss/dropped": "dropped",
        "loss/history": "history",
        "loss/dropped_minus_history": "dropped − history",
    },
    "loss by source": {"loss/source/": "training", "loss/validation/": "validation"},
    "selection": {
        "selection/share": "share",
        "selection/rho": "rho",
        "selection/explore": "explore",
        "weights/mean": "mean weight",
        "weights/effective_share": "effective share",
    },
    "signals": {"rel/": "rel", "attention/": "attention"},
    "optimizer": {
        "optimizer/learning_rate": "learning rate",
        "optimizer/gradient_norm": "gradient norm",
        "training/skipped_steps": "skipped steps",
    },
    "speed": {
        "speed/tokens_per_second": "tokens per second",
        "speed/mfu": "MFU",
        "speed/model_tflops_per_process": "model TFLOPs per process",
        "speed/model_tflops": "model TFLOPs",
        "speed/step_seconds": "step seconds",
        "data/real_share": "share of real tokens",
    },
    "memory": {"memory/peak_gib": "peak GiB"},
}
"""Group → metric → title, in the order of reading. A metric that ends with / stands for all that begin with it."""

_TAGS = {
    metric: f"{number} {group}/{place} {title}"
    for number, (group, metrics) in enumerate(GROUPS.items(), 1)
    for place, (metric, title) in enumerate(metrics.items(), 1)
}


def tag_of(metric: str) -> str:
    """TensorBoard's tag of a metric. Raises KeyError for one that the table lacks."""
    if metric in _TAGS:
        return _TAGS[metric]
    beginning, _, rest = metric.partition("/")
    if beginning == "loss":  # sources, whose names may hold a /
        kind, _, rest = rest.partition("/")
        beginning = f"loss/{kind}"
    return f"{_TAGS[beginning + '/']}/{rest}"


def metric_of(tag: str) -> str:
    """The metric that TensorBoard shows under `tag`; other tags, those of earlier versions among them, are what they are."""
    for metric, own in _TAGS.items():
        if tag == own:
            return metric
        if metric.endswith("/") and tag.startswith(f"{own}/"):
            return metric + tag.removeprefix(f"{own}/")
    return tag
