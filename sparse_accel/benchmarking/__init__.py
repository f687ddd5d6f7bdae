"""The training benchmark: named workloads, our training and others' in turns, and what the numbers say."""
