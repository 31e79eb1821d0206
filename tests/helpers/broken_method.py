"""A selection method as a user may write it, with a mistake: importing it fails."""

from megatron_sstoken.selection.methods import Method

scores = Method(lambda x: x["entropi"], needs=frozenset({"entropi"}))
