"""Look at the machines of a run by processes started as the run's would be: `launch … -m megatron_sstoken.preflight`.

Compares versions, GPUs and clocks, measures all-reduce within each machine and between neighbours, and looks for disk space and
a folder that all share. Each finding names machine, value, rule and remedy. Exit code 0 if a run can start, 2 if something
would break it. megatron-core is not imported: a broken installation is a finding.
"""
