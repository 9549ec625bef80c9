"""The search: prompt, statistics, hypernetwork, allocators, methods."""
